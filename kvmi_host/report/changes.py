# SPDX-License-Identifier: LGPL-2.1-or-later
"""What changed since the nights before, by host and test: pure comparison of outcomes.

A test is compared with what it came to when it was last run on that host: where a host was away last night, that is an
earlier one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from kvmi_host.report.history import LastKnown
from kvmi_host.report.suite import Outcome, Test


@dataclass(frozen=True, slots=True)
class Change:
    """A test of a host that came to something else than before; ``before`` is None where it was never run."""

    host: str
    test: Test
    before: LastKnown | None


@dataclass(frozen=True, slots=True)
class Changes:
    """What is different, each in the order of hosts and tests."""

    since: datetime
    """When the night before began."""

    new_failures: tuple[Change, ...]
    fixed: tuple[Change, ...]
    newly_not_applicable: tuple[Change, ...]
    still_failing: tuple[Change, ...]
    came: tuple[str, ...]
    went: tuple[str, ...]


def changes(
    tonight: Mapping[str, Iterable[Test]],
    last_night: Iterable[str],
    last_known: Mapping[tuple[str, str], LastKnown],
    since: datetime,
) -> Changes:
    """Compare a night with those before.

    :param tonight: each host's tests.
    :param last_night: the hosts of the night before, which began at `since`.
    :param last_known: what tests came to, by host and test.
    """
    new: list[Change] = []
    fixed: list[Change] = []
    not_applicable: list[Change] = []
    still: list[Change] = []
    for host, tests in tonight.items():
        for test in tests:
            before = last_known.get((host, test.id))
            change = Change(host, test, before)
            was = before.outcome if before else None
            if test.outcome is Outcome.FAILED:
                (still if was is Outcome.FAILED else new).append(change)
            elif was is Outcome.FAILED and test.outcome is Outcome.PASSED:
                fixed.append(change)
            elif was in (Outcome.PASSED, Outcome.FAILED) and test.outcome is Outcome.NOT_APPLICABLE:
                not_applicable.append(change)
    hosts = list(last_night)
    return Changes(
        since=since,
        new_failures=tuple(new),
        fixed=tuple(fixed),
        newly_not_applicable=tuple(not_applicable),
        still_failing=tuple(still),
        came=tuple(host for host in tonight if host not in hosts),
        went=tuple(host for host in hosts if host not in tonight),
    )
