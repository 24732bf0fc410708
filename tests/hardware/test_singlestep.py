# SPDX-License-Identifier: LGPL-2.1-or-later
"""SINGLESTEP events: one after each instruction, unseen by the guest."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmi_host.introspect import Session
from kvmi_host.protocol import Event, EventId
from kvmi_host.testing.live import LiveGuest
from kvmi_host.testing.puppet import DATA_SELECTOR, STEPS, TICK, Puppet, Result, address, page

pytestmark = pytest.mark.hardware

RFLAGS_TF = 1 << 8
DB, BP = 1, 3


def stepped(puppet: Puppet, snippet: str, **registers: int) -> tuple[list[Event], Result]:
    """Step through a snippet, and a little before and after it.

    :return: the steps, and what came of it.
    """
    session = puppet.session
    session.control_events(0, EventId.HYPERCALL, True)
    puppet.start(0, "between", r14=address(snippet), **registers)
    begin = puppet.event()
    session.control_events(0, EventId.SINGLESTEP, True)
    session.reply(begin)
    steps = []
    while (event := puppet.event()).event == EventId.SINGLESTEP:
        steps.append(event)
        session.reply(event)
    assert event.event == EventId.HYPERCALL
    session.control_events(0, EventId.SINGLESTEP, False)
    session.control_events(0, EventId.HYPERCALL, False)
    session.reply(event)
    return steps, puppet.finish(0)


def step_through(puppet: Puppet, snippet: str, size: int, **registers: int) -> tuple[list[int], Result]:
    """Step through a snippet of `size` bytes.

    :return: where in it the steps have led to, its RET included, and what came of it.
    """
    steps, result = stepped(puppet, snippet, **registers)
    offsets = [event.rip - address(snippet) for event in steps]
    return [offset for offset in offsets if 0 <= offset <= size], result


def test_each_instruction_is_one_event(puppet: Puppet) -> None:
    offsets, result = step_through(puppet, "nops", 8)
    assert offsets == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert result.exceptions == 0


def test_an_event_tells_the_state_after_its_instruction(puppet: Puppet) -> None:
    puppet.session.write_physical(page(0), (2).to_bytes(8, "little"))
    steps, _ = stepped(puppet, "xchg", rax=1, rsi=page(0))
    (before,) = [number for number, event in enumerate(steps) if event.rip == address("xchg")]
    assert (steps[before].registers.rax, steps[before + 1].registers.rax) == (1, 2)
    assert steps[before].data is None


def test_the_guest_does_not_see_the_trap_flag(puppet: Puppet) -> None:
    offsets, result = step_through(puppet, "pushf", 2)
    assert offsets == [0, 1, 2]
    assert not result.registers.rax & RFLAGS_TF
    assert not result.registers.rflags & RFLAGS_TF


def test_neither_does_the_introspector(puppet: Puppet) -> None:
    puppet.session.control_events(0, EventId.SINGLESTEP, True)
    puppet.start(0, "nops")
    flags = set()
    for _ in range(20):
        event = puppet.event()
        flags |= {event.registers.rflags & RFLAGS_TF, puppet.session.get_registers(0).registers.rflags & RFLAGS_TF}
        puppet.session.reply(event)
    puppet.session.control_events(0, EventId.SINGLESTEP, False)
    puppet.watch_on(0)
    assert flags == {0}


def test_a_guest_that_steps_itself_gets_its_own_traps(puppet: Puppet) -> None:
    offsets, result = step_through(puppet, "step", 26)
    assert result.counts[DB] == STEPS
    assert (result.exceptions, result.vector) == (STEPS, DB)
    assert result.dr6 & 1 << 14
    assert offsets[0] == 0
    assert offsets[-1] == 26
    assert len(set(offsets)) == len(offsets) == 15


def test_a_string_instruction_is_stepped_by_its_rounds(puppet: Puppet) -> None:
    puppet.session.write_physical(page(0), b"abcd")
    offsets, result = step_through(puppet, "rep_movsb", 2, rsi=page(0), rdi=page(1), rcx=4)
    assert offsets == [0, 0, 0, 0, 2]
    assert puppet.session.read_physical(page(1), 4) == b"abcd"
    assert result.exceptions == 0


def test_hlt_is_stepped_over_when_the_guest_wakes_up(puppet: Puppet) -> None:
    offsets, result = step_through(puppet, "hlt", 1)
    assert offsets == [0, 1]
    assert result.counts[TICK] >= 1
    assert result.exceptions == 0


def test_the_shadow_of_mov_ss_holds_for_one_instruction_at_most(puppet: Puppet) -> None:
    offsets, result = step_through(puppet, "mov_ss", 4, rax=DATA_SELECTOR)
    assert offsets in ([0, 3, 4], [0, 2, 3, 4])
    assert result.exceptions == 0


@pytest.mark.parametrize(
    ("snippet", "size", "registers"),
    [
        ("cpuid", 2, {}),
        ("rdmsr", 2, {"rcx": 0xC0000082}),
        ("wrmsr", 2, {"rcx": 0xC0000083}),
        ("out", 1, {"rdx": 0x80}),
        ("mov_from_cr3", 3, {}),
        ("sidt", 3, {"rsi": 0x200000}),
        ("write64", 3, {"rsi": 0x200000}),
        ("lock_add", 4, {"rsi": 0x200000}),
    ],
)
def test_an_instruction_that_leaves_the_guest_is_one_step(
    puppet: Puppet, snippet: str, size: int, registers: dict[str, int]
) -> None:
    offsets, result = step_through(puppet, snippet, size, **registers)
    assert offsets == [0, size]
    assert result.exceptions == 0


@pytest.mark.parametrize(("snippet", "vector"), [("int3", BP), ("ud2", 6), ("int_n", 0x30)])
def test_an_exception_is_delivered_and_stepped_into(puppet: Puppet, snippet: str, vector: int) -> None:
    puppet.session.control_events(0, EventId.SINGLESTEP, True)
    events, result = puppet.watch(0, snippet)
    puppet.session.control_events(0, EventId.SINGLESTEP, False)
    assert result.counts[vector] == 1
    assert result.counts[DB] == 0
    rips = [event.rip for event in events]
    stub = address("stubs") + 16 * vector
    assert any(stub <= rip < stub + 16 for rip in rips)


def test_the_timer_is_not_lost(puppet: Puppet) -> None:
    puppet.session.control_events(0, EventId.SINGLESTEP, True)
    events, result = puppet.watch(0, "loop_nop", r15=100)
    puppet.session.control_events(0, EventId.SINGLESTEP, False)
    assert len(events) >= 400
    assert result.counts[DB] == 0
    assert puppet.run(0, "hlt").counts[TICK] >= 1


def test_other_events_come_in_between(puppet: Puppet) -> None:
    session = puppet.session
    for event in (EventId.SINGLESTEP, EventId.BREAKPOINT, EventId.CR):
        session.control_events(0, event, True)
    session.control_cr(0, 3, True)
    events, result = puppet.watch(0, "int3")
    assert [event.rip for event in events if event.event == EventId.BREAKPOINT] == [address("int3")]
    assert result.counts[BP] == 1
    events, _ = puppet.watch(0, "mov_to_cr3", rax=address("other_root"))
    assert [event.rip for event in events if event.event == EventId.CR] == [address("mov_to_cr3")]
    events, _ = puppet.watch(0, "mov_to_cr3", rax=address("root"))
    rips = [event.rip for event in events if event.event == EventId.SINGLESTEP]
    assert address("mov_to_cr3") + 3 in rips
    session.control_events(0, EventId.SINGLESTEP, False)


def test_set_registers_moves_a_stepped_vcpu(puppet: Puppet) -> None:
    def turn(event: Event) -> None:
        if event.event == EventId.SINGLESTEP and event.rip == address("nops") + 3:
            puppet.session.set_registers(0, event.registers._replace(rip=address("nops") + 8, rbx=7))
        puppet.session.reply(event)

    puppet.session.control_events(0, EventId.SINGLESTEP, True)
    events, result = puppet.watch(0, "nops", turn)
    puppet.session.control_events(0, EventId.SINGLESTEP, False)
    offsets = [event.rip - address("nops") for event in events]
    assert [offset for offset in offsets if 0 <= offset <= 8] == [0, 1, 2, 3]
    assert result.registers.rbx == 7


def test_only_the_vcpu_that_was_asked_for_is_stepped(puppet: Puppet) -> None:
    puppet.session.control_events(0, EventId.SINGLESTEP, True)
    puppet.start(1, "spin")
    vcpus = set()
    for _ in range(50):
        event = puppet.event()
        vcpus.add(event.vcpu)
        puppet.session.reply(event)
    puppet.session.control_events(0, EventId.SINGLESTEP, False)
    puppet.stop(1)
    puppet.watch_on(1)
    assert vcpus == {0}


def test_switched_off_there_are_no_more_events(puppet: Puppet) -> None:
    step_through(puppet, "nops", 8)
    assert puppet.run(0, "loop_nop", r15=1000).exceptions == 0


@pytest.mark.parametrize("snippet", ["nops", "step", "hlt"])
def test_the_end_of_the_session_ends_the_steps(
    puppet_guest: LiveGuest, puppet: Puppet, hooked: Callable[..., Session], snippet: str
) -> None:
    puppet.session.control_events(0, EventId.SINGLESTEP, True)
    puppet.start(0, snippet)
    while (event := puppet.event()).rip != address(snippet):
        puppet.session.reply(event)
    puppet.session.close()
    again = Puppet(hooked(puppet_guest))
    result = again.finish(0)
    assert result.counts[DB] == (STEPS if snippet == "step" else 0)
    assert not again.run(0, "pushf").registers.rax & RFLAGS_TF
    puppet_guest.goes_on()
