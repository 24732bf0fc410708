# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every kind of event in turn, from every vCPU at once, as fast as they come."""

from __future__ import annotations

from collections import Counter

import pytest

from kvmi_host.protocol import EventId
from kvmi_host.testing.live import LiveGuest
from kvmi_host.testing.puppet import Puppet, page

pytestmark = pytest.mark.hardware

EVENTS = 400


def test_a_storm_without_introspection_is_none(puppet: Puppet) -> None:
    puppet.start(0, "storm", rsi=page(0))
    puppet.advances(0, 100)
    puppet.stop(0)
    result = puppet.finish(0)
    assert result.exceptions == result.counts[3] == puppet.progress(0)


def test_a_storm_of_events_leaves_no_gap(puppet: Puppet, puppet_guest: LiveGuest) -> None:
    session = puppet.session
    for vcpu in range(puppet_guest.vcpus):
        puppet.start(vcpu, "storm", rsi=page(vcpu))
        session.control_events(vcpu, EventId.HYPERCALL, True)
        session.control_events(vcpu, EventId.CR, True)
        session.control_cr(vcpu, 3, True)
    seen: Counter[tuple[int, int]] = Counter()
    for number in range(1, EVENTS + 1):
        event = puppet.event()
        assert event.seq == number
        seen[event.vcpu, event.event] += 1
        session.reply(event)
    assert len(seen) == puppet_guest.vcpus * 2
    for vcpu in range(puppet_guest.vcpus):
        puppet.stop(vcpu)
    for vcpu in range(puppet_guest.vcpus):
        puppet.watch_on(vcpu)
