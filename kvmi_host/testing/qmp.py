# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's monitor, as far as live tests need it: one command at a time, events passed over."""

from __future__ import annotations

import json
import socket


class MonitorError(AssertionError):
    """QEMU refused a command, or has ended."""


class Monitor:
    """QMP on a connected stream socket."""

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        """
        :param timeout: the deadline of one command in seconds.
        """
        sock.settimeout(timeout)
        self._sock = sock
        self._lines = sock.makefile("r", encoding="utf-8")
        self._ready = False

    def close(self) -> None:
        """Close the socket. May be called again."""
        self._lines.close()
        self._sock.close()

    def command(self, name: str, **arguments: object) -> object:
        """What QEMU returns for a command.

        :param arguments: with underscores for the hyphens of QMP's names.
        :raise MonitorError: an error is what it returns.
        """
        if not self._ready:
            self._ready = True
            self.command("qmp_capabilities")
        wanted = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._sock.sendall(json.dumps({"execute": name, "arguments": wanted}).encode() + b"\n")
        for line in self._lines:
            answer = json.loads(line)
            if "error" in answer:
                raise MonitorError(f"{name}: {answer['error']['desc']}")
            if "return" in answer:
                result: object = answer["return"]
                return result
        raise MonitorError(f"{name}: QEMU has ended")
