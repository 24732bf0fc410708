# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a night came to: ``night.json`` in its folder, beside ``hosts/NAME/`` with what each host has left."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import StrEnum
from math import isfinite
from pathlib import Path
from typing import Any, Self, TypeVar

from kvmi_host.lab.errors import NightError

FORMAT = 1
FILE = "night.json"

_MOST = 16 << 20  # bytes
_MOST_HOSTS = 1000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

T = TypeVar("T")


class State(StrEnum):
    """How a host's part of the night ended."""

    FINISHED = "finished"
    UNREACHABLE = "unreachable"
    """It was never connected to."""
    REFUSED = "refused"
    """It cannot: no introspection, no root, another suite at work."""
    DIED = "died"
    """It was reached, and is gone: powered off, or a box whose process ended."""
    REBOOTED = "rebooted"
    HUNG = "hung"
    """It answers, and its suite made no progress, or did not end in time."""
    LOST = "lost"
    """The network to it is gone, and did not come back."""
    INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class HostRun:
    """A host's part.

    :ivar reason: one sentence: what was tried, what happened, what to do. Empty where there is nothing to say.
    :ivar dirty: it may have been left with guests, modules or files of ours.
    :ivar status: pytest's exit status; None where it did not end.
    :ivar phases: seconds that each took, in their order.
    :ivar warnings: the kernel's complaints, each a few lines.
    """

    name: str
    state: State
    reason: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    dirty: bool = False
    status: int | None = None
    phases: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether its suite came to its end, no test failed and its kernel did not complain."""
        return self.state is State.FINISHED and self.status == 0 and not self.warnings


@dataclass(frozen=True)
class Night:
    """All hosts' parts. Times are ISO 8601, with their offset from UTC.

    :ivar version: of kvmi-host.
    :ivar revision: what ``git describe`` says of the tree; empty without one.
    """

    started: str
    ended: str
    version: str
    revision: str
    hosts: tuple[HostRun, ...]

    @property
    def passed(self) -> bool:
        """Whether every host's part passed."""
        return all(host.passed for host in self.hosts)

    def to_json(self) -> str:
        """The contents of ``night.json``."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read ``night.json``, whoever wrote it.

        :raise NightError: it is none, and where.
        """
        try:
            values = _Values("", json.loads(text))
        except (ValueError, RecursionError) as error:
            raise NightError(f"it is no JSON: {error}") from error
        if (number := values.take("format", int)) != FORMAT:
            raise NightError(f"its format is {number}, and {FORMAT} is known here")
        hosts = values.take("hosts", list)
        if len(hosts) > _MOST_HOSTS:
            raise NightError(f"hosts: more than {_MOST_HOSTS}")
        runs = tuple(_run(_Values(f"hosts[{index}]", host)) for index, host in enumerate(hosts))
        if len({run.name for run in runs}) != len(runs):
            raise NightError("hosts: two have the same name")
        return cls(
            started=values.read("started", _time, "a time of ISO 8601 with its offset"),
            ended=values.read("ended", _time, "a time of ISO 8601 with its offset"),
            version=values.take("version", str),
            revision=values.take("revision", str),
            hosts=runs,
        )


def read_night(folder: Path) -> Night:
    """The night of a folder.

    :raise NightError: there is none, or it cannot be used.
    """
    path = folder / FILE
    try:
        with path.open("rb") as file:
            data = file.read(_MOST + 1)
    except OSError as error:
        raise NightError(f"{path} cannot be read: {error.strerror}: is this the folder of a night?") from error
    if len(data) > _MOST:
        raise NightError(f"{path} has more than {_MOST} bytes")
    try:
        return Night.from_json(data.decode(errors="replace"))
    except NightError as error:
        raise NightError(f"{path}: {error}") from None


def _run(values: _Values) -> HostRun:
    status = values.of("status", (int, type(None)))
    phases = values.take("phases", dict)
    tags = values.take("tags", dict)
    warnings = values.take("warnings", list)
    if not all(isinstance(part, str) for part in (*warnings, *tags.values())):
        raise NightError(f"{values.where}: its tags and warnings have to be texts")
    return HostRun(
        name=values.read("name", _name, "letters, digits, dot, - and _, up to 64,"),
        state=values.read("state", State, f"one of {', '.join(State)}"),
        reason=values.take("reason", str),
        tags=tags,
        dirty=values.take("dirty", bool),
        status=status,
        phases={name: _duration(f"{values.where}.phases.{name}", seconds) for name, seconds in phases.items()},
        warnings=tuple(warnings),
    )


class _Values:
    """A table that is read key by key; what is missing or of another kind raises NightError."""

    def __init__(self, where: str, values: object) -> None:
        self.where = where
        if not isinstance(values, dict):
            raise NightError(f"{where or 'its top'} is no object")
        self._values = values

    def of(self, key: str, kinds: tuple[type, ...]) -> Any:
        """The value of a key, of one of these kinds. True is no number."""
        if key not in self._values:
            raise NightError(f"{self._path(key)} is missing")
        value = self._values[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise NightError(f"{self._path(key)} is {type(value).__name__}, not {kinds[0].__name__}")
        return value

    def take(self, key: str, kind: type[T]) -> T:
        """The value of a key, of this kind."""
        value: T = self.of(key, (kind,))
        return value

    def read(self, key: str, parse: Callable[[str], T], allowed: str) -> T:
        """What `parse` makes of a text."""
        text = self.take(key, str)
        try:
            return parse(text)
        except ValueError:
            raise NightError(f"{self._path(key)} = {text[:80]!r}: {allowed} belongs there") from None

    def _path(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):  # it names a folder, too
        raise ValueError
    return text


def _time(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError
    return text


def _duration(where: str, seconds: object) -> float:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not isfinite(seconds) or seconds < 0:
        raise NightError(f"{where}: seconds belong there")
    return float(seconds)
