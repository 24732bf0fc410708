# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules for QEMU processes: only ours are touched, and every wait has an end."""

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmi_host.lab.errors import LabError
from kvmi_host.lab.qemu import Process, command


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[Process]:
    """A process that stands in for QEMU, recorded as one that was started."""
    child = subprocess.Popen(["sleep", "60"])
    started = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    (tmp_path / "qemu.json").write_text(json.dumps({"pid": child.pid, "started": started}))
    yield Process(tmp_path, child.pid, started)
    child.kill()
    child.wait()


def test_process_is_found_by_its_record(sleeper: Process) -> None:
    assert Process.find(sleeper.run) == sleeper


def test_pid_of_another_process_is_not_ours(sleeper: Process) -> None:
    (sleeper.run / "qemu.json").write_text(json.dumps({"pid": sleeper.pid, "started": sleeper.started + 1}))
    assert Process.find(sleeper.run) is None


def test_pid_of_another_process_is_not_ended(sleeper: Process) -> None:
    Process(sleeper.run, sleeper.pid, sleeper.started + 1).stop()
    assert sleeper.alive()


@pytest.mark.parametrize("record", ["", "{}", "[]", '{"pid": 1}', '{"pid": "x", "started": 1}', "null"])
def test_garbage_in_the_record_is_no_process(tmp_path: Path, record: str) -> None:
    (tmp_path / "qemu.json").write_text(record)
    assert Process.find(tmp_path) is None


def test_stop_returns_when_it_is_gone(sleeper: Process) -> None:
    sleeper.stop()
    assert not sleeper.alive()


def test_stop_of_what_is_gone_is_fine(sleeper: Process) -> None:
    sleeper.stop()
    sleeper.stop()


def test_zombie_does_not_count_as_running(tmp_path: Path) -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    started = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    assert not Process(tmp_path, child.pid, started).alive()
    child.wait()


def test_console_marker_ends_the_wait(sleeper: Process) -> None:
    (sleeper.run / "console.log").write_text("boot\nkvmi-lab: ready\n")
    sleeper.wait_console("kvmi-lab: ready", 5)


def test_console_wait_has_a_deadline_and_shows_the_log(sleeper: Process) -> None:
    (sleeper.run / "console.log").write_text("stuck here\n")
    with pytest.raises(LabError, match=r"within 0\.1 s(.|\n)*stuck here"):
        sleeper.wait_console("kvmi-lab: ready", 0.1)


def test_console_wait_ends_with_qemu(sleeper: Process) -> None:
    (sleeper.run / "qemu.log").write_text("cannot allocate memory\n")
    sleeper.stop()
    with pytest.raises(LabError, match=r"QEMU ended(.|\n)*cannot allocate memory"):
        sleeper.wait_console("kvmi-lab: ready", 60)


def test_console_wait_ends_when_the_box_gives_up(sleeper: Process) -> None:
    (sleeper.run / "console.log").write_text("kvmi-lab: failed: cannot load kvm.ko\n")
    with pytest.raises(LabError, match=r"cannot load kvm\.ko"):
        sleeper.wait_console("kvmi-lab: ready", 60)


def test_silent_monitor_is_given_up(sleeper: Process) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(sleeper.run / "qmp.sock"))
        listener.listen()
        with pytest.raises(LabError, match=r"no answer within 0\.2 s"):
            sleeper.ask(lambda qmp: qmp.execute("query-status"), 0.2)


def test_missing_monitor_is_an_error(sleeper: Process) -> None:
    with pytest.raises(LabError, match=r"qmp\.sock"):
        sleeper.ask(lambda qmp: qmp.execute("query-status"), 5)


def test_qemu_that_refuses_to_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="no such machine"):
        Process.start(tmp_path, ["/bin/sh", "-c", "echo no such machine >&2; exit 1", "qemu"]).wait_console("ready", 60)


def test_box_reaches_nothing_and_is_reached_on_loopback_only() -> None:
    argv = " ".join(command(Path("disk"), Path("kernel"), Path("initrd"), 2, 2048))
    assert "restrict=on,hostfwd=tcp:127.0.0.1:0-:22" in argv


def test_disk_is_never_written() -> None:
    argv = " ".join(command(Path("disk"), Path("kernel"), Path("initrd"), 2, 2048))
    assert "readonly=on,file=disk" in argv
