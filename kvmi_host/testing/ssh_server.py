# SPDX-License-Identifier: LGPL-2.1-or-later
"""An SSH server on this machine, for tests: whose key it has and whom it lets in is theirs to say."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Callable, Container
from contextlib import suppress
from types import TracebackType
from typing import IO, Self

import paramiko


class SshServer:
    """Listens on a free port of 127.0.0.1, runs commands with /bin/sh as this user, and leads on to other ports.

    The commands ``hang`` and ``hang up`` do what they say.

    :param key: the server's own.
    :param authorized: the public keys, as base64, that are let in; None: everyone's.
    :ivar port: where it listens.
    :ivar asked_for: where clients wanted to be led to.
    """

    def __init__(self, key: paramiko.PKey, authorized: Container[str] | None = None) -> None:
        self.asked_for: list[tuple[str, int]] = []
        self._key = key
        self._authorized = authorized
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._transports: list[paramiko.Transport] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every connection, and take no more. May be called again."""
        with suppress(OSError):  # it was shut down before
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()

    def drop(self) -> None:
        """End every connection."""
        for transport in self._transports:
            transport.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            transport = paramiko.Transport(connection)
            transport.add_server_key(self._key)
            self._transports.append(transport)
            transport.start_server(event=threading.Event(), server=_Rules(self, transport))

    def lets_in(self, key: paramiko.PKey) -> bool:
        """Whether it takes a client's key."""
        return self._authorized is None or key.get_base64() in self._authorized


class _Rules(paramiko.ServerInterface):
    """What the server lets a client do."""

    def __init__(self, server: SshServer, transport: paramiko.Transport) -> None:
        self._server = server
        self._transport = transport

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return paramiko.common.AUTH_SUCCESSFUL if self._server.lets_in(key) else paramiko.common.AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.common.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Thread(target=self._serve, args=(channel, command.decode()), daemon=True).start()
        return True

    def check_channel_direct_tcpip_request(
        self, chanid: int, origin: tuple[str, int], destination: tuple[str, int]
    ) -> int:
        self._server.asked_for.append(destination)
        try:
            onward = socket.create_connection(destination)
        except OSError:
            return paramiko.common.OPEN_FAILED_CONNECT_FAILED
        threading.Thread(target=self._lead, args=(onward,), daemon=True).start()
        return paramiko.common.OPEN_SUCCEEDED

    def _serve(self, channel: paramiko.Channel, command: str) -> None:
        if command == "hang up":
            self._transport.close()
            return
        if command == "hang":
            return
        # To the end, which the client sends when it knows that the command was accepted.
        stdin = channel.makefile("rb").read()
        pipe = subprocess.PIPE
        with subprocess.Popen(["/bin/sh", "-c", command], stdin=pipe, stdout=pipe, stderr=pipe) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            streams = ((process.stdout, channel.sendall), (process.stderr, channel.sendall_stderr))
            passing = [threading.Thread(target=_pass_output, args=stream) for stream in streams]
            for thread in passing:
                thread.start()
            with suppress(BrokenPipeError):  # it need not read
                process.stdin.write(stdin)
                process.stdin.close()
            for thread in passing:
                thread.join()
        with suppress(OSError, EOFError):  # the client may have gone
            channel.send_exit_status(process.returncode)
            channel.close()

    def _lead(self, onward: socket.socket) -> None:
        channel = self._transport.accept()
        assert channel is not None  # it was asked for
        threading.Thread(target=_pass, args=(channel, onward), daemon=True).start()
        _pass(onward, channel)


def _pass_output(source: IO[bytes], send: Callable[[bytes], object]) -> None:
    """Pass on what a program writes, as it comes; one whose reader has gone has its pipe closed."""
    with source, suppress(OSError, EOFError):
        while piece := os.read(source.fileno(), 65536):
            send(piece)


def _pass(source: socket.socket | paramiko.Channel, to: socket.socket | paramiko.Channel) -> None:
    """Pass on what comes, until it ends."""
    with suppress(OSError, EOFError):  # the other direction has ended
        while piece := source.recv(65536):
            to.sendall(piece)
    with suppress(EOFError):  # so has the connection
        to.close()
