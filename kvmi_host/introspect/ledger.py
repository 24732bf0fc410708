# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keeping account of event sequence numbers: which came, which are missing, which came twice."""

from __future__ import annotations

_MASK = 0xFFFFFFFF
_HALF = 1 << 31

REMEMBERED = 4096
"""How many of the missing numbers are known by number: vCPUs overtake each other, and KVM has no more of them."""


class SeqLedger:
    """Accounts for a session's event numbers, which count from 1 over all vCPUs and wrap at 2**32.

    Events of different vCPUs may arrive a little out of order, so a number is missing only as long as it has not come.

    :ivar seen: how many different numbers came.
    :ivar missing: how many numbers below the highest one have not come: the gaps.
    :ivar repeated: how many came again, or too late to be told from those.
    """

    __slots__ = ("_expected", "_gaps", "missing", "repeated", "seen")

    def __init__(self) -> None:
        self.seen = 0
        self.missing = 0
        self.repeated = 0
        self._expected = 1
        self._gaps: dict[int, None] = {}  # the last missing numbers, oldest first

    def enter(self, seq: int) -> None:
        """Account for one event's seq."""
        ahead = (seq - self._expected) & _MASK
        if ahead < _HALF:
            if ahead:
                self._skip(ahead)
            self._expected = (seq + 1) & _MASK
        elif seq in self._gaps:
            del self._gaps[seq]
            self.missing -= 1
        else:
            self.repeated += 1
            return
        self.seen += 1

    def _skip(self, count: int) -> None:
        self.missing += count
        for distance in range(max(0, count - REMEMBERED), count):
            self._gaps[(self._expected + distance) & _MASK] = None
        while len(self._gaps) > REMEMBERED:
            del self._gaps[next(iter(self._gaps))]
