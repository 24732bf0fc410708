# SPDX-License-Identifier: LGPL-2.1-or-later
"""How far pytest is, from what it writes with ``-v``: a line for each test, whose name comes when it begins."""

from __future__ import annotations

import codecs
import re

from kvmi_host.host.printable import printable

_COLLECTED = re.compile(r"\bcollected (\d{1,7}) items?(?: / (\d{1,7}) deselected)?(?: / (\d{1,7}) selected)?")
_NAME = re.compile(r"(\S+\.py::[^\s[]+(?:\[.*?\])?) ")
_OUTCOME = re.compile(r"(?:\S+\.py::.+ )?(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\s.*\[\s*\d{1,3}%\]\s*$")
_LONGEST = 1 << 16  # characters of a line


class Tally:
    """What of a suite is done.

    :ivar total: how many tests there will be; 0: not known yet.
    :ivar done: how many have ended.
    :ivar failed: the names of those that failed, in their order.
    :ivar current: the name of the one that runs.
    """

    def __init__(self) -> None:
        self.total = 0
        self.done = 0
        self.failed: list[str] = []
        self.current = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._rest = ""
        self._ended = ""

    def feed(self, piece: bytes) -> None:
        """Take a piece of the output."""
        *lines, rest = (self._rest + self._decoder.decode(piece)).split("\n")
        self._rest = rest[-_LONGEST:]
        for line in lines:
            self._take(line)
        self._begin(self._rest)

    def _take(self, line: str) -> None:
        if found := _COLLECTED.search(line):
            collected, deselected, selected = (int(number or 0) for number in found.groups())
            self.total = selected or collected - deselected
        self._begin(line)
        outcome = _OUTCOME.match(line)
        if outcome is None or not self.current:
            return
        if outcome[1] in {"FAILED", "ERROR"} and self.current not in self.failed:
            self.failed.append(self.current)
        if self.current != self._ended:  # what its fixtures do at the end may have an outcome of its own
            self.done += 1
        self._ended, self.current = self.current, ""

    def _begin(self, line: str) -> None:
        if found := _NAME.match(line):
            name = printable(found[1])
            self.current = name.rpartition("/")[2] if "::" in name.rpartition("/")[2] else name
