# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keeping account of event sequence numbers: which came, which are missing, which came twice."""

from __future__ import annotations

_MASK = 0xFFFFFFFF
_HALF = 1 << 31


class SeqLedger:
    """Accounts for a session's event numbers, which count from 1 over all vCPUs and wrap at 2**32.

    Events of different vCPUs may arrive a little out of order, so a number is missing only as long as it has not come.

    :ivar seen: how many different numbers came.
    :ivar repeated: how many came again.
    """

    __slots__ = ("_ahead", "_expected", "_furthest", "repeated", "seen")

    def __init__(self) -> None:
        self.seen = 0
        self.repeated = 0
        self._expected = 1
        self._furthest = 0
        self._ahead: set[int] = set()

    def enter(self, seq: int) -> None:
        """Account for one event's seq."""
        distance = (seq - self._expected) & _MASK
        if distance >= _HALF or seq in self._ahead:
            self.repeated += 1
            return
        self.seen += 1
        if distance:
            self._ahead.add(seq)
            self._furthest = max(self._furthest, distance)
            return
        self._advance()
        while self._ahead and self._expected in self._ahead:
            self._ahead.remove(self._expected)
            self._advance()

    @property
    def missing(self) -> int:
        """How many numbers below the highest one have not come: the gaps."""
        return self._furthest + 1 - len(self._ahead) if self._ahead else 0

    def _advance(self) -> None:
        self._expected = (self._expected + 1) & _MASK
        self._furthest = max(self._furthest - 1, 0)
