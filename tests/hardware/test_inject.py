# SPDX-License-Identifier: LGPL-2.1-or-later
"""Exceptions that the introspector has a guest take, and the TRAP event that says what the guest really gets."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import pytest

from kvmi_host.introspect import Session
from kvmi_host.protocol import Command, CommandError, ErrorCode, EventId, Trap
from kvmi_host.testing.live import LiveGuest
from kvmi_host.testing.puppet import Puppet, address

pytestmark = pytest.mark.hardware

DE, DB, BP, OF, UD, DF, GP, PF, AC = 0, 1, 3, 4, 6, 8, 13, 14, 17
HARDWARE, SOFTWARE = 3, 6
LINEAR = 0x1234_5678_9ABC

EXCEPTIONS = [
    # vector, error code, address, type
    (DE, None, 0, HARDWARE),
    (BP, None, 0, SOFTWARE),
    (OF, None, 0, SOFTWARE),
    (UD, None, 0, HARDWARE),
    (DF, 0, 0, HARDWARE),
    (10, 0x18, 0, HARDWARE),
    (11, 0x20, 0, HARDWARE),
    (12, 0x28, 0, HARDWARE),
    (GP, 0x30, 0, HARDWARE),
    (PF, 2, LINEAR, HARDWARE),
    (16, None, 0, HARDWARE),
    (AC, 0, 0, HARDWARE),
    (19, None, 0, HARDWARE),
]
each = pytest.mark.parametrize(
    ("vector", "error_code", "linear", "kind"), EXCEPTIONS, ids=[f"#{e[0]}" for e in EXCEPTIONS]
)


@pytest.fixture
def spinning(puppet: Puppet) -> Iterator[Puppet]:
    """vCPU 0 goes round until it takes an exception, or is told to stop."""
    puppet.start(0, "spin")
    puppet.advances(0)
    return puppet


def refusal(session: Session, vector: int, has_error: int = 0, padding: int = 0) -> int:
    with pytest.raises(CommandError) as refused:
        session.request(Command.INJECT_EXCEPTION, struct.pack("<BBHIQ", vector, has_error, padding, 0, 0), 0)
    return refused.value.code


def ended(puppet: Puppet) -> None:
    puppet.stop(0)
    assert puppet.finish(0).exceptions == 0


@pytest.mark.rule("3.30")
@each
def test_the_guest_takes_the_exception(
    spinning: Puppet, vector: int, error_code: int | None, linear: int, kind: int
) -> None:
    spinning.session.inject_exception(0, vector, error_code, linear)
    if vector in (BP, OF):
        spinning.advances(0)
        spinning.stop(0)
    result = spinning.finish(0)
    assert (result.exceptions, result.vector, result.error_code) == (1, vector, error_code or 0)
    assert address("spin") <= result.rip < address("storm")
    assert vector != PF or result.cr2 == linear


@pytest.mark.rule("4.27")
@each
def test_a_trap_event_says_what_is_injected(
    spinning: Puppet, vector: int, error_code: int | None, linear: int, kind: int
) -> None:
    session = spinning.session
    session.control_events(0, EventId.TRAP, True)
    session.inject_exception(0, vector, error_code, linear)
    event = spinning.event()
    assert (event.event, event.vcpu) == (EventId.TRAP, 0)
    assert event.data[:3] == Trap(vector, kind, error_code or 0, 0)[:3]
    assert vector != PF or event.data.cr2 == linear
    assert spinning.result(0) is None
    session.reply(event)
    if vector in (BP, OF):
        spinning.advances(0)
        spinning.stop(0)
    result = spinning.finish(0)
    assert (result.exceptions, result.vector) == (1, vector)


@pytest.mark.rule("4.29")
def test_an_exception_of_the_guests_own_is_no_trap(puppet: Puppet) -> None:
    puppet.session.control_events(0, EventId.TRAP, True)
    for snippet in ("ud2", "int3", "divide"):
        assert puppet.run(0, snippet).exceptions == 1


@pytest.mark.rule("3.31")
def test_one_at_a_time(spinning: Puppet) -> None:
    session = spinning.session
    session.pause_vcpu(0)
    paused = spinning.event()
    session.inject_exception(0, UD)
    with pytest.raises(CommandError) as refused:
        session.inject_exception(0, GP, 0)
    assert refused.value.code == ErrorCode.EBUSY
    session.reply(paused)
    result = spinning.finish(0)
    assert (result.exceptions, result.vector) == (1, UD)


@pytest.mark.rule("3.30")
def test_after_one_comes_another(puppet: Puppet) -> None:
    for vector, error_code in ((UD, None), (GP, 8), (UD, None)):
        puppet.start(0, "spin")
        puppet.advances(0)
        puppet.session.inject_exception(0, vector, error_code)
        result = puppet.finish(0)
        assert (result.exceptions, result.vector) == (1, vector)


@pytest.mark.rule("3.30")
def test_it_comes_where_an_event_has_stopped_the_vcpu(puppet: Puppet) -> None:
    session = puppet.session
    session.control_events(0, EventId.HYPERCALL, True)
    puppet.start(0, puppet.hypercall(), rax=34, rdi=24)
    event = puppet.event()
    session.inject_exception(0, GP, 0x10)
    session.reply(event)
    result = puppet.finish(0)
    assert (result.exceptions, result.vector, result.error_code) == (1, GP, 0x10)


@pytest.mark.rule("4.28")
def test_one_that_another_replaces_is_told_as_what_came(puppet: Puppet) -> None:
    session = puppet.session
    for event in (EventId.TRAP, EventId.CR):
        session.control_events(0, event, True)
    session.control_cr(0, 4, True)
    cr4 = session.get_registers(0).sregs.cr4
    puppet.start(0, "mov_to_cr4", rax=cr4 ^ 4)
    event = puppet.event()
    session.inject_exception(0, UD)
    session.reply(event, new_val=1 << 63)  # the register does not take it: that is a #GP
    trap = puppet.event()
    assert trap.event == EventId.TRAP
    session.reply(trap)
    result = puppet.finish(0)
    assert result.exceptions == 1
    assert (trap.data.vector, trap.data.error_code) == (result.vector, result.error_code)


@pytest.mark.rule("2.22")
def test_it_is_forgotten_when_the_session_ends_before_it_comes(
    puppet_guest: LiveGuest, spinning: Puppet, hooked: Callable[..., Session]
) -> None:
    session = spinning.session
    session.pause_vcpu(0)
    spinning.event()
    session.inject_exception(0, UD)
    session.close()
    ended(Puppet(hooked(puppet_guest)))


@pytest.mark.rule("3.30")
def test_another_vcpu_takes_none(spinning: Puppet) -> None:
    spinning.start(1, "spin")
    spinning.advances(1)
    spinning.session.inject_exception(1, UD)
    assert spinning.finish(1).vector == UD
    ended(spinning)


@pytest.mark.rule("3.32")
@pytest.mark.parametrize(
    ("vector", "has_error", "padding"),
    [(32, 0, 0), (255, 0, 0), (2, 0, 0), (GP, 2, 0), (GP, 1, 1), (UD, 1, 0), (GP, 0, 0), (PF, 0, 0), (BP, 1, 0)],
)
def test_what_is_no_exception_is_refused(spinning: Puppet, vector: int, has_error: int, padding: int) -> None:
    assert refusal(spinning.session, vector, has_error, padding) == ErrorCode.EINVAL
    spinning.advances(0)
    ended(spinning)


@pytest.mark.rule("5.14")
def test_an_observing_session_injects_nothing(puppet_guest: LiveGuest, hooked: Callable[..., Session]) -> None:
    assert refusal(hooked(puppet_guest, allow="observe"), UD) == ErrorCode.EPERM
