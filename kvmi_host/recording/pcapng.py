# SPDX-License-Identifier: LGPL-2.1-or-later
"""The few blocks of the pcapng capture format that a recording is made of (draft-ietf-opsawg-pcapng).

A block is ``u32 type; u32 length; body; u32 length``, padded to 4 bytes, so a file that was cut off is good up to its
last whole block. Ours are a section header, one interface, and then one packet a block. The interface has the link
type of "upper layer PDUs": a packet begins with the name of what dissects it, as tags of u16 type and u16 length (big
endian), so that Wireshark needs to be told nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import IO, NamedTuple

from kvmi_host.recording.errors import BadRecording, EndsEarly

FIRST_BYTE = b"\n"
"""Of every pcapng file."""

MAX_BLOCK = 1 << 17
"""More than any block of ours; a larger one is not read."""

INBOUND, OUTBOUND = 1, 2
"""Directions, as the flags of a packet hold them."""

_SECTION, _INTERFACE, _PACKET = 0x0A0D0D0A, 1, 6
_BYTE_ORDER = 0x1A2B3C4D
_UPPER_PDU = 252  # LINKTYPE_WIRESHARK_UPPER_PDU
_NANOSECONDS = 9  # if_tsresol: a power of ten
_TAG_DISSECTOR, _TAG_END = 12, 0  # EXP_PDU_TAG_DISSECTOR_NAME, EXP_PDU_TAG_END_OF_OPT
_HEAD_BLOCKS = 2  # a section and its interface
# Options: what they are in the block that has them.
_END_OF_OPTIONS, _SECTION_APPLICATION, _INTERFACE_NAME, _INTERFACE_RESOLUTION, _PACKET_FLAGS = 0, 4, 2, 9, 2

_BLOCK = Struct("<II")
_LENGTH = Struct("<I")
_SECTION_BODY = Struct("<IHHq")
_INTERFACE_BODY = Struct("<HHI")
_PACKET_BODY = Struct("<5I")
_PACKET_HEAD = Struct("<7I")
_OPTION = Struct("<HH")
_FLAGS_AND_END = Struct("<HHIHHI")
_TAG = Struct(">HH")


class Packet(NamedTuple):
    """``time_ns`` is since the epoch; ``direction`` INBOUND, OUTBOUND, or 0 for what has none."""

    time_ns: int
    direction: int
    dissector: str
    payload: bytes


def file_head(application: str, interface: str) -> bytes:
    """What a file begins with: who wrote it, and where its packets were seen."""
    section = _SECTION_BODY.pack(_BYTE_ORDER, 1, 0, -1) + _options((_SECTION_APPLICATION, application.encode()))
    options = _options((_INTERFACE_NAME, interface.encode()), (_INTERFACE_RESOLUTION, bytes([_NANOSECONDS])))
    return _block(_SECTION, section) + _block(_INTERFACE, _INTERFACE_BODY.pack(_UPPER_PDU, 0, 0) + options)


def dissected_by(name: str) -> bytes:
    """What a packet's data begins with, to be dissected by the dissector of this name."""
    return _TAG.pack(_TAG_DISSECTOR, len(_padded(name.encode()))) + _padded(name.encode()) + _TAG.pack(_TAG_END, 0)


def packet(time_ns: int, direction: int, tags: bytes, payload: bytes) -> bytes:
    """A packet's block, for the only interface. `tags` is what :func:`dissected_by` made."""
    size = len(tags) + len(payload)
    padding = -size % 4
    length = _PACKET_HEAD.size + size + padding + _FLAGS_AND_END.size
    head = _PACKET_HEAD.pack(_PACKET, length, 0, time_ns >> 32, time_ns & 0xFFFFFFFF, size, size)
    tail = _FLAGS_AND_END.pack(_PACKET_FLAGS, 4, direction, _END_OF_OPTIONS, 0, length)
    return b"".join((head, tags, payload, bytes(padding), tail))


def read_packets(stream: IO[bytes]) -> Iterator[Packet]:
    """The packets of a file, one block in memory at a time. Blocks that other programs add are skipped.

    :raise EndsEarly: it ends in the middle of a block.
    :raise BadRecording: it is no such file, or is damaged.
    """
    interfaces = 0
    for kind, body, at in _read_blocks(stream):
        try:
            if kind == _SECTION:
                interfaces = 0
            elif kind == _INTERFACE:
                _check_interface(body)
                interfaces += 1
            elif kind == _PACKET:
                yield _decode_packet(body, interfaces)
        except (ValueError, IndexError) as error:
            raise BadRecording(f"no recording of ours, or damaged at byte {at}: {error}") from None


