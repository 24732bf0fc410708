# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sequence numbers: one counter a session, shared by its vCPUs, from 1, without gaps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from kvmi_host.introspect import Session
from kvmi_host.protocol import EventId
from kvmi_host.testing.live import LiveGuest, Walker
from kvmi_host.testing.modewalk import Actions, Station

pytestmark = pytest.mark.hardware


@pytest.mark.rule("4.38")
def test_the_first_event_of_a_session_is_number_1(walker: Walker) -> None:
    walker.enable(EventId.HYPERCALL, 0)
    assert walker.event().seq == 1


@pytest.mark.rule("4.40")
def test_each_session_counts_from_1(guest: LiveGuest, hooked: Callable[..., Session]) -> None:
    for _ in range(3):
        session = hooked(guest)
        walker = Walker(session, guest.vcpus)
        walker.enable(EventId.HYPERCALL, 0)
        assert [event.seq for event in walker.answered(3)] == [1, 2, 3]
        session.close()


@pytest.mark.rule("4.39")
def test_four_vcpus_that_fire_at_once_share_one_count(walker: Walker) -> None:
    for vcpu in walker.vcpus:
        walker.hold(vcpu, Station.LONG64)
    walker.enable(EventId.HYPERCALL)
    walker.enable(EventId.CR, cr=3)
    events = [(event.seq, event.vcpu) for event in walker.answered(400)]
    assert [seq for seq, _ in events] == list(range(1, 401))
    assert min(Counter(vcpu for _, vcpu in events).values()) >= 20
    assert {vcpu for _, vcpu in events} == set(walker.vcpus)


@pytest.mark.rule("4.41")
def test_pause_events_are_counted_with_the_others(walker: Walker) -> None:
    walker.enable(EventId.HYPERCALL, 0)
    first = walker.event()
    walker.session.pause_vcpu(1)
    second = walker.event()
    assert (first.seq, second.seq) == (1, 2)
    assert (first.event, second.event) == (EventId.HYPERCALL, EventId.PAUSE_VCPU)


@pytest.mark.rule("4.39")
def test_a_hundred_walks_of_four_vcpus_leave_no_gap(walker: Walker) -> None:
    walker.enable(EventId.HYPERCALL)
    seqs = [event.seq for event in walker.answered(4 * 8 * 25)]
    assert seqs == list(range(1, len(seqs) + 1))


@pytest.mark.rule("1.3")
def test_two_vms_count_for_themselves(guest: LiveGuest, own_guest: LiveGuest, hooked: Callable[..., Session]) -> None:
    walkers = [Walker(hooked(guest), guest.vcpus), Walker(hooked(own_guest), own_guest.vcpus)]
    for walker in walkers:
        walker.hold(0, Station.PROT32, Actions.HYPERCALL)
        walker.enable(EventId.HYPERCALL, 0)
    for number in range(1, 21):
        events = [walker.event() for walker in walkers]
        assert [event.seq for event in events] == [number, number]
        for walker, event in zip(walkers, events, strict=True):
            walker.session.reply(event)
