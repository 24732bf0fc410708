# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the agent tells systemd, and what it is passed by it."""

import logging
import os
import re
import socket
import subprocess
import sys

import pytest

from kvmi_host.agent import systemd


@pytest.fixture
def supervisor(tmp_path, monkeypatch):
    """The socket on which systemd listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(os.fspath(tmp_path / "notify"))
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", os.fspath(tmp_path / "notify"))
        yield sock


def test_systemd_is_told(supervisor):
    systemd.notify("READY=1", "STATUS=5 VMs")
    assert supervisor.recv(100) == b"READY=1\nSTATUS=5 VMs"


def test_an_abstract_socket_is_meant_by_an_at_sign(monkeypatch):
    name = f"kvmi-host-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}")
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        systemd.notify("READY=1")
        assert sock.recv(100) == b"READY=1"


def test_a_reload_is_told_with_its_time(supervisor):
    systemd.notify_reloading()
    assert re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=\d+", supervisor.recv(100))


def test_nobody_is_told_where_there_is_no_systemd(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    systemd.notify("READY=1")


def test_a_systemd_that_is_gone_is_a_warning(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("NOTIFY_SOCKET", os.fspath(tmp_path / "gone"))
    with caplog.at_level(logging.WARNING):
        systemd.notify("READY=1")
    assert "cannot be told READY=1: No such file" in caplog.text


@pytest.mark.parametrize(
    ("pid", "microseconds", "interval"),
    [
        (None, "30000000", 15.0),
        pytest.param(str(os.getpid()), "30000000", 15.0, id="us"),
        ("1", "30000000", None),
        (None, None, None),
        (None, "0", None),
        (None, "soon", None),
    ],
)
def test_the_watchdog_is_fed_at_half_its_time(monkeypatch, pid, microseconds, interval):
    for name, value in (("WATCHDOG_PID", pid), ("WATCHDOG_USEC", microseconds)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    assert systemd.watchdog_interval() == interval


def pass_to_a_child(sock, count="1"):
    """What a process makes of a socket that it is passed as descriptor 3."""
    source = (
        f"import os; os.dup2({sock.fileno()}, 3); os.environ['LISTEN_PID'] = str(os.getpid())\n"
        "from kvmi_host.agent import systemd\n"
        "sock = systemd.passed_socket(); print(sock.getsockname(), os.get_inheritable(3))"
    )
    return subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, "LISTEN_FDS": count},
        pass_fds=[sock.fileno()],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_the_socket_of_a_socket_unit_is_taken(tmp_path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.fspath(tmp_path / "agent.sock"))
        sock.listen()
        child = pass_to_a_child(sock)
    assert child.stdout == f"{tmp_path}/agent.sock False\n"


def test_a_socket_that_does_not_listen_is_refused():
    with socket.socket(socket.AF_UNIX) as sock:
        child = pass_to_a_child(sock)
    assert "ConfigError: the socket that systemd passes is no UNIX stream socket that listens" in child.stderr


def test_more_than_one_socket_is_refused():
    with socket.socket(socket.AF_UNIX) as sock:
        child = pass_to_a_child(sock, "2")
    assert "LISTEN_FDS=2: one socket is wanted" in child.stderr


def test_a_socket_that_is_passed_to_someone_else_is_left_alone(monkeypatch):
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert systemd.passed_socket() is None