def _read_blocks(stream: IO[bytes]) -> Iterator[tuple[int, bytes, int]]:
    """Type and body of each block, and where in the file it begins."""
    at = 0
    blocks = 0
    while head := stream.read(_BLOCK.size):
        if blocks == 0 and not _LENGTH.pack(_SECTION).startswith(head[: _LENGTH.size]):
            raise BadRecording("this is no recording: a pcapng file begins with the bytes 0a 0d 0d 0a")
        if len(head) < _BLOCK.size:
            raise _cut_off(blocks, at, len(head))
        kind, length = _BLOCK.unpack(head)
        if length % 4 or not _BLOCK.size + _LENGTH.size <= length <= MAX_BLOCK:
            raise BadRecording(f"damaged at byte {at}: a block of {length} bytes is none that a recording has")
        body = stream.read(length - _BLOCK.size)
        if len(body) < length - _BLOCK.size:
            raise _cut_off(blocks, at, len(head) + len(body), length)
        if body[-_LENGTH.size :] != _LENGTH.pack(length):
            raise BadRecording(f"damaged at byte {at}: the block's two lengths differ")
        if kind == _SECTION and body[: _LENGTH.size] != _LENGTH.pack(_BYTE_ORDER):
            raise BadRecording(f"no recording of ours: the byte order of the section at byte {at} is another")
        yield kind, body[: -_LENGTH.size], at
        at += length
        blocks += 1


def _cut_off(blocks: int, at: int, have: int, length: int | None = None) -> EndsEarly:
    what = "in the middle of a message" if blocks >= _HEAD_BLOCKS else "before its first message"
    of = f" of {length}" if length else ""
    return EndsEarly(f"the recording ends {what}: {have} bytes{of} are there, from byte {at} on")


def _check_interface(body: bytes) -> None:
    _require(body, _INTERFACE_BODY.size)
    link, _, _ = _INTERFACE_BODY.unpack_from(body)
    resolution = _read_options(body[_INTERFACE_BODY.size :]).get(_INTERFACE_RESOLUTION, b"\6")[0]
    if (link, resolution) != (_UPPER_PDU, _NANOSECONDS):
        raise ValueError(f"an interface of link type {link} and time resolution {resolution}")


def _decode_packet(body: bytes, interfaces: int) -> Packet:
    _require(body, _PACKET_BODY.size)
    interface, high, low, size, _ = _PACKET_BODY.unpack_from(body)
    if interface >= interfaces:
        raise ValueError(f"a packet of interface {interface}, and there are {interfaces}")
    end = _PACKET_BODY.size + size
    _require(body, end)
    dissector, payload_at = _read_tags(body[:end], _PACKET_BODY.size)
    flags = int.from_bytes(_read_options(body[end + -size % 4 :]).get(_PACKET_FLAGS, b""), "little")
    return Packet(high << 32 | low, flags & 3, dissector, body[payload_at:end])


def _read_tags(data: bytes, at: int) -> tuple[str, int]:
    """The name of the dissector, and where the packet proper begins."""
    name = ""
    while True:
        _require(data, at + _TAG.size)
        tag, length = _TAG.unpack_from(data, at)
        at += _TAG.size
        if tag == _TAG_END:
            return name, at
        _require(data, at + length)
        if tag == _TAG_DISSECTOR:
            name = data[at : at + length].rstrip(b"\0").decode()
        at += length


def _options(*options: tuple[int, bytes]) -> bytes:
    coded = [_OPTION.pack(code, len(value)) + _padded(value) for code, value in options]
    return b"".join(coded) + _OPTION.pack(_END_OF_OPTIONS, 0)


def _read_options(data: bytes) -> dict[int, bytes]:
    options: dict[int, bytes] = {}
    at = 0
    while at < len(data):
        _require(data, at + _OPTION.size)
        code, length = _OPTION.unpack_from(data, at)
        if code == _END_OF_OPTIONS:
            break
        at += _OPTION.size
        _require(data, at + length)
        options[code] = data[at : at + length]
        at += length + -length % 4
    return options


def _block(kind: int, body: bytes) -> bytes:
    length = _BLOCK.size + len(body) + _LENGTH.size
    return _BLOCK.pack(kind, length) + body + _LENGTH.pack(length)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _require(data: bytes, size: int) -> None:
    if len(data) < size:
        raise ValueError("what it holds goes beyond its end")
