# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's monitor: where it is, what it says, and what happens when it is busy."""

import json
import os
import socket
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from kvmi_host.attach import MonitorRefused, MonitorUnreachable, Target
from kvmi_host.attach.monitor import LibvirtMonitor, open_monitor
from kvmi_host.attach.monitor_address import monitor_sockets
from kvmi_host.attach.qmp import QmpMonitor
from kvmi_host.testing.qemu import SimulatedQemu


@pytest.mark.parametrize(
    ("words", "paths"),
    [
        (["-qmp", "unix:/run/q.sock,server=on,wait=off"], ["/run/q.sock"]),
        (["--qmp", "unix:/run/q.sock,server,nowait"], ["/run/q.sock"]),
        (["-qmp-pretty", "unix:/run/q.sock,server=yes"], ["/run/q.sock"]),
        (["-qmp", "unix:q.sock,server=on"], ["/proc/9/cwd/q.sock"]),
        (["-qmp", "unix:/run/a,,b.sock,server=on"], ["/run/a,b.sock"]),
        (["-chardev", "socket,id=m,path=/run/q.sock,server=on", "-mon", "chardev=m,mode=control"], ["/run/q.sock"]),
        (["-mon", "m,mode=control", "-chardev", "socket,path=/run/q.sock,server=on,id=m"], ["/run/q.sock"]),
        (["-qmp", "unix:/1,server=on", "-qmp", "unix:/2,server=on"], ["/1", "/2"]),
        # not QMP, not a server, nowhere to connect to
        (["-chardev", "socket,id=m,path=/run/q.sock,server=on", "-mon", "chardev=m,mode=readline"], []),
        (["-chardev", "socket,id=m,path=/run/q.sock,server=on"], []),
        (["-qmp", "unix:/run/q.sock"], []),
        (["-qmp", "unix:/run/q.sock,server=off"], []),
        (["-qmp", "unix:q,server=on,abstract=on"], []),
        (["-qmp", "tcp:127.0.0.1:4444,server=on"], []),
        (["-chardev", "socket,id=m,fd=31,server=on", "-mon", "chardev=m,mode=control"], []),
        (["-mon", "chardev=none,mode=control"], []),
        (["-qmp"], []),
        (["-qmp", ""], []),
        ([], []),
    ],
)
def test_a_monitors_socket_is_found_on_qemus_command_line(words, paths):
    assert monitor_sockets(9, ["qemu-system-x86_64", *words, ""]) == paths


@pytest.fixture
def qemu(tmp_path):
    with SimulatedQemu(os.fspath(tmp_path / "qmp.sock")) as simulated:
        yield simulated


@pytest.fixture
def monitor(qemu):
    monitor = QmpMonitor(qemu.path)
    yield monitor
    monitor.close()


def test_a_command_returns_what_qemu_returns(monitor):
    assert monitor.execute("query-status")["status"] == "running"


def test_an_error_has_qemus_words_and_class(monitor):
    with pytest.raises(MonitorRefused, match="QEMU refuses nonsense: The command nonsense") as refused:
        monitor.execute("nonsense")
    assert refused.value.kind == "CommandNotFound"


def test_after_an_error_the_monitor_goes_on(monitor):
    with pytest.raises(MonitorRefused):
        monitor.execute("nonsense")
    assert monitor.execute("query-status")["running"]


def test_one_that_serves_someone_else_is_given_up(qemu, monitor):
    with pytest.raises(MonitorUnreachable, match="one client at a time"):
        QmpMonitor(qemu.path, timeout=0.1)
    assert monitor.execute("query-status")["running"]


def test_one_that_was_left_serves_the_next(qemu):
    for _ in range(3):
        QmpMonitor(qemu.path).close()


def test_one_that_is_not_there_is_told_apart(tmp_path):
    with pytest.raises(MonitorUnreachable, match="No such file"):
        QmpMonitor(os.fspath(tmp_path / "none.sock"))


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n", b"{}\n", b"[1]\n", b"\xff\n"])
def test_one_that_does_not_speak_qmp_is_told_apart(tmp_path, greeting, capfd):
    path = os.fspath(tmp_path / "other.sock")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.connect(path)
            served, _ = listening.accept()
            served.close()
        with pytest.raises(MonitorUnreachable), greeted(listening, greeting):
            QmpMonitor(path, timeout=5)
    assert capfd.readouterr().err == ""


@contextmanager
def greeted(listening, greeting):
    """Says this to the first who connects, and hangs up."""

    def greet():
        sock, _ = listening.accept()
        with sock:
            sock.sendall(greeting)

    thread = threading.Thread(target=greet)
    thread.start()
    try:
        yield
    finally:
        thread.join(10)


def test_a_process_without_one_says_to_use_its_libvirt_name():
    with pytest.raises(MonitorUnreachable, match="libvirt name"), open_monitor(Target(os.getpid(), "x", None, 0)):
        pass


@pytest.fixture
def domain(monkeypatch):
    """A libvirt domain whose QEMU answers what ``answer`` holds."""
    libvirt_qemu = pytest.importorskip("libvirt_qemu")
    domain = SimpleNamespace(name=lambda: "webserver", asked=[], answer={"return": {}})

    def command(asked, text, flags):
        assert (asked, flags) == (domain, 0)
        domain.asked.append(json.loads(text))
        return json.dumps(domain.answer)

    monkeypatch.setattr(libvirt_qemu, "qemuMonitorCommand", command)
    return domain


def test_an_error_cannot_steer_the_terminal():
    assert "\x1b" not in str(MonitorRefused("x", "GenericError", "\x1b[2J"))


def test_libvirt_passes_a_command_on(domain):
    domain.answer = {"return": {"status": "running"}, "id": "libvirt-9"}
    assert LibvirtMonitor(domain).execute("query-x", {"a": 1}) == {"status": "running"}
    assert domain.asked == [{"execute": "query-x", "arguments": {"a": 1}}]


def test_an_error_behind_libvirt_has_qemus_words_and_class(domain):
    domain.answer = {"error": {"class": "GenericError", "desc": "object 'x' not found"}}
    with pytest.raises(MonitorRefused, match="object 'x' not found"):
        LibvirtMonitor(domain).execute("object-del", {"id": "x"})
