# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the nights before have to say about a night."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from kvmi_host.report.changes import Changes, changes
from kvmi_host.report.history import PastNight, opened
from kvmi_host.report.results import NightResults

_NIGHTS = 60  # that the trend shows
_MOST = 1000  # failures that are looked up: the page shows fewer


@dataclass(frozen=True, slots=True)
class Since:
    """How long a test has been failing on a host: the first night, and how many they were, tonight not counted."""

    first: datetime
    nights: int


@dataclass(frozen=True, slots=True)
class Past:
    """All of it; nothing where there is no history.

    :ivar changes: since the night before; None where there is none.
    :ivar nights: up to this one, in the order of time.
    :ivar failing_since: of the tests that fail as before, by host and test.
    """

    changes: Changes | None = None
    nights: Sequence[PastNight] = ()
    failing_since: Mapping[tuple[str, str], Since] = field(default_factory=dict)


NO_PAST = Past()


def remember(results: NightResults, file: Path) -> Past:
    """Write a night to the history, and read what that has of the nights before.

    :raise HistoryError: it cannot be used.
    """
    with opened(file) as history:
        history.record(results.in_a_line(), results.outcomes())
        nights = history.nights(results.started, _NIGHTS)
        if len(nights) < 2:
            return Past(nights=nights)
        last_night = nights[-2]
        changed = changes(
            {host.name: host.tests for host in results.hosts},
            last_night.hosts,
            history.last_known(results.started),
            last_night.started,
        )
        failing = {}
        for change in changed.still_failing[:_MOST]:
            if since := history.failing_since(change.host, change.test.id, results.started):
                failing[change.host, change.test.id] = Since(*since)
        return Past(changed, nights, failing)
