# SPDX-License-Identifier: LGPL-2.1-or-later
"""The exchange before a session: QEMU (or who attaches in its place) says which VM it is, the introspector shows that
it knows the shared secret.

Both structs start with their own size, ``u32 struct_size``; either side may be older or newer than the other: what is
longer than known is skipped, what is missing is absent. Nothing may be read beyond a struct: KVM speaks next.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from uuid import UUID

from kvmi_host.protocol.errors import HandshakeError

SIZE = Struct("<I")
MAX_STRUCT = 4096
"""More than any version of either struct: a larger ``struct_size`` is garbage."""

_HELLO = Struct("<I16s4xq64s")
_ANSWER = Struct("<I20s")
_NO_COOKIE = bytes(20)


@dataclass(frozen=True, slots=True)
class Hello:
    """What the VM's side says. ``start_time``: seconds since the epoch; None where an older peer left a field out."""

    uuid: UUID
    start_time: int | None = None
    name: str | None = None


def struct_length(size_field: bytes) -> int:
    """The length in bytes of the struct that starts with these four, themselves included.

    :raise HandshakeError: it cannot be the size of such a struct.
    """
    length: int = SIZE.unpack(size_field)[0]
    if not SIZE.size <= length <= MAX_STRUCT:
        raise HandshakeError(f"handshake: a struct of {length} bytes; this peer does not speak the protocol")
    return length


def encode_hello(hello: Hello) -> bytes:
    """96 bytes. A name longer than 63 bytes of UTF-8 is cut, so that it ends in a zero as C programs expect."""
    name = (hello.name or "").encode()[:63]
    return _HELLO.pack(_HELLO.size, hello.uuid.bytes, hello.start_time or 0, name)


def decode_hello(data: bytes) -> Hello:
    """The VM's side of the handshake, from a whole struct as :func:`struct_length` measured it.

    :raise HandshakeError: it ends before the uuid does.
    """
    if len(data) < 20:
        raise HandshakeError(f"handshake: {len(data)} bytes end before the field 'uuid'")
    start_time = int.from_bytes(data[24:32], "little", signed=True) if len(data) >= 32 else None
    name = data[32:96].split(b"\0", 1)[0].decode(errors="replace") if len(data) > 32 else None
    return Hello(UUID(bytes=data[4:20]), start_time, name)


def encode_answer(cookie: bytes | None) -> bytes:
    """The introspector's side, 24 bytes: the SHA-1 of the shared secret, or zeros where none is set."""
    return _ANSWER.pack(_ANSWER.size, _digest(cookie))


def check_answer(data: bytes, cookie: bytes | None) -> None:
    """Does the introspector know the secret? Compared in constant time.

    :raise HandshakeError: it does not, or it sent none.
    """
    if len(data) < _ANSWER.size:
        raise HandshakeError(f"handshake: {len(data)} bytes end before the field 'cookie_hash'")
    from hmac import compare_digest  # here, as hashlib below: they load OpenSSL, which most sessions never need

    if not compare_digest(data[4:24], _digest(cookie)):
        raise HandshakeError("handshake: wrong cookie: the introspector and this side have different secrets")


def _digest(cookie: bytes | None) -> bytes:
    if cookie is None:
        return _NO_COOKIE
    from hashlib import sha1

    return sha1(cookie, usedforsecurity=False).digest()
