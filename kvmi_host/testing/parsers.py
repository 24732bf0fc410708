# SPDX-License-Identifier: LGPL-2.1-or-later
"""What must hold whatever bytes a parser of ours is given: one check for each, from bytes to nothing or an error.

A check lets pass what the parser documents, and raises whatever else comes of the bytes. ``ci/fuzz`` looks for bytes
that make one raise; those that it kept, in ``tests/fuzz/corpus``, are tried by the unit tests.

A parser that is new gets a function here and a line in :data:`CHECKS`.
"""

from __future__ import annotations

import io
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from types import MappingProxyType

from kvmi_host.introspect.greeting import greet, introduce
from kvmi_host.introspect.paging import NotMapped, PageTables, walk
from kvmi_host.introspect.roundtrip import event_in
from kvmi_host.protocol import (
    MAX_PAYLOAD,
    Action,
    Command,
    Connection,
    Event,
    Framer,
    HandshakeError,
    Hello,
    PageFaultReply,
    ProtocolError,
    Request,
    handshake,
    messages,
)
from kvmi_host.protocol.dialects import V6, V7, Dialect
from kvmi_host.protocol.events import EVENT_SIZE, encode_reply
from kvmi_host.protocol.framing import HEADER
from kvmi_host.protocol.x86 import SREGS_SIZE, unpack_sregs
from kvmi_host.recording import BadRecording, Note, read_recording
from kvmi_host.testing.peer import SimulatedKernel

_DIALECTS = (V6, V7)
_COMPILED = event_in.__module__ != "kvmi_host.introspect.roundtrip"
_DEADLINE = 5.0
_MORE = b"\xee" * 5

_REQUESTS: tuple[Request[object], ...] = (
    messages.get_version(),
    messages.check_command(Command.GET_VERSION),
    messages.guest_info(),
    messages.vcpu_info(0),
    messages.get_registers(0, (0x10, 0xC0000080)),
    messages.cpuid(0, 1),
    messages.xsave(0),
    messages.page_access((0, 0x1000, 0x2000)),
    messages.mtrr_type(0),
    messages.read_physical(0, 16),
    messages.max_gfn(),
    messages.control_cmd_response(False, True),
    messages.control_cmd_response(False, False),
    messages.control_cmd_response(True, True),
    messages.raw(61),
)
_GROWS = frozenset({Command.GET_XSAVE, 61})
"""Answers whose bytes are the result, all of them."""


def framing(data: bytes) -> None:
    """Pieces, then a stream: no more is held than a message that is not all there."""
    framer = Framer()
    for piece in _pieces(data):
        framer.feed(piece)
        try:
            while framer.next_frame() is not None:
                pass
        except ProtocolError:
            return
        assert framer.pending < HEADER.size + MAX_PAYLOAD


def connection(data: bytes) -> None:
    """A dialect, which commands were sent, pieces, then what the kernel says: the pieces make no difference."""
    dialect = _DIALECTS[_byte(data, 0) % len(_DIALECTS)]
    asked = [_REQUESTS[byte % len(_REQUESTS)] for byte in data[2 : 2 + _byte(data, 1) % 8]]
    rest = data[2 + len(asked) :]
    stream = rest[_PIECES:]
    assert _heard(dialect, asked, _pieces(rest)) == _heard(dialect, asked, iter([stream] if stream else []))


def event(data: bytes) -> None:
    """A dialect, then an event's body: read in full, and answered. More of it changes nothing; less is an error."""
    kind = _DIALECTS[_byte(data, 0) % len(_DIALECTS)].event
    assert kind
    body = data[1:]
    try:
        told = kind(7, body)
    except ProtocolError:
        return
    told_again = kind(7, body + _MORE)
    assert _read(told) == _read(told_again)
    for new_val, page_fault in ((None, None), (1, None), (None, PageFaultReply(1, body[:256], singlestep=True))):
        with suppress(ValueError):
            assert len(encode_reply(told, Action.RETRY, new_val, page_fault)) in (16, 24, 288)


def answer(data: bytes) -> None:
    """A command, then the data of its answer: more of it changes nothing."""
    request = _REQUESTS[_byte(data, 0) % len(_REQUESTS)]
    try:
        result = request.decode(data[1:])
    except ProtocolError:
        return
    if request.command not in _GROWS | {Command.GET_VERSION}:
        assert request.decode(data[1:] + _MORE) == result


def hello(data: bytes) -> None:
    """The structs of the handshake, on either side, as whole as they are."""
    with suppress(HandshakeError):
        assert 4 <= handshake.struct_length(data[:4].ljust(4, b"\0")) <= handshake.MAX_STRUCT
    with suppress(HandshakeError):
        said = handshake.decode_hello(data)
        assert len(handshake.encode_hello(said)) == 96
    with suppress(HandshakeError):
        handshake.check_answer(data, b"secret")


