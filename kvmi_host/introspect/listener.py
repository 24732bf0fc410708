# SPDX-License-Identifier: LGPL-2.1-or-later
"""A UNIX socket on which VMs announce themselves: KVM-VMI's QEMU, or ``kvmi-host attach --to``."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Collection
from pathlib import Path
from struct import Struct
from types import TracebackType
from typing import Self

from kvmi_host.introspect.errors import SessionError, SessionTimeout
from kvmi_host.introspect.greeting import greet
from kvmi_host.introspect.session import PeerInfo, Session
from kvmi_host.protocol import HandshakeError

_UCRED = Struct("=iII")  # struct ucred: pid, uid, gid


class Listener:
    """Listens on a UNIX socket of mode 0600, and accepts sessions whose handshake is done."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        cookie: bytes | None = None,
        handshake_timeout: float = 10.0,
        users: Collection[int] | None = None,
    ) -> None:
        """
        :param path: in a directory that only its owner (this user or root) can write to. A socket left there by a
            listener that is gone is replaced.
        :param cookie: the secret shared with the VMs' side.
        :param handshake_timeout: seconds a peer has to say which VM it is.
        :param users: user ids that may connect; root and this user by default.
        :raise SessionError: the directory is open to others, or someone listens there already.
        """
        self.path = Path(path)
        self._cookie = cookie
        self._handshake_timeout = handshake_timeout
        self._users = users
        self._sock = listen_at(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and remove the socket. Sessions go on. May be called again."""
        if self._sock.fileno() >= 0:
            self._sock.close()
            self.path.unlink(missing_ok=True)

    def accept(self, timeout: float | None = None) -> Session:
        """The next VM's session.

        :param timeout: seconds to wait for someone to connect; None waits for ever.
        :raise SessionTimeout: nobody connected.
        :raise HandshakeError: someone did, and was dropped: silent, no such protocol, or a user who may not. The
            listener goes on.
        """
        self._sock.settimeout(timeout)
        try:
            sock, _ = self._sock.accept()
        except TimeoutError:
            raise SessionTimeout(f"{self.path}: no VM announced itself in {timeout} s") from None
        try:
            check_user(sock, self._users)
            hello = greet(sock, self._cookie, self._handshake_timeout)
        except BaseException:
            sock.close()
            raise
        return Session(sock, peer=PeerInfo(hello.uuid, hello.name, hello.start_time))


def listen_at(path: Path) -> socket.socket:
    """A UNIX socket of mode 0600 that listens. Its file stays when it is closed.

    :raise SessionError: see :class:`Listener`.
    """
    _check_directory(path.parent)
    _remove_leftover(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    os.fchmod(sock.fileno(), 0o600)  # before bind: there is no moment in which others could connect
    try:
        sock.bind(os.fspath(path))
    except OSError as error:
        sock.close()
        raise SessionError(f"{path}: {error.strerror}") from error
    sock.listen()
    return sock


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """The process and the user at the other end of a UNIX socket."""
    process, user, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return process, user


def check_user(sock: socket.socket, users: Collection[int] | None) -> None:
    """May the user at the other end of a UNIX socket connect?

    :param users: user ids that may; None: root and this user.
    :raise HandshakeError: no.
    """
    _, user = peer_of(sock)
    if user not in ({0, os.geteuid()} if users is None else users):
        raise HandshakeError(f"handshake: user {user} may not connect here")


def _check_directory(directory: Path) -> None:
    try:
        status = directory.stat()
    except OSError as error:
        raise SessionError(f"{directory}: {error.strerror}") from error
    if status.st_uid not in {0, os.geteuid()} or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise SessionError(f"{directory}: others can write to it: use a directory of mode 0755 or 0700 that is yours")


def _remove_leftover(path: Path) -> None:
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        refused = probe.connect_ex(os.fspath(path)) == errno.ECONNREFUSED
    if not refused:
        raise SessionError(f"{path}: someone listens there already")
    path.unlink()
