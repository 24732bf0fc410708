# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages as they cross the socket: what frames them, byte by byte."""

from __future__ import annotations

import struct
from time import monotonic

import pytest

from kvmi_host.protocol import Command, ErrorCode, EventId, Frame, messages
from kvmi_host.protocol.messages import Request
from kvmi_host.testing.live import DEADLINE, LiveGuest, Wire

pytestmark = pytest.mark.hardware

NO_MEMORY = 0x8000000
COMMON = 544
SUCCESS = bytes(8)


def ask(wire: Wire, request: Request[None], seq: int) -> Frame:
    """Send a command; the message that comes next."""
    wire.send(request.command, request.payload, seq)
    return wire.receive()


def reply(event: Frame) -> bytes:
    """CONTINUE."""
    (vcpu,) = struct.unpack_from("<H", event.payload, 2)
    return struct.pack("<HHIBBHI", vcpu, 0, 0, 0, event.payload[4], 0, 0)


@pytest.mark.rule("2.1", "2.2", "2.18")
@pytest.mark.parametrize("seq", [0, 7, 2**32 - 1])
def test_an_answer_repeats_id_and_seq_and_pads_with_zeros(wire: Wire, guest: LiveGuest, seq: int) -> None:
    wire.send(Command.GET_GUEST_INFO, b"", seq)
    answer = struct.pack("<iIIIII", 0, 0, guest.vcpus, 0, 0, 0)
    assert wire.receive() == (Command.GET_GUEST_INFO, seq, answer)


@pytest.mark.rule("2.2")
def test_a_refusal_is_an_error_code_and_nothing_else(wire: Wire) -> None:
    wire.send(Command.READ_PHYSICAL, struct.pack("<QQ", NO_MEMORY, 8), 1)
    assert wire.receive() == (Command.READ_PHYSICAL, 1, struct.pack("<iI", ErrorCode.EINVAL, 0))


@pytest.mark.rule("4.1", "2.18")
def test_an_event_says_its_size_and_has_zeros_between_its_fields(wire: Wire) -> None:
    assert ask(wire, messages.control_events(1, EventId.HYPERCALL, True), 1).payload == SUCCESS
    event = wire.receive()
    assert event.id == Command.EVENT
    assert len(event.payload) == COMMON
    assert struct.unpack_from("<HHB", event.payload) == (COMMON, 1, EventId.HYPERCALL)
    # Behind the event's number; and behind the mode, where v7 has its view in two bytes.
    assert event.payload[5:8] + event.payload[9:10] + event.payload[12:16] == bytes(8)


@pytest.mark.rule("4.43")
def test_a_reply_is_not_answered(wire: Wire) -> None:
    ask(wire, messages.control_events(0, EventId.HYPERCALL, True), 1)
    event = wire.receive()
    ask(wire, messages.control_events(0, EventId.HYPERCALL, False), 2)
    wire.send(Command.EVENT_REPLY, reply(event), event.seq)
    # The vCPU itself answers this, and it does so once it has the reply.
    answer = ask(wire, messages.control_events(0, EventId.CR, False), 3)
    assert answer == (Command.CONTROL_EVENTS, 3, SUCCESS)


@pytest.mark.rule("1.2")
def test_an_event_may_come_before_the_answer_that_was_asked_for(wire: Wire, guest: LiveGuest) -> None:
    for vcpu in range(guest.vcpus):
        request = messages.control_events(vcpu, EventId.HYPERCALL, True)
        wire.send(request.command, request.payload, vcpu)
    asked, came_before = set(range(guest.vcpus)), 0
    deadline = monotonic() + DEADLINE
    seq = guest.vcpus
    while not came_before:
        assert monotonic() < deadline, "every answer came before any event"
        if not asked:
            wire.send(Command.GET_GUEST_INFO, b"", seq)
            asked, seq = {seq}, seq + 1
        message = wire.receive()
        if message.id == Command.EVENT:
            came_before += bool(asked)
            wire.send(Command.EVENT_REPLY, reply(message), message.seq)
        else:
            asked.remove(message.seq)
    while asked:
        message = wire.receive()
        if message.id != Command.EVENT:
            asked.remove(message.seq)