def greeting(data: bytes) -> None:
    """What a peer says on a socket, to either side, before the session: what follows the struct is left there."""
    sides: tuple[Callable[[socket.socket], object], ...] = (
        lambda sock: greet(sock, None, _DEADLINE),
        lambda sock: introduce(sock, Hello(_NOBODY), None, _DEADLINE),
    )
    for side in sides:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            try:
                side(ours)
            except HandshakeError:
                continue
            left = b""
            while more := ours.recv(65536):
                left += more
            assert left == data[int.from_bytes(data[:4], "little") :]


def simulated_kernel(data: bytes) -> None:
    """What an introspector says: the session ends for a reason, and when the introspector closes at the latest."""
    ours, kernels = socket.socketpair()
    with ours, kernels, SimulatedKernel(kernels, 2, announce=True) as kernel:
        ours.settimeout(_DEADLINE)
        ours.sendall(data)
        ours.shutdown(socket.SHUT_WR)
        with suppress(ConnectionError):
            while ours.recv(65536):
                pass
        assert kernel.wait_ended(_DEADLINE)


def recording(data: bytes) -> None:
    """A file is read as a recording, as far as it goes."""
    with suppress(BadRecording):
        for item in read_recording(io.BytesIO(data)):
            assert isinstance(item, Note) or len(item.data) <= len(data)


def page_tables(data: bytes) -> None:
    """A walk through page tables that are made of these bytes, over and over, ends at a page or at none."""
    control = [1 << 31 if _byte(data, 0) & 1 else 0, _byte(data, 1) << 4 | _byte(data, 2) << 12, _byte(data, 3) << 10]
    nothing = unpack_sregs(bytes(SREGS_SIZE))
    tables = PageTables.of(nothing._replace(cr0=control[0], cr4=control[1], efer=control[2]), cr3=_byte(data, 4) << 12)
    address = int.from_bytes(data[5:13], "little")
    walking, entries = walk(tables, address), data[13:] or bytes(8)
    try:
        steps = [next(walking)]
        while True:
            assert len(steps) <= tables.levels
            at = 8 * len(steps) % len(entries)
            steps.append(walking.send([(entries[at:] + entries)[: tables.entry_size].ljust(tables.entry_size, b"\0")]))
    except StopIteration as end:
        there = end.value
        assert there.gpa >> 52 == 0
        assert not there.page_size or there.gpa % there.page_size == address % there.page_size
    except NotMapped:
        return


def lone_event(data: bytes) -> None:
    """The compiled round trip takes for an event that came alone just what a connection takes for one."""
    compiled = event_in(memoryview(data), len(data))
    kernel = Connection()
    told: object = None
    with suppress(ProtocolError):
        kernel.receive_data(data)
        told = kernel.next_message()
    if compiled is not None:
        assert isinstance(told, Event)
        assert _read(compiled) == _read(told)
        assert not kernel.pending
    elif _COMPILED and isinstance(told, Event) and not kernel.pending and kernel.next_message() is None:
        assert int.from_bytes(told.body[:2], "little") != EVENT_SIZE  # a newer kernel's


CHECKS: Mapping[str, Callable[[bytes], None]] = MappingProxyType(
    {
        check.__name__: check
        for check in (
            framing,
            connection,
            event,
            lone_event,
            answer,
            hello,
            greeting,
            simulated_kernel,
            page_tables,
            recording,
        )
    }
)
"""By name, which is that of the folder with its corpus, too."""

_NOBODY = handshake.decode_hello(bytes(20)).uuid
_PIECES = 4
"""How many bytes at the head of a stream say in what pieces it comes."""


def _byte(data: bytes, at: int) -> int:
    return data[at] if at < len(data) else 0


def _pieces(data: bytes) -> Iterator[bytes]:
    """A stream in pieces whose sizes its first bytes say, over and over."""
    sizes = [size + 1 for size in data[:_PIECES]] or [1]
    stream, at, turn = data[_PIECES:], 0, 0
    while at < len(stream):
        size = sizes[turn % len(sizes)] ** 2
        yield stream[at : at + size]
        at, turn = at + size, turn + 1


def _heard(dialect: Dialect, asked: list[Request[object]], pieces: Iterator[bytes]) -> list[object]:
    """What a connection tells of a stream, its end included."""
    kernel = Connection(dialect)
    heard: list[object] = []
    for request in asked:
        kernel.command(request)
    try:
        for piece in pieces:
            kernel.receive_data(piece)
            while (message := kernel.next_message()) is not None:
                heard.append(_read(message) if isinstance(message, Event) else message)
        kernel.receive_data(b"")
    except ProtocolError as error:
        heard.append(str(error))
    return [*heard, kernel.state, kernel.dialect.name]


def _read(told: Event) -> tuple[object, ...]:
    """Everything that an event has to tell."""
    where = (told.seq, told.vcpu, told.event, told.mode, told.rip, told.cr3, getattr(told, "view", None))
    return (*where, told.registers, told.sregs, told.msrs, told.data, repr(told))
