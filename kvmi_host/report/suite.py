# SPDX-License-Identifier: LGPL-2.1-or-later
"""``suite.json``: what the suite on one host came to. It comes from that host, which may be broken or worse.

So nothing in it is trusted: the file, its lists and its texts are bounded, texts hold nothing that a terminal or XML
could not take, and numbers are finite. Keys that are not known are passed over, for the host's suite may be newer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from kvmi_host.host.printable import printable
from kvmi_host.report.errors import SuiteUnreadable

FORMAT = 1
LATENCY, RATE, GAPS = "event round trip", "soak: events a second", "soak: gaps"
"""Names of the measurements that the report knows what to make of."""

_MAX_FILE = 32 << 20  # bytes
_MAX_TESTS = 20_000
_MAX_RULES = 1_000
_MAX_GROUPS = 200
_MAX_MEASUREMENTS = 200
_MAX_VALUES = 200_000  # of a measurement
_MAX_NUMBER = 1e15
_MAX_NAME = 500  # characters, of what names something; longer ones are cut
_MAX_SENTENCE = 800  # of a rule, or why it was not run
_MAX_TEXT = 4_000  # of a message
_MAX_OF_A_TEST = 200  # rules that a test is for, and tests that a rule has

T = TypeVar("T")


class Outcome(StrEnum):
    """What became of a test, or of a rule."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_APPLICABLE = "not applicable"
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of the interface on this host. ``reason`` says why it was not applicable or not run."""

    number: str
    group: str
    text: str
    outcome: Outcome
    reason: str = ""
    tests: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Test:
    """A test on this host. ``group`` is empty where it is about our own software; ``seconds`` is what it took.

    ``own``: it is none of suite.json's, but stands for the host itself.
    """

    __test__ = False  # pytest: this is none of yours

    id: str
    group: str
    outcome: Outcome
    message: str = ""
    rules: tuple[str, ...] = ()
    seconds: float = 0.0
    own: bool = False


@dataclass(frozen=True, slots=True)
class Measurement:
    """Numbers of a unit; ``at_seconds``, if there, has the time of each since the measurement began."""

    name: str
    unit: str
    values: tuple[float, ...]
    at_seconds: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Suite:
    """A whole file. ``host`` is what the host says of itself; ``groups`` are titles by id, in the order of the page."""

    host: Mapping[str, str]
    groups: Mapping[str, str]
    rules: tuple[Rule, ...]
    tests: tuple[Test, ...]
    measurements: tuple[Measurement, ...]

    def measured(self, name: str) -> Measurement | None:
        """The measurement of that name, if there is one with values."""
        return next((one for one in self.measurements if one.name == name and one.values), None)


def read_suite(path: Path) -> Suite:
    """Read a file.

    :raise SuiteUnreadable: it cannot be read, or is not what a suite writes.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise SuiteUnreadable(error.strerror or str(error)) from error
    if len(data) > _MAX_FILE:
        raise SuiteUnreadable(f"more than {_MAX_FILE >> 20} MiB")
    return suite_from(data)


def suite_from(data: bytes) -> Suite:
    """What the bytes of a file say.

    :raise SuiteUnreadable: they are not what a suite writes.
    """
    try:
        found = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise SuiteUnreadable(printable(f"it is no JSON: {error}")) from error
    try:
        return _suite(found)
    except ValueError as error:
        raise SuiteUnreadable(printable(str(error))) from error


def _suite(found: object) -> Suite:
    top = _table(found, "the file")
    if top.get("format") != FORMAT:
        raise ValueError(f"format is {_shown(top.get('format'))}, and this kvmi-host reads format {FORMAT}")
    host = _table(top.get("host", {}), "host")
    groups = _list(top, "groups", _MAX_GROUPS, _group)
    return Suite(
        host={_name(key): _name(value) for key, value in list(host.items())[:50] if isinstance(value, str)},
        groups=dict(groups),
        rules=_unique(_list(top, "rules", _MAX_RULES, _rule), "rules", lambda rule: rule.number),
        tests=_unique(_list(top, "tests", _MAX_TESTS, _test), "tests", lambda test: test.id),
        measurements=tuple(_list(top, "measurements", _MAX_MEASUREMENTS, _measurement)),
    )


