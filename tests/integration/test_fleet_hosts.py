# SPDX-License-Identifier: LGPL-2.1-or-later
"""What becomes of hosts in a night. Each is an SSH server of this machine, whose suite is a script."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path, PurePosixPath

import paramiko
import pytest

from kvmi_host.host.doctor import Machine
from kvmi_host.host.doctor.machine import Said
from kvmi_host.lab import ssh_run
from kvmi_host.lab.fleet import run_fleet
from kvmi_host.lab.inventory import LabHost
from kvmi_host.lab.night import HostRun, Night, State, read_night
from kvmi_host.lab.parcel import Parcel, Python
from kvmi_host.lab.part import Part
from kvmi_host.lab.supervision import Patience, Places
from kvmi_host.testing.ssh_server import SshServer

pytestmark = pytest.mark.integration

PARCEL = Parcel("suite-test", "lib", b"")
PATIENCE = Patience(connecting=20, command=60, heartbeat=0.2, silence=3, absence=0.5, retry=0.1, progress=60, ending=20)
DEADLINE = 120.0

REPORTS = """for argument; do
	case $argument in --junitxml=*) junit=${argument#*=} ;; --suite-report=*) results=${argument#*=} ;; esac
done
leave() { echo '<testsuites/>' > "$junit"; echo '{}' > "$results"; exit "$1"; }
trap 'leave 2' INT
echo 'collected 2 items'
printf 'test_x.py::test_a '
"""
"""What every suite does here, until the first test has begun."""

WELL = "echo 'PASSED [ 50%]'; echo 'test_x.py::test_b PASSED [100%]'; leave 0\n"
HANG = "while :; do sleep 0.1; done\n"


class Lab:
    """Hosts, and what their suites and programs do.

    :ivar go: a file; ``AWAIT`` in a suite waits for it.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.go = folder / "go"
        self.boot_id = folder / "boot_id"
        self.boot_id.write_text("first\n")
        self.guests = folder / "guests"
        self.guests.touch()
        self.stop = threading.Event()
        self._stack = stack
        (folder / "ssh_config").touch()
        for name in ("host", "client", "other"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        self.program("dmesg", f'cat {folder}/kmsg; [ -z "$1" ] || exec sleep 60')
        self.program("virsh", f'[ "$2" != list ] || cat {self.guests}')

    @property
    def awaited(self) -> str:
        """What waits for :attr:`go`."""
        return f"until [ -e {self.go} ]; do sleep 0.05; done\n"

    def program(self, name: str, script: str) -> None:
        """Have the hosts a program."""
        self._script(self.folder / "bin" / name, script)

    def host(self, suite: str, name: str = "lab", key: str = "host", deadline: float = DEADLINE) -> LabHost:
        """A host."""
        return self.at(self.serve().port, suite, name, key, deadline)

    def serve(self) -> SshServer:
        """A server that lets us in."""
        key = paramiko.Ed25519Key.from_private_key_file(str(self.folder / "host"))
        return self._stack.enter_context(SshServer(key))

    def at(self, port: int, suite: str, name: str = "lab", key: str = "host", deadline: float = DEADLINE) -> LabHost:
        """A host whose server listens there, and which is known by a key."""
        self._script(self.folder / "opt" / PARCEL.name / "bin/python3", REPORTS + suite)
        (self.folder / "opt" / PARCEL.name / "complete").touch()
        with (self.folder / "ssh_config").open("a") as config:
            config.write(f"Host {name}\nHostName 127.0.0.1\nPort {port}\nHostKeyAlias {name}\n")
            config.write(f"IdentityFile {self.folder}/client\nUserKnownHostsFile {self.folder}/known\n")
        with (self.folder / "known").open("a") as known:
            known.write(f"{name} {(self.folder / f'{key}.pub').read_text()}")
        return LabHost(name, "ssh", name, self.folder / "ssh_config", {"rack": "3"}, deadline=deadline)

    def night(self, *hosts: LabHost, watch: Callable[[Part], None] = lambda part: None, **patience: float) -> Night:
        """Run the suite on hosts."""
        run, log = (str(self.folder / name) for name in ("run", "kmsg"))
        places = Places(run, log, str(self.boot_id), PurePosixPath(self.folder / "opt"))
        night = run_fleet(
            hosts,
            self.folder / "night",
            stop=self.stop,
            watch=watch,
            patience=Patience(**{**vars(PATIENCE), **patience}),
            places=places,
            parcel=lambda python: PARCEL,
        )
        assert night == read_night(self.folder / "night")
        return night

    def left(self, name: str, host: str = "lab") -> str:
        """What is in a file of a host's folder."""
        return (self.folder / "night/hosts" / host / name).read_text()

    @staticmethod
    def _script(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}")
        path.chmod(0o755)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """Hosts that can do all that is needed, as far as is looked at."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(ssh_run, "_check", lambda host: Python.here())
    with ExitStack() as stack:
        yield Lab(tmp_path, stack)
    for folder in Path("/tmp").glob(f"kvmi-{os.getpid()}-*"):  # of hosts that died in a test
        shutil.rmtree(folder)


def once(begun: Callable[[], object]) -> Callable[[Part], None]:
    """Does something when the first test has begun."""
    done = threading.Event()

    def watch(part: Part) -> None:
        if part.tally.current and not done.is_set():
            done.set()
            begun()

    return watch


def only(night: Night) -> HostRun:
    (run,) = night.hosts
    return run


def runs(pid: int) -> bool:
    """Whether a process is at work: one that has ended may wait for somebody to ask how."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_suite_that_ends_well_is_collected(lab: Lab) -> None:
    run = only(lab.night(lab.host(WELL)))
    assert (run.state, run.status, run.reason, run.dirty) == (State.FINISHED, 0, "", False)
    assert (run.tags, list(run.phases)) == ({"rack": "3"}, ["connect", "deploy", "suite", "collect"])
    assert "test_b PASSED" in lab.left("pytest.log")
    assert (lab.left("junit.xml"), lab.left("suite.json")) == ("<testsuites/>\n", "{}\n")


def test_nothing_of_a_run_stays_on_the_host(lab: Lab) -> None:
    lab.night(lab.host(f'sleep 600 & touch "$TMPDIR/x"; echo $! > {lab.folder}/left; {WELL}'))
    assert not (lab.folder / "run").exists()
    assert not list(Path("/tmp").glob(f"kvmi-{os.getpid()}-*"))
    assert not runs(int((lab.folder / "left").read_text()))


def test_a_failed_test_fails_the_night(lab: Lab) -> None:
    night = lab.night(lab.host("echo 'FAILED [ 50%]'; echo 'test_x.py::test_b PASSED [100%]'; leave 1\n"))
    assert not night.passed
    assert (only(night).state, only(night).status, only(night).reason) == (State.FINISHED, 1, "1 of 2 tests failed")


def test_a_suite_without_a_report_did_not_pass(lab: Lab) -> None:
    run = only(lab.night(lab.host("exit 0\n")))
    assert (run.passed, run.reason) == (
        False,
        "pytest ended with status 1 and left no report: see the end of pytest.log",
    )


def test_the_kernels_complaints_during_the_run_are_its_warnings(lab: Lab) -> None:
    kmsg = lab.folder / "kmsg"
    kmsg.write_text("WARNING: before\n")
    # The device takes lines one after the other; a file is emptied by who opens it as the run's script does.
    run = only(lab.night(lab.host(f"echo 'BUG: sleeping function' >> {kmsg}; {WELL}")))
    assert [warning.splitlines()[-1] for warning in run.warnings] == ["BUG: sleeping function"]
    assert not run.passed


def test_a_host_with_another_key_is_not_connected_to(lab: Lab) -> None:
    run = only(lab.night(lab.host(WELL, key="other")))
    assert run.state is State.UNREACHABLE
    assert "HAS CHANGED" in run.reason


def test_a_host_that_is_off_is_unreachable(lab: Lab) -> None:
    server = lab.serve()
    server.close()
    run = only(lab.night(lab.at(server.port, WELL)))
    assert (run.state, run.dirty) == (State.UNREACHABLE, False)
    assert "refused" in run.reason


def test_a_host_that_lacks_something_refuses_and_says_what_to_do(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    machine = Machine(there=["/sys/module/kvm"], programs={"user": Said("uid=0(root)", 0)})
    monkeypatch.setattr(ssh_run, "machine_behind", lambda *_, **__: machine)
    run = only(lab.night(lab.host(WELL)))
    assert run.state is State.REFUSED
    assert "kvm is the kernel's own, without introspection" in run.reason
    assert "install kvmi-dkms" in run.reason


def test_a_host_that_lets_us_in_as_a_user_refuses(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    machine = Machine(programs={"user": Said("uid=1000(alice)", 0)})
    monkeypatch.setattr(ssh_run, "machine_behind", lambda *_, **__: machine)
    run = only(lab.night(lab.host(WELL)))
    assert (run.state, run.reason) == (
        State.REFUSED,
        "the suite needs root, and alice is let in: say root@ in its address",
    )


def test_a_host_where_another_suite_is_at_work_refuses(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    (lab.folder / "run").mkdir()
    (lab.folder / "run/name").write_text("somebody's\n")
    (lab.folder / "run/pid").write_text(f"{os.getpid()}\n")
    run = only(lab.night(lab.host(WELL)))
    assert run.state is State.REFUSED
    assert f"another suite is at work there (somebody's, process {os.getpid()}" in run.reason


def test_a_connection_that_breaks_is_made_again_and_nothing_is_missed(lab: Lab) -> None:
    server = lab.serve()

    def breaks() -> None:
        server.drop()
        lab.go.touch()

    run = only(lab.night(lab.at(server.port, lab.awaited + WELL), watch=once(breaks), absence=60))
    assert (run.state, run.status) == (State.FINISHED, 0)
    assert lab.left("pytest.log") == (
        "collected 2 items\ntest_x.py::test_a PASSED [ 50%]\ntest_x.py::test_b PASSED [100%]\n"
    )


def test_a_host_that_hangs_up_and_does_not_come_back_has_died(lab: Lab) -> None:
    server = lab.serve()
    run = only(lab.night(lab.at(server.port, lab.awaited), watch=once(server.close)))
    lab.go.touch()
    assert (run.state, run.dirty, run.status) == (State.DIED, True, None)
    assert "did not let us in again within 0.5 s" in run.reason


def test_a_host_that_falls_silent_is_lost(lab: Lab) -> None:
    with Wire(lab.serve().port) as wire:
        host = lab.at(wire.port, lab.awaited)
        run = only(lab.night(host, watch=once(wire.stall), silence=1, connecting=1))
    lab.go.touch()
    assert (run.state, run.dirty) == (State.LOST, True)
    assert "nothing came from it for 1 s" in run.reason


def test_a_host_that_was_booted_anew_is_told_by_its_boot_id(lab: Lab) -> None:
    server = lab.serve()

    def reboots() -> None:
        lab.boot_id.write_text("second\n")
        server.drop()

    run = only(lab.night(lab.at(server.port, HANG), watch=once(reboots), absence=60))
    assert run.state is State.REBOOTED


def test_a_suite_that_says_nothing_hangs_and_its_reports_are_collected(lab: Lab) -> None:
    run = only(lab.night(lab.host(HANG), progress=3))
    assert (run.state, run.status, run.dirty) == (State.HUNG, 2, False)
    assert "the suite said nothing for 3 s" in run.reason
    assert lab.left("junit.xml")
    assert "== where its processes are" in lab.left("pytest.log")


def test_a_suite_ends_at_the_deadline(lab: Lab) -> None:
    run = only(lab.night(lab.host("while :; do echo; sleep 0.1; done\n", deadline=1)))
    assert run.state is State.HUNG
    assert "did not end by the host's deadline" in run.reason


def test_what_cannot_be_interrupted_is_killed(lab: Lab) -> None:
    run = only(lab.night(lab.host(f"trap '' INT TERM; {HANG}"), progress=1, ending=1))
    assert (run.state, run.status, run.dirty) == (State.HUNG, None, False)
    assert not (lab.folder / "run").exists()


def test_who_ends_the_night_gets_what_there_is(lab: Lab) -> None:
    run = only(lab.night(lab.host(HANG), watch=once(lab.stop.set)))
    assert (run.state, run.status) == (State.INTERRUPTED, 2)
    assert lab.left("junit.xml")


def test_a_guest_that_stays_makes_the_host_dirty(lab: Lab) -> None:
    run = only(lab.night(lab.host(f"echo stays >> {lab.guests}; {WELL}")))
    assert (run.state, run.dirty, run.reason) == (State.FINISHED, True, "it was left with guest stays")


def test_the_others_go_on_when_one_dies(lab: Lab) -> None:
    gone = lab.serve()
    gone.close()
    night = lab.night(lab.at(gone.port, WELL, "gone"), lab.host(WELL, "stays"))
    assert [(run.name, run.state) for run in night.hosts] == [("gone", State.UNREACHABLE), ("stays", State.FINISHED)]


class Wire:
    """Leads to a port, until it is told to stall: then nothing goes through, and nobody is told."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._stalled = threading.Event()
        self._ends: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    @property
    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    def stall(self) -> None:
        self._stalled.set()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                self._ends += [near, far]
                for source, to in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(source, to), daemon=True).start()

    def _pass(self, source: socket.socket, to: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(65536):
                if not self._stalled.is_set():
                    to.sendall(piece)
