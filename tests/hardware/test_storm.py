# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every kind of event in turn, from every vCPU at once, as fast as they come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from kvmi_host.introspect import Session
from kvmi_host.protocol import Access, EventId, msr_index
from kvmi_host.testing.emulators import Fault, unless
from kvmi_host.testing.live import LiveGuest
from kvmi_host.testing.puppet import Puppet, page

pytestmark = pytest.mark.hardware

EVENTS = 600
BP = 3
SWITCHED = {EventId.CR, EventId.MSR, EventId.XSETBV, EventId.BREAKPOINT, EventId.HYPERCALL, EventId.PF}
SEEN = SWITCHED - {EventId.XSETBV} | set(unless(Fault.NO_XSETBV_EXIT, [EventId.XSETBV]))


def begin(puppet: Puppet, vcpus: int) -> None:
    """Have every vCPU make every kind of event."""
    session = puppet.session
    session.set_page_access({page(vcpu): Access.R for vcpu in range(vcpus)})
    for vcpu in range(vcpus):
        puppet.start(vcpu, "storm", rsi=page(vcpu))
        puppet.advances(vcpu)
        session.control_cr(vcpu, 3, True)
        session.control_msr(vcpu, msr_index("lstar"), True)
    for vcpu in range(vcpus):
        for event in SWITCHED:
            session.control_events(vcpu, event, True)


def test_without_introspection_it_is_none(puppet: Puppet) -> None:
    puppet.start(0, "storm", rsi=page(0))
    puppet.advances(0, 100)
    puppet.stop(0)
    result = puppet.finish(0)
    assert result.exceptions == result.counts[BP] == puppet.progress(0)


@pytest.mark.rule("4.80", "4.39")
def test_no_event_is_lost_and_no_number_left_out(puppet: Puppet, puppet_guest: LiveGuest) -> None:
    begin(puppet, puppet_guest.vcpus)
    seen: Counter[tuple[int, int]] = Counter()
    for number in range(1, EVENTS + 1):
        event = puppet.event()
        assert event.seq == number
        seen[event.vcpu, event.event] += 1
        puppet.session.reply(event)
    assert set(seen) == {(vcpu, event) for vcpu in range(puppet_guest.vcpus) for event in SEEN}
    for vcpu in range(puppet_guest.vcpus):
        puppet.stop(vcpu)
    for vcpu in range(puppet_guest.vcpus):
        _, result = puppet.watch_on(vcpu)
        assert result.exceptions == result.counts[BP] == puppet.progress(vcpu)


@pytest.mark.rule("2.20", "2.21")
@pytest.mark.parametrize("answered", [0, 1, 7, 50])
def test_a_session_that_ends_in_the_midst_of_it_leaves_the_guest_well(
    puppet: Puppet, puppet_guest: LiveGuest, hooked: Callable[..., Session], answered: int
) -> None:
    begin(puppet, puppet_guest.vcpus)
    for _ in range(answered):
        puppet.session.reply(puppet.event())
    puppet.session.close()
    again = Puppet(hooked(puppet_guest))
    for vcpu in range(puppet_guest.vcpus):
        again.advances(vcpu, 10)
        again.stop(vcpu)
        result = again.finish(vcpu)
        assert result.exceptions == result.counts[BP] == again.progress(vcpu)
