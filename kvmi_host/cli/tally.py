# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a session's summary counts."""

from __future__ import annotations

from collections import Counter
from time import monotonic, perf_counter_ns
from typing import Any

from kvmi_host.introspect import SeqLedger, Session
from kvmi_host.protocol import Event, EventId, event_name

_SAMPLE_EVERY = 16  # events
_MAX_SAMPLES = 10_000


class Tally:
    """Counts events, and measures now and then how long the command GET_VERSION takes.

    Its round trip is that of the socket and the kernel's receiving thread, measured in this process from before the
    command is sent until its answer is decoded. It involves no vCPU. Events that arrive in between are received, so it
    is a little longer under load.
    """

    def __init__(self) -> None:
        self.events = 0
        self.ended = "running"
        self._kinds: Counter[str] = Counter()
        self._modes: Counter[int] = Counter()
        self._vcpus: Counter[int] = Counter()
        self._seqs = SeqLedger()
        self._round_trips: list[int] = []
        self._started = monotonic()

    def enter(self, event: Event) -> None:
        """Count an event."""
        self.events += 1
        self._kinds[event_name(event.event)] += 1
        self._seqs.enter(event.seq)
        if event.event != EventId.UNHOOK:  # the VM's own: no vCPU sent it
            self._modes[event.mode] += 1
            self._vcpus[event.vcpu] += 1

    @property
    def sample_due(self) -> bool:
        """Whether it is time to measure again."""
        return len(self._round_trips) <= min(self.events // _SAMPLE_EVERY, _MAX_SAMPLES)

    def sample(self, session: Session) -> None:
        """Measure one round trip of GET_VERSION.

        :raise SessionError: the session ended or is stuck.
        """
        start = perf_counter_ns()
        session.get_version()
        self._round_trips.append(perf_counter_ns() - start)

    def summary(self, seconds: float | None = None) -> dict[str, Any]:
        """The last line of ``attach --json``. ``seq_gaps`` counts the numbers that never came.

        :param seconds: how long it took; since this was made, if None.
        """
        if seconds is None:
            seconds = monotonic() - self._started
        ordered = sorted(self._round_trips)
        return {
            "events": self.events,
            "by_kind": dict(self._kinds.most_common()),
            "modes": {str(mode): self._modes[mode] for mode in sorted(self._modes)},
            "by_vcpu": {str(vcpu): self._vcpus[vcpu] for vcpu in sorted(self._vcpus)},
            "seq_gaps": self._seqs.missing,
            "seq_repeated": self._seqs.repeated,
            "seconds": round(seconds, 3),
            "events_per_second": round(self.events / seconds, 1) if seconds else 0.0,
            "round_trip": {
                "of": "get-version",
                "samples": len(ordered),
                "median_us": _percentile(ordered, 50),
                "p99_us": _percentile(ordered, 99),
            },
            "ended": self.ended,
        }


def _percentile(ordered_ns: list[int], percent: int) -> float | None:
    if not ordered_ns:
        return None
    return round(ordered_ns[(len(ordered_ns) - 1) * percent // 100] / 1000, 1)
