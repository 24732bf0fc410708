# SPDX-License-Identifier: LGPL-2.1-or-later
"""XSETBV events: a write that changes XCR0, before it is made."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvmi_host.protocol import EventId
from kvmi_host.testing.emulators import Fault, unless
from kvmi_host.testing.puppet import Puppet, address

pytestmark = pytest.mark.hardware

X87 = 1
X87_AND_SSE = 3
NEITHER = 0
GP = 13


@pytest.fixture
def watched(puppet: Puppet) -> Iterator[Puppet]:
    """XSETBV of vCPU 0 is watched, and XCR0 is x87 alone."""
    before = puppet.run(0, "xgetbv").registers.rax
    puppet.run(0, "xsetbv", rax=X87)
    puppet.session.control_events(0, EventId.XSETBV, True)
    yield puppet
    puppet.session.control_events(0, EventId.XSETBV, False)
    puppet.run(0, "xsetbv", rax=before)


@pytest.mark.rule("4.10")
def test_a_write_that_changes_xcr0_is_an_event(watched: Puppet) -> None:
    for value in (X87_AND_SSE, X87):
        events, result = watched.watch(0, "xsetbv", rax=value)
        seen = [(event.event, event.rip, event.registers.rax) for event in events]
        assert seen == unless(Fault.NO_XSETBV_EXIT, [(EventId.XSETBV, address("xsetbv"), value)])
        assert result.exceptions == 0


@pytest.mark.rule("4.10")
def test_the_write_is_made(watched: Puppet) -> None:
    # Where XSETBV makes no exit, its value does not outlive the next one.
    values = []
    for value in (X87_AND_SSE, X87):
        watched.watch(0, "xsetbv", rax=value)
        values.append(watched.run(0, "xgetbv").registers.rax)
    assert values == (unless(Fault.NO_XSETBV_EXIT, [X87_AND_SSE, X87]) or [X87, X87])


@pytest.mark.rule("4.10")
def test_a_write_of_the_same_value_is_no_event(watched: Puppet) -> None:
    assert watched.watch(0, "xsetbv", rax=X87)[0] == []
    events, _ = watched.watch(0, "xsetbv", rax=X87_AND_SSE)
    assert [event.event for event in events] == unless(Fault.NO_XSETBV_EXIT, [EventId.XSETBV])


@pytest.mark.rule("4.10")
def test_a_loop_of_writes_is_as_many_events(watched: Puppet) -> None:
    events, _ = watched.watch(0, "loop_xsetbv", rax=X87_AND_SSE, rbx=X87, r15=20)
    assert [event.registers.rax for event in events] == unless(Fault.NO_XSETBV_EXIT, [X87_AND_SSE, X87] * 10)


@pytest.mark.rule("4.10")
def test_a_value_that_xcr0_does_not_take_faults_in_the_guest_as_ever(watched: Puppet) -> None:
    _, result = watched.watch(0, "xsetbv", rax=NEITHER)
    assert (result.exceptions, result.vector, result.rip) == (1, GP, address("xsetbv"))


@pytest.mark.rule("4.34")
def test_switched_off_there_is_no_event(watched: Puppet) -> None:
    watched.session.control_events(0, EventId.XSETBV, False)
    assert watched.watch(0, "xsetbv", rax=X87_AND_SSE)[0] == []


@pytest.mark.rule("4.35")
def test_another_vcpu_is_not_watched(watched: Puppet) -> None:
    before = watched.run(1, "xgetbv").registers.rax
    watched.run(1, "xsetbv", rax=X87)
    watched.run(1, "xsetbv", rax=before)
