# SPDX-License-Identifier: LGPL-2.1-or-later
"""The page of a night: one HTML file that loads nothing, and shows everything without JavaScript.

What is to be seen is put together here, how it looks is in ``night.html``, ``night.css`` and ``night.js`` beside this
file. The page's own policy (CSP) admits that style sheet and that script by their hashes, and nothing else: should a
text of a host ever come through as markup, it could neither run nor load anything.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from kvmi_host.report import charts
from kvmi_host.report.changes import Change, Changes
from kvmi_host.report.history import PastNight
from kvmi_host.report.past import NO_PAST, Past, Since
from kvmi_host.report.pytest_report import shown
from kvmi_host.report.results import HostResults, NightResults
from kvmi_host.report.scales import duration, number, percentile
from kvmi_host.report.suite import GAPS, LATENCY, RATE, Measurement, Outcome, Rule, Test

OWN_SOFTWARE = "The host's own software"
"""What tests of no group are shown under."""

MARKS = {Outcome.PASSED: "✓", Outcome.FAILED: "✕", Outcome.NOT_APPLICABLE: "○", Outcome.NOT_RUN: "·"}

_MOST_SHOWN = 200  # of failed tests, and of each kind of change
_MOST_OTHER = 500  # rows of a group's tests that are for no rule
_FEW = 3  # tests of the same change that are seen at once
_MOST_TESTS = 20  # named under a rule

_DECADES = 1e6  # that the axis of latencies has at most, from its end down

_ERROR_CODE = re.compile(r"-E[A-Z]+")

_HERE = Path(__file__).parent


@dataclass(slots=True)
class _Failure:
    """A test that failed, with the hosts that it failed on, by what it said there."""

    test: Test
    anchor: str
    said: dict[str, list[tuple[HostResults, Since | None]]] = field(default_factory=dict)
    shown: dict[str, str] = field(default_factory=dict)
    """What pytest showed on the first of the hosts that said so."""


@dataclass(slots=True)
class _Same:
    """A change that is the same for all of these tests. ``where`` has one of them for each host."""

    where: Sequence[Change]
    message: str
    tests: list[Test] = field(default_factory=list)


@dataclass(slots=True)
class _Row:
    """A rule, or a test of no rule, with what it came to on each host; None where the host does not know it."""

    number: str
    text: str
    cells: list[Outcome | None]
    notes: list[tuple[str, str, str]] = field(default_factory=list)
    """Outcome, hosts, and why."""
    tests: list[str] = field(default_factory=list)

    @property
    def kinds(self) -> str:
        """For the filter."""
        return " ".join(sorted({outcome.value.replace(" ", "-") for outcome in self.cells if outcome}))


@dataclass(frozen=True, slots=True)
class _Charts:
    """A host's charts, and the numbers that go with them."""

    latency: Markup | None
    percentiles: Sequence[tuple[str, str]]
    events: int
    soak: Markup | None


def page_of(results: NightResults, past: Past = NO_PAST) -> str:
    """The page. Without a past, it neither compares nor shows a trend."""
    style, script = ((_HERE / name).read_text() for name in ("night.css", "night.js"))
    hosts, since = results.hosts, past.failing_since
    groups = _groups(hosts)
    rows = {key: found for key in groups if (found := _rows(hosts, key))}
    anchors = {key: f"group-{place}" for place, key in enumerate(rows, 1)}
    failures = _failures(hosts, since)
    return _template().render(
        policy=f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        style=Markup(style),
        script=Markup(script),
        results=results,
        Outcome=Outcome,
        changes=past.changes,
        new=_kinds_of_change(past.changes) if past.changes else (),
        groups=groups,
        matrix=[(anchors.get(key), title, [_counts(host, key) for host in hosts]) for key, title in groups.items()],
        charts={host.name: each for host, each in zip(hosts, _charts(hosts), strict=True)},
        failures=failures[:_MOST_SHOWN],
        failures_left=len(failures) - _MOST_SHOWN,
        anchors={failure.test.id: failure.anchor for failure in failures[:_MOST_SHOWN]},
        rules=[(anchors[key], groups[key], found) for key, found in rows.items()],
        nights=past.nights,
        trend=_trend(hosts, past.nights),
        pass_rate=charts.pass_rate(past.nights) if len(past.nights) > 1 else None,
        most_shown=_MOST_SHOWN,
        few=_FEW,
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        duration=duration, number=number, day=_day, anchor=_anchor, mark=MARKS.__getitem__, whole=_whole
    )
    return environment.get_template("night.html")


