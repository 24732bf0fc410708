# SPDX-License-Identifier: LGPL-2.1-or-later
"""The handshake over a socket, from either side. Reads exactly the structs: KVM speaks right behind them."""

from __future__ import annotations

import socket
from time import monotonic

from kvmi_host.protocol import HandshakeError, Hello, handshake


def greet(sock: socket.socket, cookie: bytes | None, timeout: float) -> Hello:
    """The introspector's side: hear which VM it is, then show that we know the secret.

    :param cookie: the shared secret; None where none is set.
    :param timeout: seconds for the whole exchange.
    :raise HandshakeError: the peer is silent, gone, or does not speak the protocol.
    """
    deadline = monotonic() + timeout
    hello = handshake.decode_hello(_read_struct(sock, deadline))
    _send(sock, handshake.encode_answer(cookie), deadline)
    return hello


def introduce(sock: socket.socket, hello: Hello, cookie: bytes | None, timeout: float) -> None:
    """QEMU's side: say which VM it is, then check that the introspector knows the secret.

    :param timeout: seconds for the whole exchange.
    :raise HandshakeError: the introspector is silent, gone, or has another secret.
    """
    deadline = monotonic() + timeout
    _send(sock, handshake.encode_hello(hello), deadline)
    handshake.check_answer(_read_struct(sock, deadline), cookie)


def _read_struct(sock: socket.socket, deadline: float) -> bytes:
    size_field = _read(sock, handshake.SIZE.size, deadline)
    return size_field + _read(sock, handshake.struct_length(size_field) - len(size_field), deadline)


def _read(sock: socket.socket, count: int, deadline: float) -> bytes:
    data = b""
    while len(data) < count:
        try:
            sock.settimeout(max(deadline - monotonic(), 1e-6))
            more = sock.recv(count - len(data))
        except TimeoutError:
            raise HandshakeError("handshake: the peer connected and did not say enough in time") from None
        except OSError as error:
            raise HandshakeError(f"handshake: the connection is lost: {error.strerror}") from error
        if not more:
            raise HandshakeError("handshake: the peer hung up before it had said enough")
        data += more
    return data


def _send(sock: socket.socket, data: bytes, deadline: float) -> None:
    try:
        sock.settimeout(max(deadline - monotonic(), 1e-6))
        sock.sendall(data)
    except OSError as error:
        raise HandshakeError(f"handshake: the peer does not take our side of it: {error}") from error
