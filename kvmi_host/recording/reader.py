# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading a recording back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from kvmi_host.protocol.framing import HEADER
from kvmi_host.recording import pcapng
from kvmi_host.recording.errors import BadRecording
from kvmi_host.recording.recorder import MESSAGES, NOTES


class Message(NamedTuple):
    """A message that crossed the socket, header included, or what came where one should have been.

    ``time_ns``: when, since the epoch. ``sent``: by the introspector.
    """

    time_ns: int
    sent: bool
    data: bytes

    @property
    def whole(self) -> bool:
        """Whether it is as long as its header says."""
        return len(self.data) >= HEADER.size and len(self.data) == HEADER.size + HEADER.unpack_from(self.data)[1]


class Note(NamedTuple):
    """What was noted beside the messages: an object of ``attach --json``."""

    time_ns: int
    content: dict[str, Any]


def read_recording(stream: IO[bytes]) -> Iterator[Message | Note]:
    """What a recording holds, in its order. Nothing more than the next item is held in memory.

    :raise EndsEarly: the recording was cut off here.
    :raise BadRecording: it is no recording, or is damaged here.
    """
    for packet in pcapng.read_packets(stream):
        if packet.dissector == NOTES:
            yield Note(packet.time_ns, _note(packet.payload))
        elif packet.dissector == MESSAGES and packet.direction in (pcapng.INBOUND, pcapng.OUTBOUND):
            yield Message(packet.time_ns, packet.direction == pcapng.OUTBOUND, packet.payload)
        else:
            raise BadRecording(f"no recording of ours: a packet of {packet.dissector!r}")


def _note(payload: bytes) -> dict[str, Any]:
    try:
        content = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise BadRecording(f"damaged: a note that is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise BadRecording(f"damaged: a note that is no JSON object: {content!r:.40}")
    return content
