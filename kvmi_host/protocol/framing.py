# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages in a byte stream: an 8-byte header (id, size, seq), then `size` bytes."""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from kvmi_host.protocol.errors import ProtocolError

HEADER = Struct("<HHI")
MAX_PAYLOAD = 2 * 4096 - HEADER.size
"""The largest `size`: a message with its header fits in two pages."""

_HEADER_SIZE = HEADER.size
_unpack_header = HEADER.unpack_from
_new_tuple = tuple.__new__


class Frame(NamedTuple):
    """One message as it came: ``payload`` is what followed the header, at most 8184 bytes."""

    id: int
    seq: int
    payload: bytes


def frame(message_id: int, seq: int, payload: bytes = b"") -> bytes:
    """A message's bytes.

    :raise ValueError: the payload is larger than a message can hold.
    """
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"{len(payload)} bytes do not fit in a message, which holds {MAX_PAYLOAD}")
    return HEADER.pack(message_id, len(payload), seq) + payload


class Framer:
    """Cuts a stream into messages, whatever pieces it comes in. Holds no more than what was not taken out yet."""

    __slots__ = ("_at", "_data")

    def __init__(self) -> None:
        self._data = b""
        self._at = 0

    def feed(self, data: bytes) -> None:
        """Add what the socket gave. Take all frames out before feeding more, and the memory held stays bounded."""
        if self._data:
            data = self._data[self._at :] + data
        self._data = data
        self._at = 0

    def next_frame(self) -> Frame | None:
        """The next complete message, or None until more bytes come.

        :raise ProtocolError: the header announces more than a message can hold.
        """
        data, start = self._data, self._at + _HEADER_SIZE
        if start > len(data):
            return None
        message_id, size, seq = _unpack_header(data, self._at)
        if size > MAX_PAYLOAD:
            raise ProtocolError(f"message {message_id} announces {size} bytes, more than the {MAX_PAYLOAD} allowed")
        end = start + size
        if end < len(data):
            self._at = end
        elif end == len(data):
            self._data, self._at = b"", 0
        else:
            return None
        return _new_tuple(Frame, (message_id, seq, data[start:end]))

    def withdraw(self) -> bytes:
        """Give back what was fed and not taken out."""
        data, self._data, self._at = self._data[self._at :], b"", 0
        return data

    @property
    def pending(self) -> int:
        """How many bytes of an incomplete message are held."""
        return len(self._data) - self._at