def _groups(hosts: Iterable[HostResults]) -> dict[str, str]:
    """Titles by id, in the order of the hosts' pages; then those that no page has, and what belongs to none."""
    suites = [host.suite for host in hosts if host.suite]
    groups = {key: title or key for suite in suites for key, title in suite.groups.items()}
    for suite in suites:
        for group in (*(test.group for test in suite.tests), *(rule.group for rule in suite.rules)):
            groups.setdefault(group, group)
    if "" in groups:
        del groups[""]
        groups[""] = OWN_SOFTWARE
    return groups


def _counts(host: HostResults, group: str) -> Mapping[Outcome, int] | None:
    """How many tests of a group came to what; None where the host has no results."""
    if not host.suite:
        return None
    tests = [test for test in host.suite.tests if test.group == group]
    return {outcome: sum(test.outcome is outcome for test in tests) for outcome in Outcome}


def _failures(hosts: Iterable[HostResults], since: Mapping[tuple[str, str], Since]) -> list[_Failure]:
    """The failed tests: hosts and kernels first, the same test on several hosts together."""
    found: dict[str, _Failure] = {}
    for host in hosts:
        traces = shown(host.junit)
        for test in host.tests:
            if test.outcome is Outcome.FAILED:
                failure = found.setdefault(test.id, _Failure(test, f"failure-{len(found) + 1}"))
                if test.message not in failure.shown and test.id in traces:
                    failure.shown[test.message] = traces[test.id]
                failure.said.setdefault(test.message, []).append((host, since.get((host.name, test.id))))
    return sorted(found.values(), key=lambda failure: not failure.test.own)


def _kinds_of_change(changes: Changes) -> list[tuple[str, str, int, list[_Same]]]:
    """Style, title, how many, and the changes, what matters most first."""
    kinds = (
        ("failed", "New failures", changes.new_failures),
        ("passed", "Fixed", changes.fixed),
        ("na", "Newly not applicable", changes.newly_not_applicable),
    )
    return [(style, title, len(found), _together(found[:_MOST_SHOWN])) for style, title, found in kinds if found]


def _together(changes: Iterable[Change]) -> list[_Same]:
    """Changes that are the same on several hosts, and of several tests, as one; hosts and kernels come first."""
    by_test: dict[tuple[str, str], list[Change]] = {}
    for change in changes:
        by_test.setdefault((change.test.id, change.test.message), []).append(change)
    found: dict[tuple[object, ...], _Same] = {}
    for (_, message), same in by_test.items():
        where = tuple((change.host, change.before) for change in same)
        found.setdefault((where, message, same[0].test.own), _Same(same, message)).tests.append(same[0].test)
    return sorted(found.values(), key=lambda same: not same.tests[0].own)


def _rows(hosts: Sequence[HostResults], group: str) -> list[_Row]:
    """The rules of a group, then its tests that are for no rule."""
    rules: dict[str, list[Rule | None]] = {}
    for index, host in enumerate(hosts):
        for rule in host.suite.rules if host.suite else ():
            if rule.group == group:
                rules.setdefault(rule.number, [None] * len(hosts))[index] = rule
    rows = [_row(hosts, number, cells) for number, cells in rules.items()]
    tests: dict[str, list[Outcome | None]] = {}
    why: dict[str, dict[tuple[str, str], list[str]]] = {}
    for index, host in enumerate(hosts):
        for test in host.suite.tests if host.suite else ():
            if test.group == group and not test.rules:
                tests.setdefault(test.id, [None] * len(hosts))[index] = test.outcome
                if test.outcome is Outcome.NOT_APPLICABLE:
                    why.setdefault(test.id, {}).setdefault((test.outcome.value, test.message), []).append(host.name)
    for name, cells in list(tests.items())[:_MOST_OTHER]:
        notes = [(outcome, ", ".join(names), reason) for (outcome, reason), names in why.get(name, {}).items()]
        rows.append(_Row("", name, cells, notes))
    return rows


