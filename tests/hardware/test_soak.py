# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events for long: every kind that the guest can make, from every vCPU, as fast as they are answered. How many a second
is measured; that none is missing, and that nothing grows, is held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from time import monotonic, perf_counter_ns
from typing import NamedTuple

import pytest

from kvmi_host.host.footprint import Footprint, footprint
from kvmi_host.protocol import Access, Event, EventId, msr_index
from kvmi_host.testing.emulators import Fault, unless
from kvmi_host.testing.live import LiveGuest
from kvmi_host.testing.puppet import Puppet, Result, address, page

pytestmark = pytest.mark.hardware

BP = 3
XSETBVS = unless(Fault.NO_XSETBV_EXIT, [EventId.XSETBV] * 2)
A_ROUND = Counter([EventId.CR, EventId.MSR, EventId.HYPERCALL, EventId.BREAKPOINT, EventId.PF, *XSETBVS])
"""The events of one round of the guest's storm."""
INTERVALS = 10
MOST_GROWTH_KIB = 4096
"""Of QEMU, once it has been warmed up. A page for each event would be more."""
ROUND_TRIPS = 1000


class Interval(NamedTuple):
    """A stretch of the soak.

    :ivar at: seconds since its beginning, at the interval's end.
    :ivar rate: events a second.
    :ivar gaps: event numbers that were left out, or came twice.
    """

    at: float
    rate: float
    gaps: int


class Soak:
    """The events of a session, answered one after the other, and what is known of them.

    :ivar seen: how many by vCPU and kind.
    """

    def __init__(self, puppet: Puppet) -> None:
        self.puppet = puppet
        self.seen: Counter[tuple[int, int]] = Counter()
        self._due = 1
        self._gaps = 0

    def answer(self, event: Event) -> None:
        """Count an event, and reply to it."""
        self.seen[event.vcpu, event.event] += 1
        self._gaps += event.seq != self._due
        self._due = event.seq + 1
        self.puppet.session.reply(event)

    def begin(self, vcpus: int) -> None:
        """Have every vCPU begin its storm, with all of its events on from the first instruction."""
        session = self.puppet.session
        session.set_page_access({page(vcpu): Access.R for vcpu in range(vcpus)})
        for vcpu in range(vcpus):
            session.control_events(vcpu, EventId.HYPERCALL, True)
            self.puppet.start(vcpu, "announced", r14=address("storm"), rsi=page(vcpu))
        announced = [self.puppet.event() for _ in range(vcpus)]
        for event in announced:
            session.control_cr(event.vcpu, 3, True)
            session.control_msr(event.vcpu, msr_index("lstar"), True)
            for kind in A_ROUND:
                session.control_events(event.vcpu, kind, True)
        for event in announced:
            assert event.seq == self._due
            self._due += 1
            session.reply(event)

    def go_on(self, seconds: float, since: float) -> Interval:
        """Answer events for a while."""
        begun, gaps, events = monotonic(), self._gaps, 0
        while (now := monotonic()) < begun + seconds:
            self.answer(self.puppet.event())
            events += 1
        return Interval(now - since, events / (now - begun), self._gaps - gaps)

    def end(self, vcpus: int) -> list[Result]:
        """Have every vCPU finish its round, and answer what comes of it."""
        for vcpu in range(vcpus):
            self.puppet.stop(vcpu)
        return [self.puppet.watch_on(vcpu, self.answer)[1] for vcpu in range(vcpus)]


def resident_kib(pid: int) -> int:
    """How much memory a process has."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def held(footprint: Footprint) -> int:
    return footprint.objects.total()


@pytest.mark.rule("4.80", "4.81", "4.39")
def test_no_event_is_lost_and_nothing_grows_however_long_it_goes_on(
    puppet: Puppet, puppet_guest: LiveGuest, pytestconfig: pytest.Config, measured: Callable[..., None]
) -> None:
    seconds = pytestconfig.getoption("--soak-seconds")
    vcpus = puppet_guest.vcpus
    soak = Soak(puppet)
    soak.begin(vcpus)
    since = monotonic()
    intervals = [soak.go_on(seconds / INTERVALS, since)]  # what is allocated once, is by now
    before, resident = footprint(), resident_kib(puppet_guest.pid)
    intervals += [soak.go_on(seconds / INTERVALS, since) for _ in range(INTERVALS - 1)]
    after, grown = footprint(), resident_kib(puppet_guest.pid) - resident
    results = soak.end(vcpus)

    at = [interval.at for interval in intervals]
    measured("soak: events a second", "1/s", [interval.rate for interval in intervals], at_seconds=at)
    measured("soak: gaps", "", [interval.gaps for interval in intervals], at_seconds=at)
    assert [interval.gaps for interval in intervals] == [0] * INTERVALS
    # The guest's own count of its rounds tells how many there have to be of each.
    for vcpu, result in enumerate(results):
        rounds = puppet.progress(vcpu)
        assert rounds > 0
        assert result.exceptions == result.counts[BP] == rounds
        due = {kind: count * rounds for kind, count in A_ROUND.items()}
        due[EventId.CR] += rounds % 2  # back to the page table of the beginning
        assert {kind: count for (of, kind), count in soak.seen.items() if of == vcpu} == due
    assert held(after) - held(before) < sum(soak.seen.values()) / 10, f"{after.objects - before.objects}"
    assert grown < MOST_GROWTH_KIB


@pytest.mark.rule("4.52")
def test_every_round_trip_of_an_event_is_measured(puppet: Puppet, measured: Callable[..., None]) -> None:
    """From one event to the next: the reply, its way to the vCPU, the guest's loop, and the event's way back."""
    session = puppet.session
    session.control_events(0, EventId.HYPERCALL, True)
    puppet.start(0, f"loop_{puppet.hypercall()}", rax=34, rdi=24, r15=ROUND_TRIPS + 1)
    event = puppet.event()
    times = []
    for _ in range(ROUND_TRIPS):
        begun = perf_counter_ns()
        session.reply(event)
        event = puppet.event()
        times.append((perf_counter_ns() - begun) / 1000)
    session.reply(event)
    assert puppet.finish(0).exceptions == 0
    assert event.seq == ROUND_TRIPS + 1
    measured("event round trip", "us", times)
