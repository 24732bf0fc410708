# SPDX-License-Identifier: LGPL-2.1-or-later
"""How many events come in a second, of each kind and in all."""

from __future__ import annotations

from collections import Counter, deque

HISTORY = 60
"""Seconds that are remembered, the current one included."""

_WINDOW = 5  # seconds that a rate is the mean of
_SECOND = 1_000_000_000


class Rates:
    """Counts events by kind, and by the second in which they came.

    :ivar counts: how many of each kind came in all.
    :ivar peak: the most that came in one second.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.peak = 0
        self._started_ns: int | None = None
        self._seconds: deque[tuple[int, Counter[str]]] = deque(maxlen=HISTORY)

    def enter(self, kind: str, time_ns: int) -> None:
        """Count one event. A clock that was set back does not matter: what comes then counts for the last second."""
        if self._started_ns is None:
            self._started_ns = time_ns
        second = time_ns // _SECOND
        if not self._seconds or second > self._seconds[-1][0]:
            self._seconds.append((second, Counter()))
        current = self._seconds[-1][1]
        current[kind] += 1
        self.counts[kind] += 1
        self.peak = max(self.peak, current.total())

    def per_second(self, now_ns: int) -> list[int]:
        """Events in each of the last :data:`HISTORY` seconds, oldest first; the last is the current one."""
        now = now_ns // _SECOND
        totals = {second: kinds.total() for second, kinds in self._seconds}
        return [totals.get(second, 0) for second in range(now - HISTORY + 1, now + 1)]

    def rate(self, kind: str, now_ns: int) -> float:
        """Events of a kind per second, over the last seconds."""
        if self._started_ns is None:
            return 0.0
        first = now_ns // _SECOND - _WINDOW + 1
        count = sum(kinds[kind] for second, kinds in self._seconds if second >= first)
        span = now_ns - max(first * _SECOND, self._started_ns)
        return count * _SECOND / max(span, _SECOND)
