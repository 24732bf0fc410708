# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a run of the hardware suite came to, as the JSON of ``--suite-report``: its host, rules, tests, measurements.

A rule has failed if one of its tests has; it has passed if all of them that were chosen have. It is not applicable
where it does not hold, or cannot be shown, and not run where none of its tests was chosen, or the run ended before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic

from kvmi_host.testing.rules import Host, Rule, Rules

FORMAT = 1
PASSED, FAILED, NOT_APPLICABLE, NOT_RUN = "passed", "failed", "not applicable", "not run"


@dataclass(slots=True)
class _Test:
    """A test; ``outcome``: empty until it is done, or where it was not chosen."""

    id: str
    rules: Sequence[Rule]
    chosen: bool
    outcome: str = ""
    message: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Measurement:
    """Values of one kind.

    :ivar at_seconds: when each was taken, if that matters.
    """

    name: str
    unit: str
    values: Sequence[float]
    at_seconds: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.at_seconds is not None and len(self.at_seconds) != len(self.values):
            raise ValueError(f"{self.name}: {len(self.values)} values at {len(self.at_seconds)} times")
        if not all(map(math.isfinite, [*self.values, *(self.at_seconds or ())])):
            raise ValueError(f"{self.name}: a value is no finite number")

    def as_json(self) -> dict[str, object]:
        """As the report has it."""
        times = {} if self.at_seconds is None else {"at_seconds": list(self.at_seconds)}
        return {"name": self.name, "unit": self.unit, **times, "values": list(self.values)}


@dataclass(frozen=True, slots=True)
class RuleOutcome:
    """What came of a rule: one of the four words, and why where that is not clear."""

    rule: Rule
    outcome: str
    reason: str
    tests: Sequence[str]


@dataclass(slots=True)
class SuiteReport:
    """A run.

    :ivar tests: by pytest's name for them.
    :ivar written: when the report was written last, by the clock that only goes on.
    """

    rules: Rules
    host: Host
    tests: dict[str, _Test] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    written: float = -math.inf

    def add_test(self, nodeid: str, rules: Sequence[Rule], *, chosen: bool, not_applicable: str = "") -> None:
        """A test of the suite.

        :param nodeid: pytest's name, with the path of the file.
        :param chosen: whether it is among those that were asked for.
        :param not_applicable: why it has nothing to show on this host.
        """
        file, _, name = nodeid.partition("::")
        test = self.tests[nodeid] = _Test(f"{Path(file).name}::{name}", rules, chosen)
        if not_applicable:
            test.outcome, test.message = NOT_APPLICABLE, not_applicable

    def done(self, nodeid: str, outcome: str, message: str = "") -> None:
        """A test, or its setup or teardown, has come to something. What failed first stays."""
        test = self.tests[nodeid]
        if test.outcome != FAILED:
            test.outcome, test.message = outcome, message

    def outcomes(self) -> list[RuleOutcome]:
        """What came of every rule, in their groups' order."""
        tests: dict[Rule, list[_Test]] = {rule: [] for rule in self.rules.rules.values()}
        for test in self.tests.values():
            for rule in test.rules:
                tests[rule].append(test)
        return [self._outcome(rule, its) for rule, its in tests.items()]

    def _outcome(self, rule: Rule, tests: Sequence[_Test]) -> RuleOutcome:
        ids = [test.id for test in tests]
        if reason := rule.not_here(self.host):
            return RuleOutcome(rule, NOT_APPLICABLE, reason, ids)
        done = [test for test in tests if test.chosen and test.outcome != NOT_APPLICABLE]
        if any(test.outcome == FAILED for test in done):
            return RuleOutcome(rule, FAILED, "", ids)
        if reason := rule.not_shown(self.host):
            return RuleOutcome(rule, NOT_APPLICABLE, reason, ids)
        if tests and all(test.outcome == NOT_APPLICABLE for test in tests):
            return RuleOutcome(rule, NOT_APPLICABLE, tests[0].message, ids)
        if not done:
            return RuleOutcome(rule, NOT_RUN, "none of its tests was chosen" if tests else "it has no test", ids)
        if unreached := sum(not test.outcome for test in done):
            reason = f"the run ended before {unreached} of its {len(done)} tests"
            return RuleOutcome(rule, NOT_RUN, reason, ids)
        return RuleOutcome(rule, PASSED, f"by {len(done)} of its {len(ids)} tests" if len(done) < len(ids) else "", ids)

    def as_json(self, ended: datetime) -> dict[str, object]:
        """The report."""
        host = {name: getattr(self.host, name) for name in ("name", "kernel", "cpu_vendor", "dialect", "paging")}
        return {
            "format": FORMAT,
            "host": {**host, "version": self.host.version},
            "started": self.started.isoformat(timespec="seconds"),
            "ended": ended.isoformat(timespec="seconds"),
            "groups": [{"id": id_, "title": title} for id_, title in self.rules.groups.items()],
            "rules": [
                {
                    "number": outcome.rule.number,
                    "group": outcome.rule.group,
                    "text": outcome.rule.text,
                    "outcome": outcome.outcome,
                    "reason": outcome.reason,
                    "tests": list(outcome.tests),
                }
                for outcome in self.outcomes()
            ],
            "tests": [
                {
                    "id": test.id,
                    "group": test.rules[0].group if test.rules else "",
                    "rules": [rule.number for rule in test.rules],
                    "seconds": round(test.seconds, 3),
                    "outcome": test.outcome,
                    "message": test.message,
                }
                for test in self.tests.values()
                if test.chosen and test.outcome
            ],
            "measurements": [measurement.as_json() for measurement in self.measurements],
        }

    def write(self, path: Path) -> None:
        """Write the report, as one that has ended now. A reader finds the last one or this one, never a part."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(self.as_json(datetime.now(UTC)), indent=1) + "\n")
        part.replace(path)
        self.written = monotonic()
