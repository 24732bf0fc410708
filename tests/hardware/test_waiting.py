# SPDX-License-Identifier: LGPL-2.1-or-later
"""While a vCPU waits for its reply: commands are served, in order; registers are set; answers may be off."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from kvmi_host.introspect import Session
from kvmi_host.protocol import Command, CommandError, ErrorCode, Event, EventId
from kvmi_host.protocol.events import encode_reply
from kvmi_host.protocol.x86 import REGISTERS, Registers
from kvmi_host.testing.live import LiveGuest, Walker, await_end
from kvmi_host.testing.modewalk import Actions, Station

pytestmark = pytest.mark.hardware

HEADER = struct.Struct("<HHI")
VCPU = struct.Struct("<HHI")
STUB = 0x300000
MARK = 0x301000


def message(command: int, seq: int, payload: bytes) -> bytes:
    return HEADER.pack(command, len(payload), seq) + payload


def reply(event: Event) -> bytes:
    return message(Command.EVENT_REPLY, event.seq, encode_reply(event))


def set_registers(seq: int, vcpu: int, registers: Registers) -> bytes:
    return message(Command.SET_REGISTERS, seq, VCPU.pack(vcpu, 0, 0) + REGISTERS.pack(*registers))


def answers(seq: int, enable: bool, now: bool) -> bytes:
    return message(Command.CONTROL_CMD_RESPONSE, seq, struct.pack("<BBHI", enable, now, 0, 0))


@pytest.fixture
def stopped(walker: Walker) -> Event:
    """vCPU 0, in 64-bit mode, waits for the reply to its hypercall."""
    walker.hold(0, Station.LONG64, Actions.HYPERCALL)
    walker.enable(EventId.HYPERCALL, 0)
    return walker.event()


@pytest.mark.rule("4.52")
def test_commands_are_served_while_their_vcpu_waits(walker: Walker, stopped: Event) -> None:
    session = walker.session
    for _ in range(50):
        assert session.get_registers(0).registers.rip == stopped.rip
        assert session.vcpu_info(0) > 0
    session.control_events(0, EventId.CR, True)
    session.control_cr(0, 3, True)
    session.reply(stopped)
    assert walker.event().seq == stopped.seq + 1


@pytest.mark.rule("3.47")
def test_commands_of_the_vm_are_served_while_every_vcpu_waits(walker: Walker) -> None:
    walker.enable(EventId.HYPERCALL)
    events = [walker.event() for _ in walker.vcpus]
    assert {event.vcpu for event in events} == set(walker.vcpus)
    assert walker.session.guest_info() == len(walker.vcpus)
    assert len(walker.session.read_physical(0x7000, 4096)) == 4096
    for event in events:
        walker.session.reply(event)


@pytest.mark.rule("4.53", "4.52")
def test_a_waiting_vcpu_stands_still_and_the_others_run(walker: Walker, stopped: Event) -> None:
    walker.advances(1)
    before = walker.iterations(0)
    walker.advances(1)
    walker.advances(2)
    assert walker.iterations(0) == before
    walker.session.reply(stopped)


@pytest.mark.rule("3.52")
def test_a_pause_waits_for_the_event_and_the_commands_before_it(walker: Walker, stopped: Event) -> None:
    session = walker.session
    session.pause_vcpu(0)
    for _ in range(10):
        session.vcpu_info(0)
    session.control_events(0, EventId.HYPERCALL, False)
    assert session.waiting == 0
    session.reply(stopped)
    paused = walker.event()
    assert (paused.event, paused.seq) == (EventId.PAUSE_VCPU, stopped.seq + 1)
    session.reply(paused)


@pytest.mark.rule("3.18")
def test_set_registers_takes_effect_with_the_reply(walker: Walker, stopped: Event) -> None:
    session = walker.session
    session.set_registers(0, stopped.registers._replace(r14=0x1122334455667788, r15=42))
    assert session.get_registers(0).registers == stopped.registers
    session.reply(stopped)
    after = walker.event().registers
    assert (after.r14, after.r15) == (0x1122334455667788, 42)


@pytest.mark.rule("3.20")
def test_the_last_set_registers_counts(walker: Walker, stopped: Event) -> None:
    for value in (1, 2, 3):
        walker.session.set_registers(0, stopped.registers._replace(r15=value))
    walker.session.reply(stopped)
    assert walker.event().registers.r15 == 3


@pytest.mark.rule("3.18")
def test_set_registers_moves_rip(walker: Walker, stopped: Event) -> None:
    # mov rax, (the instruction after the hypercall); mov byte [MARK], 0x42; jmp rax
    back = struct.pack("<Q", stopped.rip + 3)
    code = b"\x48\xb8" + back + b"\xc6\x04\x25" + struct.pack("<I", MARK) + b"\x42" + b"\xff\xe0"
    session = walker.session
    session.write_physical(STUB, code)
    session.write_physical(MARK, b"\0")
    session.set_registers(0, stopped.registers._replace(rip=STUB))
    session.reply(stopped)
    after = walker.event()
    assert after.rip == stopped.rip
    assert session.read_physical(MARK, 1) == b"\x42"
    session.reply(after)


@pytest.mark.rule("3.18")
def test_set_registers_of_a_paused_vcpu(walker: Walker) -> None:
    walker.hold(0, Station.LONG64, Actions.HYPERCALL)
    walker.session.pause_vcpu(0)
    paused = walker.event()
    walker.session.set_registers(0, paused.registers._replace(r15=7))
    walker.session.control_events(0, EventId.HYPERCALL, True)
    walker.session.reply(paused)
    assert walker.event().registers.r15 == 7


@pytest.mark.rule("2.22")
def test_set_registers_is_forgotten_when_the_session_ends_before_the_reply(
    guest: LiveGuest, walker: Walker, stopped: Event, hooked: Callable[..., Session]
) -> None:
    walker.session.set_registers(0, stopped.registers._replace(rip=0xDEAD0000, rsp=0))
    walker.session.close()
    guest.goes_on()
    again = Walker(hooked(guest), guest.vcpus)
    again.advances(0)


@pytest.mark.rule("3.51")
def test_one_write_sets_registers_and_replies_without_answers(walker: Walker, stopped: Event) -> None:
    session = walker.session
    registers = stopped.registers._replace(r15=0xBEEF)
    session.send_raw(
        answers(1000, enable=False, now=True)
        + set_registers(1001, 0, registers)
        + reply(stopped)
        + answers(1002, enable=True, now=False)
    )
    after = walker.event()
    assert after.registers.r15 == 0xBEEF
    assert session.get_version().version == 1


@pytest.mark.rule("3.44")
def test_answers_switched_off_from_the_next_command_on(session: Session) -> None:
    # This one is answered; what follows is not, up to the one that switches them on at once.
    session.control_cmd_response(False, now=False)
    session.send_raw(message(Command.CHECK_COMMAND, 2000, struct.pack("<HHI", 2, 0, 0)))
    session.control_cmd_response(True, now=True)
    assert session.get_version().version == 1


@pytest.mark.rule("3.45")
def test_a_command_with_data_ends_the_session_while_answers_are_off(session: Session) -> None:
    session.send_raw(answers(1, enable=False, now=True) + message(Command.GET_VERSION, 2, b""))
    await_end(session)


@pytest.mark.rule("3.46")
@pytest.mark.parametrize("number", [60, Command.CONTROL_VE], ids=["unknown", "not served"])
def test_an_unknown_command_is_refused_even_while_answers_are_off(session: Session, number: int) -> None:
    session.send_raw(answers(1, enable=False, now=True))
    with pytest.raises(CommandError) as refused:
        session.request(number, bytes(16))
    assert refused.value.code == ErrorCode.EOPNOTSUPP