def _row(hosts: Sequence[HostResults], number: str, rules: Sequence[Rule | None]) -> _Row:
    known = [rule for rule in rules if rule]
    tests = dict.fromkeys(test for rule in known for test in rule.tests)
    why: dict[tuple[str, str], list[str]] = {}
    for host, rule in zip(hosts, rules, strict=True):
        if rule and rule.outcome is Outcome.FAILED:
            failed = [test for test in rule.tests if test in host.failed]
            why.setdefault((rule.outcome.value, ", ".join(failed[:_FEW]) or rule.reason), []).append(host.name)
        elif rule and rule.reason:
            why.setdefault((rule.outcome.value, rule.reason), []).append(host.name)
    return _Row(
        number,
        known[0].text,
        [rule.outcome if rule else None for rule in rules],
        [(outcome, ", ".join(names), reason) for (outcome, reason), names in why.items()],
        list(tests)[:_MOST_TESTS],
    )


def _charts(hosts: Sequence[HostResults]) -> list[_Charts]:
    """Each host's charts; the axis of the latencies is the same for all."""
    latencies = [_above_zero(host.suite.measured(LATENCY) if host.suite else None) for host in hosts]
    everything = [value for values in latencies for value in (values[:1] + values[-1:])]
    top = max(everything, default=10) * 1.15
    domain = (max(min(everything, default=1) / 1.15, top / _DECADES), top)
    found = []
    for host, values in zip(hosts, latencies, strict=True):
        measured = host.suite.measured if host.suite else lambda name: None
        latency, rates = measured(LATENCY), _over_time(measured(RATE))
        unit = _unit(latency.unit) if latency else ""
        told = [(f"p{percent}", percentile(values, percent)) for percent in (50, 90, 99) if values]
        told += [("max", values[-1])] if values else []
        found.append(
            _Charts(
                charts.latency(values, domain, unit) if values else None,
                [(name, f"{number(value)} {unit}") for name, value in told],
                len(values),
                charts.soak(rates, _over_time(measured(GAPS)) or None) if rates else None,
            )
        )
    return found


def _above_zero(measurement: Measurement | None) -> list[float]:
    """Values in order, those that a logarithmic axis has a place for."""
    return sorted(value for value in measurement.values if value > 0) if measurement else []


def _over_time(measurement: Measurement | None) -> list[charts.Point]:
    return sorted(zip(measurement.at_seconds, measurement.values, strict=False)) if measurement else []


def _trend(
    hosts: Iterable[HostResults], nights: Sequence[PastNight]
) -> list[tuple[str, Markup, Markup | None, str, str]]:
    """Of each host: name, its nights, its latencies, the last of them, and the middle of them all."""
    found = []
    for host in hosts if len(nights) > 1 else ():
        past = [night.hosts.get(host.name) for night in nights]
        latencies = [each.latency if each else None for each in past]
        known = sorted(value for value in latencies if value is not None)
        latency = host.latency()
        found.append(
            (
                host.name,
                charts.strip(host.name, nights),
                charts.sparkline(host.name, latencies) if known else None,
                f"{number(latency)} µs" if latency is not None else "",
                f"{number(percentile(known, 50))} µs" if known else "",
            )
        )
    return found


def _unit(unit: str) -> str:
    return "µs" if unit == "us" else unit


def _day(time: datetime) -> str:
    return f"{time.day} {time:%B %Y}"


def _anchor(text: str) -> str:
    """A text as an id, which has no blanks."""
    return text.replace(" ", "_")


def _whole(text: str) -> Markup:
    """A sentence whose error codes are not broken after their sign."""
    return Markup(_ERROR_CODE.sub(r'<span class="whole">\g<0></span>', str(escape(text))))


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
