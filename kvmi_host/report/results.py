# SPDX-License-Identifier: LGPL-2.1-or-later
"""A night's folder, read: each host's part, its suite, and the checks that follow from both.

A host that did not come to its end and a kernel that complained count as failed tests of their own. They are called
:data:`THE_HOST` and :data:`THE_LOG` everywhere: on the page, in junit.xml and in the history.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from xml.etree.ElementTree import Element

from kvmi_host.host.printable import printable
from kvmi_host.lab.night import HostRun, Night, State, read_night
from kvmi_host.report.errors import ReportError, SuiteUnreadable
from kvmi_host.report.history import PastHost, PastNight
from kvmi_host.report.pytest_report import read_junit
from kvmi_host.report.suite import LATENCY, Outcome, Suite, Test, read_suite

THE_HOST, THE_LOG = "the host itself", "the kernel's log"

LOGS = ("pytest.log", "dmesg.log", "console.log", "junit.xml", "suite.json")
"""What a host may have left in its folder, in the order in which people look."""

_MAX_TEXT = 4_000  # characters, of a reason or a complaint
_MAX_TAG = 200
_MAX_WARNINGS = 20


@dataclass(frozen=True, slots=True)
class HostResults:
    """A host's part of a night.

    :ivar run: how it went, from night.json.
    :ivar suite: what its suite came to; None where there is no suite.json that can be read.
    :ivar unreadable: why there is none, as a sentence; empty where there is one, or need not be.
    :ivar logs: files in its folder, by their path from the night's.
    :ivar tests: its suite's, and those of our own.
    :ivar failed: the names of those that failed.
    :ivar junit: the test suites of its junit.xml.
    :ivar no_junit: why that cannot be read; empty where it can, or is not there.
    """

    run: HostRun
    suite: Suite | None
    unreadable: str
    logs: tuple[str, ...]
    tests: tuple[Test, ...]
    failed: frozenset[str]
    junit: Sequence[Element]
    no_junit: str

    @property
    def name(self) -> str:
        """As in the inventory."""
        return self.run.name

    def count(self, outcome: Outcome) -> int:
        """How many of its tests came to that. Those of our own count where they failed: nobody wrote them."""
        return sum(test.outcome is outcome and not (test.own and outcome is Outcome.PASSED) for test in self.tests)

    @property
    def tags(self) -> Mapping[str, str]:
        """The inventory's, as they may be shown."""
        return {printable(tag[:_MAX_TAG]): printable(value[:_MAX_TAG]) for tag, value in self.run.tags.items()}

    @property
    def reason(self) -> str:
        """The sentence of night.json, as it may be shown."""
        return printable(self.run.reason[:_MAX_TEXT])

    @property
    def warnings(self) -> tuple[str, ...]:
        """The kernel's complaints, as they may be shown."""
        return tuple(printable(text[:_MAX_TEXT]) for text in self.run.warnings[:_MAX_WARNINGS])

    def latency(self) -> float | None:
        """The median of an event's round trip, in microseconds."""
        measured = self.suite.measured(LATENCY) if self.suite else None
        return median(measured.values) if measured else None


@dataclass(frozen=True, slots=True)
class NightResults:
    """A whole night."""

    night: Night
    hosts: tuple[HostResults, ...]

    @property
    def started(self) -> datetime:
        """With its offset from UTC."""
        return datetime.fromisoformat(self.night.started)

    @property
    def ended(self) -> datetime:
        """With its offset from UTC."""
        return datetime.fromisoformat(self.night.ended)

    @property
    def passed(self) -> bool:
        """Whether there were hosts, and nothing failed on any: neither a test, nor the host, nor its kernel."""
        return bool(self.hosts) and self.night.passed and not self.count(Outcome.FAILED)

    def count(self, outcome: Outcome) -> int:
        """How many tests of all hosts came to that."""
        return sum(host.count(outcome) for host in self.hosts)

    def in_a_line(self) -> PastNight:
        """What the history keeps of it, besides the tests."""
        hosts = {
            host.name: PastHost(
                host.run.state.value,
                host.count(Outcome.PASSED),
                host.count(Outcome.FAILED),
                host.count(Outcome.NOT_APPLICABLE),
                host.latency(),
            )
            for host in self.hosts
        }
        return PastNight(self.started, self.passed, hosts, self.night.version, self.night.revision)

    def outcomes(self) -> Iterator[tuple[str, str, Outcome]]:
        """Each host, test and what it came to."""
        for host in self.hosts:
            for test in host.tests:
                yield host.name, test.id, test.outcome


def read_results(folder: Path) -> NightResults:
    """Read a night's folder. What a host has broken is that host's failure, and breaks no other's results.

    :raise NightError: there is no night.json, or it cannot be used.
    """
    night = read_night(folder)
    return NightResults(night, tuple(_host(folder, run) for run in night.hosts))


def _host(folder: Path, run: HostRun) -> HostResults:
    place = f"hosts/{run.name}"
    logs = tuple(f"{place}/{name}" for name in LOGS if (folder / place / name).is_file())
    file = folder / place / "suite.json"
    suite, unreadable = None, ""
    if file.exists():
        try:
            suite = read_suite(file)
        except SuiteUnreadable as error:
            unreadable = f"Its suite.json is unreadable: {error}."
    elif run.state is State.FINISHED:
        unreadable = "It has left no suite.json, so what its tests came to is not known."
    its = suite.tests if suite else ()
    tests = (*_own(run, its, unreadable), *its)
    failed = frozenset(test.id for test in tests if test.outcome is Outcome.FAILED)
    return HostResults(run, suite, unreadable, logs, tests, failed, *_junit(folder / place / "junit.xml"))


def _junit(file: Path) -> tuple[Sequence[Element], str]:
    """Its suites, or why there are none."""
    if not file.exists():
        return (), ""
    try:
        return read_junit(file), ""
    except ReportError as error:
        return (), f"Its junit.xml is unreadable: {error}."


def _own(run: HostRun, tests: tuple[Test, ...], unreadable: str) -> Iterator[Test]:
    """The tests that the host and its kernel are."""
    wrong = []
    if run.state is not State.FINISHED:
        wrong.append(printable(run.reason[:_MAX_TEXT]) or f"It is {run.state}, and nobody has said why.")
    elif run.status != 0 and not any(test.outcome is Outcome.FAILED for test in tests) and not run.warnings:
        ended = "did not end" if run.status is None else f"ended with status {run.status}"
        wrong.append(f"pytest {ended}, and no test of suite.json failed: its log says why.")
    wrong += [unreadable] if unreadable else []
    yield Test(THE_HOST, "", Outcome.FAILED if wrong else Outcome.PASSED, " ".join(wrong), own=True)
    if run.state not in (State.UNREACHABLE, State.REFUSED):
        complaints = "\n\n".join(printable(text[:_MAX_TEXT]) for text in run.warnings[:_MAX_WARNINGS])
        yield Test(THE_LOG, "", Outcome.FAILED if run.warnings else Outcome.PASSED, complaints, own=True)
