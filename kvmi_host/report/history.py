# SPDX-License-Identifier: LGPL-2.1-or-later
"""The nights before, in a file of SQLite's: what each test came to on each host, and what each host came to.

A night is known by when it started: one that is written again takes the place of what it wrote before. Counts are kept
for good, outcomes of tests for the last :data:`KEPT` nights. Several processes may use a file at once: each write is
one transaction, for which the others wait.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from kvmi_host.report.errors import HistoryError
from kvmi_host.report.suite import Outcome

KEPT = 90
"""Nights whose tests' outcomes are kept: as far back as "failing since" can tell."""

VERSION = 1
_APPLICATION = 0x6B766D69  # "kvmi": what tells our files from others of SQLite
_WAIT = 60.0  # seconds that another process may take to write a night

_SCHEMA = """
CREATE TABLE night (
    id INTEGER PRIMARY KEY,
    started TEXT NOT NULL UNIQUE,  -- ISO 8601, UTC, to the microsecond: their order is that of time
    version TEXT NOT NULL,
    revision TEXT NOT NULL,
    passed INTEGER NOT NULL
) STRICT;
CREATE TABLE host (
    night INTEGER NOT NULL REFERENCES night ON DELETE CASCADE,
    name TEXT NOT NULL,
    state TEXT NOT NULL,
    passed INTEGER NOT NULL,          -- tests, as the next two
    failed INTEGER NOT NULL,
    not_applicable INTEGER NOT NULL,
    latency REAL,                     -- microseconds, the median of an event's round trip
    PRIMARY KEY (night, name)
) STRICT, WITHOUT ROWID;
CREATE TABLE test (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT;
CREATE TABLE outcome (
    night INTEGER NOT NULL REFERENCES night ON DELETE CASCADE,
    host TEXT NOT NULL,
    test INTEGER NOT NULL REFERENCES test,
    outcome TEXT NOT NULL,
    PRIMARY KEY (host, test, night)
) STRICT, WITHOUT ROWID;
CREATE INDEX outcome_of_night ON outcome (night);
"""

_LAST_KNOWN = """
SELECT outcome.host, test.name, outcome.outcome, max(night.started)
FROM outcome JOIN night ON night.id = outcome.night JOIN test ON test.id = outcome.test
WHERE night.started < :now
GROUP BY outcome.host, outcome.test
"""
"""SQLite takes the other columns from the row that has the maximum."""

_FAILING_SINCE = """
WITH before AS (
    SELECT night.started AS started, outcome.outcome AS outcome
    FROM outcome JOIN night ON night.id = outcome.night JOIN test ON test.id = outcome.test
    WHERE outcome.host = :host AND test.name = :test AND night.started < :now
)
SELECT min(started), count(*) FROM before
WHERE outcome = 'failed'
    AND started > coalesce((SELECT max(started) FROM before WHERE outcome <> 'failed'), '')
"""


@dataclass(frozen=True, slots=True)
class PastHost:
    """What a host came to in a night: tests by outcome, and the median of an event's round trip in microseconds."""

    state: str
    passed: int
    failed: int
    not_applicable: int
    latency: float | None = None


@dataclass(frozen=True, slots=True)
class PastNight:
    """A night in a line."""

    started: datetime
    passed: bool
    hosts: Mapping[str, PastHost]
    version: str = ""
    revision: str = ""


@dataclass(frozen=True, slots=True)
class LastKnown:
    """What a test came to when it was last run on a host, and in which night."""

    outcome: Outcome
    night: datetime


