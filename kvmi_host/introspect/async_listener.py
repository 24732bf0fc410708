# SPDX-License-Identifier: LGPL-2.1-or-later
"""The asyncio twin of :class:`~kvmi_host.introspect.Listener`: any number of VMs announce themselves at once, and one
that is silent holds up nobody."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import TypeVar

from kvmi_host.introspect.listener import check_user
from kvmi_host.introspect.session import PeerInfo
from kvmi_host.protocol import HandshakeError, Hello, handshake

MAX_PENDING = 256
"""Handshakes at a time; whoever has taken longest goes when one more comes."""

T = TypeVar("T")

_RETRY_SECONDS = 1.0
_NO_MORE_SOCKETS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Admission:
    """Who may announce themselves, and how.

    :ivar cookie: the secret shared with the VMs' side; None where none is set.
    :ivar users: user ids that may connect; None: root and this user.
    :ivar timeout: seconds a peer has to say which VM it is, and again to take our answer.
    """

    cookie: bytes | None = None
    users: Collection[int] | None = None
    timeout: float = 10.0


class AsyncListener:
    """Accepts VMs on a listening UNIX socket.

    :ivar admission: may be changed at any time; the next one to connect is treated by it.
    """

    def __init__(
        self,
        listening: socket.socket,
        admission: Admission,
        *,
        make_room: Callable[[PeerInfo], Awaitable[None]],
        admit: Callable[[socket.socket, PeerInfo], None],
        refused: Callable[[HandshakeError], None],
    ) -> None:
        """
        :param listening: as :func:`~kvmi_host.introspect.listener.listen_at` makes it, or who started us. It stays its
            owner's.
        :param make_room: called when a VM has said which it is, before it is answered: what it awaits, the VM's side
            waits for, and only then does KVM get the socket.
        :param admit: called with the socket of a VM whose handshake is done, which it owns from then on.
        :param refused: called with why someone was dropped.
        """
        self.admission = admission
        self._listening = listening
        self._make_room = make_room
        self._admit = admit
        self._refused = refused
        self._pending: dict[asyncio.Task[None], None] = {}

    async def serve(self) -> None:
        """Accept until cancelled; then drop those whose handshake is not done."""
        loop = asyncio.get_running_loop()
        self._listening.setblocking(False)
        try:
            while True:
                try:
                    sock, _ = await loop.sock_accept(self._listening)
                except OSError as error:
                    if error.errno not in _NO_MORE_SOCKETS:
                        raise
                    _log.error("no VM can connect: %s; trying again in %g s", error.strerror, _RETRY_SECONDS)
                    await asyncio.sleep(_RETRY_SECONDS)
                    continue
                if len(self._pending) >= MAX_PENDING:
                    next(iter(self._pending)).cancel()
                    self._refused(HandshakeError(f"handshake: {MAX_PENDING} at a time: who took longest was dropped"))
                task = loop.create_task(self._welcome(sock))
                self._pending[task] = None
                task.add_done_callback(self._pending.pop)
        finally:
            for task in self._pending:
                task.cancel()

    async def _welcome(self, sock: socket.socket) -> None:
        try:
            admission = self.admission
            check_user(sock, admission.users)
            hello = await _in_time(hear(sock), admission.timeout)
            peer = PeerInfo(hello.uuid, hello.name, hello.start_time)
            await self._make_room(peer)
            await _in_time(answer(sock, admission.cookie), admission.timeout)
        except HandshakeError as error:
            sock.close()
            self._refused(error)
        except BaseException:
            sock.close()
            raise
        else:
            self._admit(sock, peer)


async def hear(sock: socket.socket) -> Hello:
    """Which VM it is. Reads no more than it says of that: KVM speaks next.

    :param sock: which does not block.
    :raise HandshakeError: the peer is gone, or does not speak the protocol.
    """
    size_field = await _read(sock, handshake.SIZE.size)
    return handshake.decode_hello(size_field + await _read(sock, handshake.struct_length(size_field) - len(size_field)))


async def answer(sock: socket.socket, cookie: bytes | None) -> None:
    """Show that we know the secret.

    :raise HandshakeError: the peer is gone.
    """
    try:
        await asyncio.get_running_loop().sock_sendall(sock, handshake.encode_answer(cookie))
    except OSError as error:
        raise HandshakeError(f"handshake: the peer does not take our side of it: {error.strerror}") from error


async def _read(sock: socket.socket, count: int) -> bytes:
    loop, data = asyncio.get_running_loop(), b""
    while len(data) < count:
        try:
            more = await loop.sock_recv(sock, count - len(data))
        except OSError as error:
            raise HandshakeError(f"handshake: the connection is lost: {error.strerror}") from error
        if not more:
            raise HandshakeError("handshake: the peer hung up before it had said enough")
        data += more
    return data


async def _in_time(awaitable: Awaitable[T], seconds: float) -> T:
    try:
        async with asyncio.timeout(seconds):
            return await awaitable
    except TimeoutError:
        raise HandshakeError("handshake: the peer connected and did not say enough in time") from None
