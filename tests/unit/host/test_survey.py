# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a machine is looked at: what the script records of a tree of files and of programs, and how that is read."""

from __future__ import annotations

import os
import subprocess
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmi_host.host.doctor import CHECKS, Machine, examine, machine_behind, this_machine
from kvmi_host.host.doctor import machine as machine_module
from kvmi_host.host.doctor.machine import Said, Status, User
from kvmi_host.host.errors import SurveyError
from kvmi_host.host.printable import printable

Survey = Callable[[], Machine]


@pytest.fixture
def put(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes a file below the root that is looked at."""

    def write(name: str, content: str) -> Path:
        file = tmp_path / "root" / name.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        return file

    return write


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Writes a program that is found before all others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def write(name: str, script: str) -> Path:
        file = folder / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        return file

    # What takes long, or is not the same everywhere.
    for name in ("virsh", "qemu-system-x86_64", "systemctl", "journalctl", "kvmi-host", "modinfo", "dmesg", "python3"):
        write(name, f"echo '{name}' \"$@\"")
    return write


@pytest.fixture
def survey(tmp_path: Path, program: Callable[[str, str], Path]) -> Survey:
    """Looks at the machine of those files and programs."""
    (tmp_path / "root").mkdir(exist_ok=True)
    return lambda: this_machine(str(tmp_path / "bin/python3"), tmp_path / "root")


def test_files_are_read(survey: Survey, put: Callable[[str, str], Path]) -> None:
    put("/sys/module/kvm/version", "kvmi\n")
    put("/etc/modprobe.d/ours.conf", "options kvm introspection=1\n")
    machine = survey()
    assert machine.read("/sys/module/kvm/version") == "kvmi"
    assert machine.read("/etc/modprobe.d/ours.conf") == "options kvm introspection=1"
    assert machine.read("/proc/cmdline") is None


def test_bytes_stay_what_they_are(survey: Survey, put: Callable[[str, str], Path]) -> None:
    put("/etc/libvirt/qemu.conf", "").write_bytes(bytes(range(256)))
    assert survey().read_bytes("/etc/libvirt/qemu.conf") == bytes(range(256))


def test_a_large_file_is_cut(survey: Survey, put: Callable[[str, str], Path]) -> None:
    put("/etc/libvirt/qemu.conf", "x" * 100_000)
    assert survey().read("/etc/libvirt/qemu.conf") == "x" * 65536


def test_what_exists_is_listed(survey: Survey, put: Callable[[str, str], Path]) -> None:
    put("/lib/modules/6.1.0-56-amd64/build/Makefile", "")
    put("/boot/vmlinuz-6.1.0-56-amd64", "")
    machine = survey()
    assert machine.has("/lib/modules/6.1.0-56-amd64/build/Makefile")
    assert [found[1] for found in machine.match("/boot/vmlinuz-(.*)")] == ["6.1.0-56-amd64"]
    assert not machine.has("/sys/module/kvm")


def test_owners_and_modes_are_told(survey: Survey, put: Callable[[str, str], Path]) -> None:
    put("/dev/kvm", "").chmod(0o640)
    status = survey().status("/dev/kvm")
    assert status is not None
    assert (status.kind, status.mode) == ("regular empty file", 0o640)
    assert status.owner == subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()


def test_programs_are_heard_on_both_streams(survey: Survey, program: Callable[[str, str], Path]) -> None:
    program("virsh", "echo out; echo err >&2; exit 3")
    assert survey().said("guests") == Said("out\nerr", 3)


def test_a_program_that_writes_without_end_is_cut(survey: Survey, program: Callable[[str, str], Path]) -> None:
    program("virsh", "yes 1234567 | tr -d '\\n'")
    said = survey().said("guests")
    assert said is not None
    assert len(said.text) == 65536


def test_a_program_gets_nothing_of_the_script_to_read(survey: Survey, program: Callable[[str, str], Path]) -> None:
    program("virsh", "cat; echo end of file")
    assert survey().said("guests") == Said("end of file", 0)


def test_the_qemu_of_a_guest_is_asked_too(
    survey: Survey, put: Callable[[str, str], Path], program: Callable[[str, str], Path]
) -> None:
    emulator = program("qemu-kvmi", "echo of the guest")
    put("/etc/libvirt/qemu/web.xml", f"<domain><devices>\n<emulator>{emulator}</emulator>\n</devices></domain>")
    assert survey().said_by("version of ")[str(emulator)] == Said("of the guest", 0)


def test_the_agents_own_socket_is_looked_at(survey: Survey, put: Callable[[str, str], Path]) -> None:
    put("/run/elsewhere.sock", "")
    put("/etc/kvmi-host/agent.toml", '[listen]\nsocket = "/run/elsewhere.sock"\n')
    assert survey().status("/run/elsewhere.sock") is not None


def test_who_looks_is_told(survey: Survey) -> None:
    name = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    user = survey().user
    assert (user.name, user.root) == (name, os.geteuid() == 0)


def test_groups_are_told_by_name() -> None:
    said = Said("uid=1000(alice) gid=1000(alice) groups=1000(alice),105(libvirt)", 0)
    assert Machine(programs={"user": said}).user == User("alice", False, frozenset({"alice", "libvirt"}))


def test_this_machine_can_be_looked_at() -> None:
    assert this_machine().kernel == os.uname().release


def test_a_script_that_does_not_end_is_given_up(
    survey: Survey, program: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_module, "DEADLINE", 0.2)
    program("virsh", "exec sleep 20")
    with pytest.raises(SurveyError, match=r"within 0\.2 s"):
        survey()


def test_records_that_break_off_are_an_error() -> None:
    with pytest.raises(SurveyError, match="file /proc"):
        Machine.parse(b"file\t/proc/cpuinfo\t")


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"\t",
        b"file",
        b"file\t/x",
        b"file\t/x\t!!!",
        b"said\tx\tYQ==",
        b"stat\t/x\t?",
        b"denied\t/x\tx",
        b"\xff\t\xff",
    ],
)
def test_a_record_that_is_none_is_passed_over(record: bytes) -> None:
    machine = Machine.parse(b"there\t/y\n" + record + b"\nend\n")
    assert machine.has("/y")
    assert not machine.read("/x")
    assert machine.status("/x") is None


def test_what_a_host_says_does_nothing_to_a_terminal() -> None:
    text = b64encode("\x1b[31mred\x07\r\n\u202etxt\x9b".encode()).decode()
    machine = Machine.parse(f"said\tvirsh\t{text}\t0\nend\n".encode())
    assert machine.said("virsh") == Said("?[31mred?\n?txt?", 0)


def test_a_file_for_others_is_denied() -> None:
    machine = Machine.parse(b"denied\t/etc/libvirt/qemu.conf\nend\n")
    assert machine.denies("/etc/libvirt/qemu.conf")
    assert machine.has("/etc/libvirt/qemu.conf")


def test_a_label_is_kept() -> None:
    machine = Machine.parse(b"stat\t/s\tsocket|600|root|0|qemu|64055|system_u:object_r:x:s0\nend\n")
    assert machine.status("/s") == Status("socket", 0o600, "root", "qemu", "system_u:object_r:x:s0")


def test_who_has_no_name_is_told_by_number() -> None:
    machine = Machine.parse(b"stat\t/s\tsocket|600|UNKNOWN|61234|kvm|106|?\nend\n")
    assert str(machine.status("/s")) == "0600 61234:kvm"


def test_a_host_without_a_shell_is_an_error_with_what_it_said() -> None:
    class NoShell:
        def run(self, line: str, *, stdin: bytes, deadline: float, most: int) -> subprocess.CompletedProcess[bytes]:
            return subprocess.CompletedProcess(line, 127, b"", b"sh: not found\n")

    with pytest.raises(SurveyError, match="sh: not found"):
        machine_behind(NoShell())


@settings(deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=8))
def test_whatever_comes_is_read_or_refused(lines: list[bytes]) -> None:
    machine = Machine.parse(b"\n".join([*lines, b"end"]))
    findings = list(examine(machine))
    assert len(findings) == len(CHECKS)
    assert all(printable(finding.evidence) == finding.evidence.strip() for finding in findings)