class History:
    """An open file, inside one transaction: see :func:`opened`."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def record(self, night: PastNight, outcomes: Iterable[tuple[str, str, Outcome]]) -> None:
        """Write a night, in place of what it wrote before.

        :param outcomes: hosts, names of tests, and what they came to.
        """
        run = self._database.execute
        started = _text_of(night.started)
        run("DELETE FROM night WHERE started = ?", (started,))
        (number,) = run(
            "INSERT INTO night (started, version, revision, passed) VALUES (?, ?, ?, ?) RETURNING id",
            (started, night.version, night.revision, night.passed),
        ).fetchone()
        for name, host in night.hosts.items():
            counts = (host.passed, host.failed, host.not_applicable)
            run("INSERT INTO host VALUES (?, ?, ?, ?, ?, ?, ?)", (number, name, host.state, *counts, host.latency))
        tests = dict(run("SELECT name, id FROM test"))
        for host_name, test, outcome in outcomes:
            if test not in tests:
                (tests[test],) = run("INSERT INTO test (name) VALUES (?) RETURNING id", (test,)).fetchone()
            run("INSERT OR REPLACE INTO outcome VALUES (?, ?, ?, ?)", (number, host_name, tests[test], outcome.value))
        run(
            "DELETE FROM outcome WHERE night IN (SELECT id FROM night ORDER BY started DESC LIMIT -1 OFFSET ?)",
            (KEPT,),
        )
        run("DELETE FROM test WHERE id NOT IN (SELECT test FROM outcome)")

    def nights(self, until: datetime, count: int) -> list[PastNight]:
        """The last `count` nights up to one, that one included, in the order of time."""
        run = self._database.execute
        rows = run(
            "SELECT id, started, passed, version, revision FROM night WHERE started <= ? ORDER BY started DESC LIMIT ?",
            (_text_of(until), count),
        ).fetchall()
        nights = []
        for number, started, passed, version, revision in reversed(rows):
            hosts = run(
                "SELECT name, state, passed, failed, not_applicable, latency FROM host WHERE night = ? ORDER BY name",
                (number,),
            )
            past = {name: PastHost(*values) for name, *values in hosts}
            nights.append(PastNight(_time_of(started), bool(passed), past, version, revision))
        return nights

    def last_known(self, before: datetime) -> dict[tuple[str, str], LastKnown]:
        """What each test came to on each host, by host and name, when it was last run there before that night."""
        rows = self._database.execute(_LAST_KNOWN, {"now": _text_of(before)})
        return {
            (host, test): LastKnown(_outcome_of(outcome), _time_of(started)) for host, test, outcome, started in rows
        }

    def failing_since(self, host: str, test: str, before: datetime) -> tuple[datetime, int] | None:
        """The first of the failures on end that a test had on a host until that night, and how many they are."""
        since, count = self._database.execute(
            _FAILING_SINCE, {"host": host, "test": test, "now": _text_of(before)}
        ).fetchone()
        return (_time_of(since), count) if count else None


@contextmanager
def opened(path: Path) -> Iterator[History]:
    """A file, made if it is not there. What is written is there for others when the block ends well.

    :raise HistoryError: it is none of ours, or newer than this program, or another process keeps it.
    """
    try:
        with closing(sqlite3.connect(path, timeout=_WAIT, isolation_level=None)) as database:
            database.execute("PRAGMA foreign_keys = ON")
            database.execute("BEGIN IMMEDIATE")
            _prepare(database, path)
            yield History(database)
            database.execute("COMMIT")
    except sqlite3.Error as error:
        raise HistoryError(
            f"{path}: the history cannot be used: {error}: name another file, or move this one away to begin anew"
        ) from error


def _prepare(database: sqlite3.Connection, path: Path) -> None:
    """Make the tables of a new file; see that an old one is ours."""
    (application,) = database.execute("PRAGMA application_id").fetchone()
    (version,) = database.execute("PRAGMA user_version").fetchone()
    (tables,) = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if not application and not version and not tables:
        for statement in _SCHEMA.split(";\n"):
            database.execute(statement)
        database.execute(f"PRAGMA application_id = {_APPLICATION}")
        database.execute(f"PRAGMA user_version = {VERSION}")
    elif application != _APPLICATION:
        raise HistoryError(f"{path}: it is a database, and no history of kvmi-host's: name another file")
    elif version != VERSION:
        raise HistoryError(
            f"{path}: its format is {version}, and this kvmi-host knows {VERSION}: use the newer one, or another file"
        )


def _text_of(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="microseconds")


def _time_of(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise HistoryError(f"the history is damaged: {text!r} is no time: begin another file") from error


def _outcome_of(text: str) -> Outcome:
    try:
        return Outcome(text)
    except ValueError as error:
        raise HistoryError(f"the history is damaged: {text!r} is no outcome: begin another file") from error