def _group(item: Mapping[str, Any]) -> tuple[str, str]:
    return _key(item, "id"), _name(item.get("title", ""))


def _rule(item: Mapping[str, Any]) -> Rule:
    return Rule(
        number=_key(item, "number"),
        group=_name(item.get("group", "")),
        text=_sentence(item.get("text", "")),
        outcome=_outcome(item, Outcome),
        reason=_sentence(item.get("reason", "")),
        tests=_names(item, "tests"),
    )


def _test(item: Mapping[str, Any]) -> Test:
    return Test(
        id=_key(item, "id"),
        group=_name(item.get("group", "")),
        outcome=_outcome(item, (Outcome.PASSED, Outcome.FAILED, Outcome.NOT_APPLICABLE)),
        message=_text(item.get("message", "")),
        rules=_names(item, "rules"),
        seconds=_number(item.get("seconds", 0)),
    )


def _measurement(item: Mapping[str, Any]) -> Measurement:
    values = _numbers(item, "values")
    times = _numbers(item, "at_seconds") if item.get("at_seconds") is not None else ()
    if times and len(times) != len(values):
        raise ValueError(f"{len(times)} at_seconds, and {len(values)} values")
    return Measurement(_key(item, "name"), _name(item.get("unit", "")), values, times)


# -- what values are read as; each raises ValueError for one that it does not take


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _table(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {_shown(value)}, and an object belongs there")
    return value


def _list(item: Mapping[str, Any], key: str, limit: int, read: Callable[[Mapping[str, Any]], T]) -> list[T]:
    found = []
    for index, each in enumerate(_items(item, key, limit)):
        try:
            found.append(read(_table(each, "it")))
        except ValueError as error:
            raise ValueError(f"{key}[{index}]: {error}") from error
    return found


def _items(item: Mapping[str, Any], key: str, limit: int) -> list[Any]:
    value = item.get(key, [])
    if not isinstance(value, list):
        raise ValueError(f"{key} is {_shown(value)}, and a list belongs there")
    if len(value) > limit:
        raise ValueError(f"{key} has {len(value):,} items, more than {limit:,}")
    return value


def _names(item: Mapping[str, Any], key: str) -> tuple[str, ...]:
    return tuple(map(_name, _items(item, key, _MAX_OF_A_TEST)))


def _numbers(item: Mapping[str, Any], key: str) -> tuple[float, ...]:
    return tuple(map(_number, _items(item, key, _MAX_VALUES)))


def _key(item: Mapping[str, Any], key: str) -> str:
    if not (name := _name(item.get(key, ""))):
        raise ValueError(f"it has no {key}")
    return name


def _name(value: object) -> str:
    return _cut(value, _MAX_NAME).replace("\n", " ")


def _sentence(value: object) -> str:
    return _cut(value, _MAX_SENTENCE)


def _text(value: object) -> str:
    return _cut(value, _MAX_TEXT)


def _cut(value: object, limit: int) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{_shown(value)} is there, and a text belongs there")
    return printable(value if len(value) <= limit else value[: limit - 2] + " …")


def _number(value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and abs(value) <= _MAX_NUMBER:  # NaN is not, nor infinity
        return float(value)
    raise ValueError(f"{_shown(value)} is there, and a number belongs there")


def _outcome(item: Mapping[str, Any], allowed: Sequence[Outcome] | type[Outcome]) -> Outcome:
    value = item.get("outcome")
    for outcome in allowed:
        if value == outcome.value:
            return outcome
    raise ValueError(f"outcome is {_shown(value)}, and one of {', '.join(allowed)} belongs there")


def _unique(items: Sequence[T], what: str, name: Callable[[T], str]) -> tuple[T, ...]:
    seen = set()
    for item in items:
        if (this := name(item)) in seen:
            raise ValueError(f"{what}: {this} is there twice")
        seen.add(this)
    return tuple(items)


def _shown(value: object) -> str:
    """A value as an error shows it, in a few characters."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) > 1 << 64:
        return "a huge number"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
