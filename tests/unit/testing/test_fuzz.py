# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is drawn follows from the seed, and what would hurt the guest is told from what would not."""

from random import Random
from struct import pack

import pytest

from kvmi_host.protocol import Command, Event, EventId
from kvmi_host.protocol.events import encode_reply
from kvmi_host.protocol.x86 import REGISTERS
from kvmi_host.testing.fuzz import SERVED, WELL_FORMED, Exchange, Fuzzer, Message

SCRATCH = (0x100000, 0x101000)
VCPUS = 2
OLD, NEW = 0x1000, 0x2000
RIP = REGISTERS.pack(*range(18))


def event(seq: int, kind: int, own: bytes = b"", vcpu: int = 0) -> Event:
    return Event(seq, pack("<HHB3xB7x", 544, vcpu, kind, 8) + RIP + bytes(544 - 16 - len(RIP)) + own)


CR_WRITE = event(7, EventId.CR, pack("<H6xQQ", 3, OLD, NEW))
BREAKPOINT = event(7, EventId.BREAKPOINT, pack("<QB7x", 0, 1))


def exchange(*events: Event) -> Exchange:
    result = Exchange(VCPUS, SCRATCH)
    for each in events:
        result.note_event(each)
    return result


def drawn(seed: int, count: int = 3000, **settings: float) -> list[Message]:
    fuzzer = Fuzzer(Random(seed), exchange(), **settings)
    messages = fuzzer.opening()
    while len(messages) < count:
        if not fuzzer.exchange.waiting:
            fuzzer.exchange.note_event(event(len(messages), EventId.CR, pack("<H6xQQ", 3, OLD, NEW)))
        messages += fuzzer.burst()
    return messages


def test_one_seed_draws_the_same_again_and_another_does_not():
    assert drawn(1) == drawn(1) != drawn(2)


def test_every_command_is_drawn_both_well_formed_and_spoilt():
    messages = drawn(1, 20_000)
    for well_formed in (True, False):
        assert {m.id for m in messages if (m.form == WELL_FORMED) is well_formed} >= SERVED
    assert len({m.form for m in messages if m.id == Command.EVENT_REPLY}) == 7


def test_nothing_is_spoilt_where_that_is_not_wanted():
    fuzzer = Fuzzer(Random(1), exchange())
    fuzzer.spoilt = 0
    assert {m.form for _ in range(500) for m in fuzzer.burst()} == {WELL_FORMED}


def vcpu_message(command: int, payload: bytes, vcpu: int = 0) -> Message:
    return Message(command, 1, pack("<HHI", vcpu, 0, 0) + payload, "")


def reply(to: Event, payload: bytes) -> Message:
    return Message(Command.EVENT_REPLY, to.seq, payload, "")


def write(gpa: int, size: int = 4) -> Message:
    return Message(Command.WRITE_PHYSICAL, 1, pack("<QQ", gpa, size) + bytes(4), "")


def set_access(gpa: int) -> Message:
    return Message(Command.SET_PAGE_ACCESS, 1, pack("<HHI", 0, 1, 0) + pack("<QB7x", gpa, 1), "")


def inject(vector: int, padding: int = 0) -> Message:
    return vcpu_message(Command.INJECT_EXCEPTION, pack("<BBHIQ", vector, 0, padding, 0, 0))


HARM = {
    "the VM's end": (reply(BREAKPOINT, encode_reply(BREAKPOINT, 2)), BREAKPOINT),
    "another value": (reply(CR_WRITE, encode_reply(CR_WRITE, new_val=5)), CR_WRITE),
    "no value, which is zero": (reply(CR_WRITE, encode_reply(CR_WRITE)[:-8]), CR_WRITE),
    "the end, of what comes next": (reply(event(8, EventId.HYPERCALL), encode_reply(BREAKPOINT, 2)), BREAKPOINT),
    "other registers": (vcpu_message(Command.SET_REGISTERS, bytes(144)), BREAKPOINT),
    "registers of one that runs": (vcpu_message(Command.SET_REGISTERS, RIP, 1), BREAKPOINT),
    "a write to code": (write(0x8000), BREAKPOINT),
    "access to code": (set_access(0x8000), BREAKPOINT),
    "a fault": (inject(6), BREAKPOINT),
}
NO_HARM = {
    "a reply as it should be": (reply(CR_WRITE, encode_reply(CR_WRITE)), CR_WRITE),
    "another try": (reply(BREAKPOINT, encode_reply(BREAKPOINT, 1)), BREAKPOINT),
    "the end, of what is over": (reply(event(6, EventId.HYPERCALL), encode_reply(BREAKPOINT, 2)), BREAKPOINT),
    "the end, with padding": (reply(BREAKPOINT, encode_reply(BREAKPOINT, 2)[:-1] + b"1"), BREAKPOINT),
    "the end, and too much": (reply(BREAKPOINT, encode_reply(BREAKPOINT, 2) + b"1"), BREAKPOINT),
    "the registers that it has": (vcpu_message(Command.SET_REGISTERS, RIP), BREAKPOINT),
    "registers of no vCPU": (vcpu_message(Command.SET_REGISTERS, bytes(144), VCPUS), BREAKPOINT),
    "registers that end early": (vcpu_message(Command.SET_REGISTERS, bytes(143)), BREAKPOINT),
    "a write to scratch memory": (write(SCRATCH[1] + 8), BREAKPOINT),
    "a write to nowhere": (write(1 << 40), BREAKPOINT),
    "a write without its data": (write(0x8000, 5), BREAKPOINT),
    "a write over the page's end": (write(0x8FFF, 2), BREAKPOINT),
    "access to scratch memory": (set_access(SCRATCH[0]), BREAKPOINT),
    "a trap": (inject(3), BREAKPOINT),
    "a fault, with padding": (inject(6, 1), BREAKPOINT),
}


@pytest.mark.parametrize(("message", "waits"), HARM.values(), ids=HARM)
def test_what_would_hurt_the_guest_is_known(message, waits):
    assert not exchange(waits).harmless(message)


@pytest.mark.parametrize(("message", "waits"), NO_HARM.values(), ids=NO_HARM)
def test_what_would_not_is_known(message, waits):
    assert exchange(waits).harmless(message)


def test_a_reply_is_to_one_event_once():
    state = exchange(BREAKPOINT, event(8, EventId.HYPERCALL, vcpu=1))
    state.note_sent(reply(BREAKPOINT, encode_reply(BREAKPOINT)))
    assert list(state.waiting) == [1]


def test_noise_goes_out_whole_whatever_its_pieces():
    fuzzer = Fuzzer(Random(1), exchange())
    for _ in range(200):
        fuzzer.burst()
        noise = fuzzer.noise()
        assert b"".join(fuzzer.pieces(noise)) == noise
