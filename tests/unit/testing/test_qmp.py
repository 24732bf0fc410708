# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's monitor: what is said to it, and what is heard."""

import json
import socket
from threading import Thread

import pytest

from kvmi_host.testing.qmp import Monitor, MonitorError

GREETING = {"QMP": {"version": {}, "capabilities": []}}
EVENT = {"event": "STOP", "timestamp": {}}


@pytest.fixture
def qemu():
    """Plays QEMU with these lines in answer to each command, and gives what it was sent and a monitor of it."""
    ours, theirs = socket.socketpair()
    heard = []

    def play(*answers):
        def serve():
            theirs.sendall(json.dumps(GREETING).encode() + b"\n")
            with theirs.makefile("r") as lines:
                for answer, line in zip([[{"return": {}}], *answers], lines, strict=False):
                    heard.append(json.loads(line))
                    theirs.sendall(b"".join(json.dumps(each).encode() + b"\n" for each in answer))
            theirs.close()

        Thread(target=serve, daemon=True).start()
        return heard, Monitor(ours, 5)

    yield play
    ours.close()
    theirs.close()


def test_a_command_returns_what_qemu_says(qemu):
    heard, monitor = qemu([EVENT, {"return": {"status": "running"}}])
    assert monitor.command("query-status") == {"status": "running"}
    assert [command["execute"] for command in heard] == ["qmp_capabilities", "query-status"]


def test_arguments_have_the_hyphens_of_qmp(qemu):
    heard, monitor = qemu([{"return": {}}])
    monitor.command("object-add", qom_type="memory-backend-ram", id="more")
    assert heard[1]["arguments"] == {"qom-type": "memory-backend-ram", "id": "more"}


def test_a_refusal_is_an_error(qemu):
    _, monitor = qemu([{"error": {"class": "GenericError", "desc": "no such thing"}}], [{"return": 7}])
    with pytest.raises(MonitorError, match="device_del: no such thing"):
        monitor.command("device_del", id="dimm")
    assert monitor.command("query-it") == 7


def test_the_end_of_qemu_is_an_error(qemu):
    _, monitor = qemu([])
    with pytest.raises(MonitorError, match="quit: QEMU has ended"):
        monitor.command("quit")
