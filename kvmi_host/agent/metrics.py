# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the agent counts, and how Prometheus is given it.

Events are counted on the path that a guest waits for, so counting is no more than adding to a number; the families that
the client library knows are made of them when someone scrapes. Everything is counted and scraped on one thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from enum import StrEnum
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from kvmi_host.protocol import event_name

MAX_VMS = 1000
"""VMs whose numbers are kept when their sessions have ended; those of VMs that went first are dropped for others."""

_BOUNDS = (25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 0.1, 0.5, 1.0, 5.0)


class Trouble(StrEnum):
    """What can go wrong; the label ``type`` of ``kvmi_errors_total``."""

    HANDSHAKE = "handshake"
    """Somebody connected and was dropped."""
    SESSION = "session"
    """A session ended because its kernel end broke the protocol, or did not answer."""
    REFUSED = "refused"
    """A handler wants what its session may not do."""
    HANDLER = "handler"
    """A handler raised, or could not be set up."""
    CONFIG = "config"
    """The configuration could not be read again."""
    INTERNAL = "internal"
    """A bug in the agent."""


class Histogram:
    """How long something took, in seconds."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BOUNDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """It took so long once more."""
        self._counts[bisect_left(_BOUNDS, seconds)] += 1
        self._sum += seconds

    def family(self, name: str, help_text: str) -> Metric:
        """What was observed until now."""
        bounds = [*map(str, _BOUNDS), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        return HistogramMetricFamily(name, help_text, buckets=buckets, sum_value=self._sum)


class VmCounts:
    """The numbers of the VMs that have one name.

    :ivar events: by kind.
    :ivar sessions: how many there are now.
    """

    __slots__ = ("events", "handler_errors", "sessions")

    def __init__(self) -> None:
        self.events: Counter[int] = Counter()
        self.handler_errors = 0
        self.sessions = 0


class Metrics(Collector):
    """All of them. A collector of :mod:`prometheus_client`.

    :ivar handling: from an event's arrival until it was answered: of some events, see
        :mod:`~kvmi_host.agent.metered`.
    :ivar round_trips: of GET_VERSION: there, the kernel's receiving thread, and back.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.handling = Histogram()
        self.round_trips = Histogram()
        self.errors: Counter[Trouble] = Counter()
        self._sessions_begun = 0
        self._vms: dict[str, VmCounts] = {}
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def session_begins(self, vm: str) -> VmCounts:
        """The numbers of the VM with that name, until :meth:`session_ends`."""
        counts = self._vms.pop(vm, None) or VmCounts()
        self._vms[vm] = counts  # the last place: of those who began last
        counts.sessions += 1
        self._sessions_begun += 1
        if len(self._vms) > MAX_VMS:
            gone = next((name for name, others in self._vms.items() if not others.sessions), None)
            self._vms.pop(gone or "", None)
        return counts

    def session_ends(self, counts: VmCounts) -> None:
        """The other end of :meth:`session_begins`."""
        counts.sessions -= 1

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        events = CounterMetricFamily("kvmi_events", "Events that handlers were called with.", labels=["vm", "kind"])
        handler_errors = CounterMetricFamily("kvmi_handler_errors", "Exceptions of handlers.", labels=["vm"])
        for vm, counts in self._vms.items():
            for kind, count in counts.events.items():
                events.add_metric([vm, event_name(kind)], count)
            handler_errors.add_metric([vm], counts.handler_errors)
        yield events
        yield handler_errors
        sessions = sum(counts.sessions for counts in self._vms.values())
        yield GaugeMetricFamily("kvmi_sessions", "VMs that are attached now.", value=sessions)
        yield CounterMetricFamily("kvmi_sessions_begun", "VMs that were ever attached.", value=self._sessions_begun)
        errors = CounterMetricFamily("kvmi_errors", "What went wrong, by type.", labels=["type"])
        for trouble in Trouble:
            errors.add_metric([trouble], self.errors[trouble])
        yield errors
        yield self.handling.family("kvmi_event_seconds", "From an event's arrival until it was answered; some events.")
        yield self.round_trips.family("kvmi_round_trip_seconds", "Round trip of the command GET_VERSION.")
