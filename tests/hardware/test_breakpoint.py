# SPDX-License-Identifier: LGPL-2.1-or-later
"""BREAKPOINT events: INT3, before the guest's own handler has it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmi_host.introspect import Session
from kvmi_host.protocol import Action, BreakpointHit, Event, EventId
from kvmi_host.testing.live import LiveGuest
from kvmi_host.testing.puppet import SOFTWARE_INTERRUPT, Puppet, address, alias, page

pytestmark = pytest.mark.hardware

BP = 3
INT3 = b"\xcc"
RET = b"\xc3"
SET_EAX_7 = b"\xb8\x07\x00\x00\x00"


@pytest.fixture
def watched(puppet: Puppet) -> Puppet:
    """Breakpoints of vCPU 0 are watched."""
    puppet.session.control_events(0, EventId.BREAKPOINT, True)
    return puppet


def skip(session: Session) -> Callable[[Event], None]:
    """Deals with a breakpoint by going on behind it."""

    def answer(event: Event) -> None:
        session.set_registers(0, event.registers._replace(rip=event.rip + 1))
        session.reply(event, Action.RETRY)

    return answer


@pytest.mark.rule("4.12", "4.74")
def test_an_int3_is_an_event_that_says_where_it_lies(watched: Puppet) -> None:
    (event,), _ = watched.watch(0, "int3")
    assert (event.event, event.vcpu, event.mode) == (EventId.BREAKPOINT, 0, 8)
    assert event.rip == address("int3")
    assert event.data == BreakpointHit(gpa=address("int3"), insn_len=1)


@pytest.mark.rule("4.12")
def test_its_gpa_is_where_the_page_tables_say(watched: Puppet) -> None:
    gva, gpa = alias(3)
    watched.session.write_physical(gpa + 0x123, INT3 + RET)
    (event,), _ = watched.watch(0, gva + 0x123)
    assert event.rip == gva + 0x123
    assert event.data.gpa == gpa + 0x123


@pytest.mark.rule("4.13")
def test_continue_gives_the_guest_its_breakpoint(watched: Puppet) -> None:
    events, result = watched.watch(0, "int3")
    assert len(events) == 1
    assert (result.exceptions, result.vector, result.error_code) == (1, BP, 0)
    assert result.rip == address("int3") + 1


@pytest.mark.rule("4.14")
def test_retry_behind_it_keeps_it_from_the_guest(watched: Puppet) -> None:
    events, result = watched.watch(0, "int3", skip(watched.session), rbx=5)
    assert len(events) == 1
    assert (result.exceptions, result.registers.rbx) == (0, 5)


@pytest.mark.rule("4.14")
def test_retry_without_moving_on_meets_it_again(watched: Puppet) -> None:
    actions = iter([Action.RETRY, Action.RETRY, Action.CONTINUE])
    events, result = watched.watch(0, "int3", lambda event: watched.session.reply(event, next(actions)))
    assert [event.rip for event in events] == [address("int3")] * 3
    assert (result.exceptions, result.vector) == (1, BP)


@pytest.mark.rule("4.14")
def test_an_introspectors_own_breakpoint_gives_way_to_what_was_there(watched: Puppet) -> None:
    session = watched.session
    session.write_physical(page(0), INT3 + SET_EAX_7[1:] + RET)

    def restore(event: Event) -> None:
        session.write_physical(event.data.gpa, SET_EAX_7[:1])
        session.reply(event, Action.RETRY)

    events, result = watched.watch(0, page(0), restore)
    assert [event.rip for event in events] == [page(0)]
    assert (result.exceptions, result.registers.rax) == (0, 7)


@pytest.mark.rule("4.12", "4.13")
def test_every_breakpoint_of_a_loop_is_an_event(watched: Puppet) -> None:
    events, result = watched.watch(0, "loop_int3", r15=50)
    assert len(events) == 50
    assert result.counts[BP] == 50


@pytest.mark.rule("4.12")
@pytest.mark.parametrize(("snippet", "vector"), [("int_3", BP), ("int_n", SOFTWARE_INTERRUPT)])
def test_other_software_interrupts_are_the_guests_own(watched: Puppet, snippet: str, vector: int) -> None:
    result = watched.run(0, snippet)
    assert result.counts[vector] == 1


@pytest.mark.rule("4.34", "4.35")
def test_switched_off_and_on_another_vcpu_there_is_no_event(watched: Puppet) -> None:
    assert watched.run(1, "int3").counts[BP] == 1
    watched.session.control_events(0, EventId.BREAKPOINT, False)
    assert watched.run(0, "int3").counts[BP] == 1
    assert watched.run(0, "int_n").counts[SOFTWARE_INTERRUPT] == 1


@pytest.mark.rule("2.21", "2.22")
@pytest.mark.parametrize("moved", [False, True], ids=["as it is", "moved on"])
def test_a_session_that_ends_at_a_breakpoint_leaves_it_to_the_guest(
    puppet_guest: LiveGuest, watched: Puppet, hooked: Callable[..., Session], moved: bool
) -> None:
    watched.start(0, "int3")
    event = watched.event()
    if moved:
        watched.session.set_registers(0, event.registers._replace(rip=event.rip + 1))
    watched.session.close()
    result = Puppet(hooked(puppet_guest)).finish(0)
    assert (result.exceptions, result.vector, result.rip) == (1, BP, address("int3") + 1)
