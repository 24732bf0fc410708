# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every check of the doctor: a host that has it, and one that has not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from kvmi_host.host.doctor import OUR_VERSION, Finding, Machine, State, examine

SECURE_BOOT = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
ON, OFF = b"\x06\0\0\0\x01", b"\x06\0\0\0\x00"
READY: Mapping[str, str | bytes] = {
    "proc/cpuinfo": "flags\t\t: fpu svm\n",
    "sys/module/kvm/version": f"{OUR_VERSION}\n",
    "sys/module/kvm/parameters/introspection": "Y\n",
    SECURE_BOOT: ON,
    "var/lib/dkms/mok.pub": b"a certificate",
}
ENROLLED = "/var/lib/dkms/mok.pub is already enrolled"
SAID: Mapping[str, str | None] = {"modinfo": OUR_VERSION, "mokutil": ENROLLED}


class Fake(Machine):
    """A machine of some files, whose programs say what they are told to."""

    def __init__(self, root: Path, said: Mapping[str, str | None]) -> None:
        super().__init__(root)
        self._said = said

    def run(self, argv: Sequence[str]) -> str | None:
        return self._said[argv[0]]


@pytest.fixture
def find(tmp_path: Path) -> Callable[..., dict[str, Finding]]:
    """Findings by subject, on a host that is ready but for what is given: files (None: not there) and programs."""

    def findings(
        files: Mapping[str, str | bytes | None] = {}, said: Mapping[str, str | None] = {}
    ) -> dict[str, Finding]:
        for name, content in {**READY, **files}.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if content is not None:
                file.write_bytes(content.encode() if isinstance(content, str) else content)
        return {finding.subject: finding for finding in examine(Fake(tmp_path, {**SAID, **said}))}

    return findings


def test_a_host_that_is_ready_has_nothing_to_do(find: Callable[..., dict[str, Finding]]) -> None:
    assert {(finding.state, finding.remedy) for finding in find().values()} == {(State.OK, "")}


@pytest.mark.parametrize(
    ("subject", "state", "files", "said", "remedy"),
    [
        ("virtualization", State.MISSING, {"proc/cpuinfo": "flags\t\t: fpu\n"}, {}, "firmware"),
        ("loaded modules", State.MISSING, {"sys/module/kvm/version": None}, {}, "kvmi-dkms"),
        ("kvm.introspection", State.MISSING, {"sys/module/kvm/parameters/introspection": "N\n"}, {}, "write 1"),
        ("kvm.introspection", State.UNKNOWN, {"sys/module/kvm/parameters/introspection": None}, {}, "loaded modules"),
        ("modules on the disk", State.MISSING, {}, {"modinfo": ""}, "kvmi-dkms"),
        ("modules on the disk", State.UNKNOWN, {}, {"modinfo": None}, "kmod"),
        ("Secure Boot", State.OK, {SECURE_BOOT: OFF}, {}, ""),
        ("Secure Boot", State.OK, {SECURE_BOOT: None}, {}, ""),
        ("Secure Boot", State.MISSING, {"var/lib/dkms/mok.pub": None}, {}, "kvmi-dkms"),
        ("Secure Boot", State.MISSING, {}, {"mokutil": "/var/lib/dkms/mok.pub is not enrolled"}, "mokutil --import"),
        ("Secure Boot", State.UNKNOWN, {}, {"mokutil": None}, "install mokutil"),
    ],
)
def test_what_is_missing_is_said_with_what_to_do(
    find: Callable[..., dict[str, Finding]],
    subject: str,
    state: State,
    files: Mapping[str, str | bytes | None],
    said: Mapping[str, str | None],
    remedy: str,
) -> None:
    finding = find(files, said)[subject]
    assert finding.state is state
    assert remedy in finding.remedy
    assert bool(remedy) == bool(finding.remedy)


def test_a_host_whose_kvm_is_not_loaded_is_told_to_load_it(tmp_path: Path) -> None:
    finding = {found.subject: found for found in examine(Fake(tmp_path, SAID))}["loaded modules"]
    assert (finding.state, finding.remedy) == (State.MISSING, "modprobe kvm_amd, or kvm_intel")


def test_a_program_that_is_not_there_says_nothing() -> None:
    assert Machine().run(["/no/such/program"]) is None
    assert Machine().run(["echo", "a word"]) == "a word"
