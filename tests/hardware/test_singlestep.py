# SPDX-License-Identifier: LGPL-2.1-or-later
"""SINGLESTEP events: one after each instruction, unseen by the guest."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from kvmi_host.introspect import Session
from kvmi_host.protocol import Event, EventId
from kvmi_host.testing.live import LiveGuest
from kvmi_host.testing.puppet import DATA_SELECTOR, SOFTWARE_INTERRUPT, STEPS, TICK, Puppet, Result, address, page

pytestmark = pytest.mark.hardware

RFLAGS_TF = 1 << 8
DB, BP = 1, 3


def begin(puppet: Puppet, snippet: str, **registers: int) -> None:
    """Switch the steps on where a snippet is about to begin."""
    session = puppet.session
    session.control_events(0, EventId.HYPERCALL, True)
    puppet.start(0, "announced", r14=address(snippet), **registers)
    announced = puppet.event()
    session.control_events(0, EventId.HYPERCALL, False)
    session.control_events(0, EventId.SINGLESTEP, True)
    session.reply(announced)


def stepped(
    puppet: Puppet, snippet: str, answer: Callable[[Event], None] | None = None, **registers: int
) -> tuple[list[Event], Result]:
    """Step through a snippet.

    :param answer: what replies to an event; by default each is answered CONTINUE.
    :return: its events and some before it, and what came of it.
    """
    begin(puppet, snippet, **registers)
    events = []
    while (event := puppet.event()).rip != address("finish"):
        events.append(event)
        (answer or puppet.session.reply)(event)
    puppet.session.control_events(0, EventId.SINGLESTEP, False)
    puppet.session.reply(event)
    return events, puppet.finish(0)


def step_through(puppet: Puppet, snippet: str, size: int, **registers: int) -> tuple[list[int], Result]:
    """Step through a snippet of `size` bytes.

    :return: where in it the steps have led to, its RET included, and what came of it.
    """
    steps, result = stepped(puppet, snippet, **registers)
    within = range(address(snippet), address(snippet) + size + 1)
    offsets: list[int] = []
    for before, event in pairwise(steps):
        # Back from the handler of an interrupt is no step of the snippet's own.
        if event.rip in within and (before.rip in within or not offsets):
            offsets.append(event.rip - within.start)
    return offsets, result


@pytest.mark.rule("4.32")
def test_each_instruction_is_one_event(puppet: Puppet) -> None:
    offsets, result = step_through(puppet, "nops", 8)
    assert offsets == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert result.exceptions == 0


@pytest.mark.rule("4.32", "4.74")
def test_an_event_tells_the_state_after_its_instruction(puppet: Puppet) -> None:
    puppet.session.write_physical(page(0), (2).to_bytes(8, "little"))
    steps, _ = stepped(puppet, "xchg", rax=1, rsi=page(0))
    (before,) = [number for number, event in enumerate(steps) if event.rip == address("xchg")]
    assert (steps[before].registers.rax, steps[before + 1].registers.rax) == (1, 2)
    assert steps[before].data is None


@pytest.mark.rule("4.33")
def test_the_guest_does_not_see_the_trap_flag(puppet: Puppet) -> None:
    offsets, result = step_through(puppet, "pushf", 2)
    assert offsets == [0, 1, 2]
    assert not result.registers.rax & RFLAGS_TF
    assert not result.registers.rflags & RFLAGS_TF


@pytest.mark.rule("4.33")
def test_neither_does_the_introspector(puppet: Puppet) -> None:
    flags = set()

    def look(event: Event) -> None:
        flags.update({event.registers.rflags, puppet.session.get_registers(0).registers.rflags})
        puppet.session.reply(event)

    stepped(puppet, "nops", look)
    assert not any(value & RFLAGS_TF for value in flags)


@pytest.mark.rule("4.33")
def test_a_guest_that_steps_itself_gets_its_own_traps(puppet: Puppet) -> None:
    offsets, result = step_through(puppet, "step", 26)
    assert result.counts[DB] == STEPS
    assert (result.exceptions, result.vector) == (STEPS, DB)
    assert result.dr6 & 1 << 14
    assert offsets[0] == 0
    assert offsets[-1] == 26
    assert len(set(offsets)) == len(offsets) == 15


@pytest.mark.rule("4.32")
def test_a_string_instruction_is_stepped_by_its_rounds(puppet: Puppet) -> None:
    puppet.session.write_physical(page(0), b"abcd")
    offsets, result = step_through(puppet, "rep_movsb", 2, rsi=page(0), rdi=page(1), rcx=4)
    assert offsets == [0, 0, 0, 0, 2]
    assert puppet.session.read_physical(page(1), 4) == b"abcd"
    assert result.exceptions == 0


@pytest.mark.rule("4.32")
def test_hlt_is_stepped_over_when_the_guest_wakes_up(puppet: Puppet) -> None:
    offsets, result = step_through(puppet, "hlt", 1)
    assert offsets == [0, 1]
    assert result.counts[TICK] >= 1
    assert result.exceptions == 0


@pytest.mark.rule("4.32")
def test_the_shadow_of_mov_ss_holds_for_one_instruction_at_most(puppet: Puppet) -> None:
    offsets, result = step_through(puppet, "mov_ss", 4, rax=DATA_SELECTOR)
    assert offsets in ([0, 3, 4], [0, 2, 3, 4])
    assert result.exceptions == 0


@pytest.mark.rule("4.32")
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


@pytest.mark.rule("4.33")
@pytest.mark.parametrize(("snippet", "vector"), [("int3", BP), ("ud2", 6), ("int_n", SOFTWARE_INTERRUPT)])
def test_an_exception_is_delivered_and_stepped_into(puppet: Puppet, snippet: str, vector: int) -> None:
    events, result = stepped(puppet, snippet)
    assert (result.counts[vector], result.counts[DB]) == (1, 0)
    stub = address("stubs") + 16 * vector
    assert any(stub <= event.rip < stub + 16 for event in events)


@pytest.mark.rule("4.33")
def test_the_timer_goes_on(puppet: Puppet) -> None:
    events, result = stepped(puppet, "loop_nop", r15=50)
    assert len(events) >= 50 * 6
    assert result.counts[DB] == 0
    assert puppet.run(0, "hlt").counts[TICK] >= 1


@pytest.mark.rule("4.32", "4.12")
def test_a_breakpoint_comes_in_between(puppet: Puppet) -> None:
    puppet.session.control_events(0, EventId.BREAKPOINT, True)
    events, result = stepped(puppet, "int3")
    assert [event.rip for event in events if event.event == EventId.BREAKPOINT] == [address("int3")]
    assert (result.counts[BP], result.counts[DB]) == (1, 0)


@pytest.mark.rule("4.32", "4.3")
def test_a_write_of_a_control_register_comes_in_between(puppet: Puppet) -> None:
    puppet.session.control_events(0, EventId.CR, True)
    puppet.session.control_cr(0, 3, True)
    for root in ("other_root", "root"):
        events, _ = stepped(puppet, "mov_to_cr3", rax=address(root))
        (write,) = [number for number, event in enumerate(events) if event.event == EventId.CR]
        assert events[write].rip == address("mov_to_cr3")
        assert events[write + 1].rip == address("mov_to_cr3") + 3


@pytest.mark.rule("3.18")
def test_set_registers_moves_a_stepped_vcpu(puppet: Puppet) -> None:
    def turn(event: Event) -> None:
        if event.rip == address("nops") + 3:
            puppet.session.set_registers(0, event.registers._replace(rip=address("nops") + 8, rbx=7))
        puppet.session.reply(event)

    events, result = stepped(puppet, "nops", turn)
    assert not {event.rip for event in events} & {address("nops") + offset for offset in (4, 5, 6, 7)}
    assert result.registers.rbx == 7


@pytest.mark.rule("4.35")
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


@pytest.mark.rule("4.34")
def test_switched_off_there_are_no_more_events(puppet: Puppet) -> None:
    step_through(puppet, "nops", 8)
    assert puppet.run(0, "loop_nop", r15=1000).exceptions == 0


@pytest.mark.rule("2.23")
@pytest.mark.parametrize("snippet", ["nops", "step", "hlt"])
def test_the_end_of_the_session_ends_the_steps(
    puppet_guest: LiveGuest, puppet: Puppet, hooked: Callable[..., Session], snippet: str
) -> None:
    begin(puppet, snippet)
    while (event := puppet.event()).rip != address(snippet):
        puppet.session.reply(event)
    puppet.session.close()
    again = Puppet(hooked(puppet_guest))
    result = again.finish(0)
    assert result.counts[DB] == (STEPS if snippet == "step" else 0)
    assert not again.run(0, "pushf").registers.rax & RFLAGS_TF
    puppet_guest.goes_on()
