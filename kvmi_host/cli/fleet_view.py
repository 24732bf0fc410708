# SPDX-License-Identifier: LGPL-2.1-or-later
"""What many hosts are at: a table on a terminal, and plain lines elsewhere. On standard error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvmi_host.lab.night import State
from kvmi_host.lab.part import Part

_STYLES = {State.FINISHED: "green", State.INTERRUPTED: "yellow"}
_EVERY = 60.0  # seconds between two lines about a suite's progress


@contextmanager
def watching() -> Iterator[Callable[[Part], None]]:
    """What shows hosts' parts while the block runs: to be called with each that has something new."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield Lines(console)
        return
    picture = Picture()
    with Live(console=console, get_renderable=picture.table, refresh_per_second=4):
        yield picture


class Picture:
    """A row for each host."""

    def __init__(self) -> None:
        self._parts: dict[str, Part] = {}

    def __call__(self, part: Part) -> None:
        self._parts[part.host.name] = part

    def table(self) -> Table:
        """As things are now."""
        table = Table(box=None, pad_edge=False)
        for title, justify in (
            ("host", "left"),
            ("", "left"),
            ("tests", "right"),
            ("failed", "right"),
            ("time", "right"),
        ):
            table.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]  # it is one of these
        table.add_column("now", no_wrap=True, overflow="ellipsis")
        for part in list(self._parts.values()):
            failed = len(part.tally.failed)
            now = part.result.reason if part.result else part.detail or part.tally.current
            table.add_row(
                Text(part.host.name, "bold"),
                _state(part),
                _count(part),
                Text(str(failed or ""), "bold red"),
                _clock(part),
                Text(now, "dim"),
            )
        return table


class Lines:
    """A line when a host goes over to something else, when a test fails, and now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._said: dict[str, tuple[str, str]] = {}
        self._failures: dict[str, int] = {}
        self._next: dict[str, float] = {}

    def __call__(self, part: Part) -> None:
        name = part.host.name
        with self._lock:
            new = part.tally.failed[self._failures.get(name, 0) :]
            self._failures[name] = len(part.tally.failed)
            for test in new:
                self._say(part, f"FAILED {test}")
            if part.result:
                reason = f": {part.result.reason}" if part.result.reason else ""
                self._say(
                    part, f"{_state(part)}, {_count(part) or 'no'} tests, {len(part.tally.failed)} failed{reason}"
                )
            elif (part.phase, part.detail) != self._said.get(name):
                self._say(part, f"{part.phase}{': ' if part.detail else ''}{part.detail}")
            elif part.phase == "suite" and monotonic() >= self._next.get(name, 0):
                self._say(part, f"{_count(part) or 'no'} tests so far, {part.tally.current or 'collecting'}")
            self._said[name] = (part.phase, part.detail)

    def _say(self, part: Part, text: str) -> None:
        self._next[part.host.name] = monotonic() + _EVERY
        self._console.print(Text(f"{_clock(part)} {part.host.name}: {text}"), soft_wrap=True)


def _state(part: Part) -> Text:
    if part.result is None:
        return Text(part.phase or "waits", "cyan")
    failed = part.result.state is State.FINISHED and not part.result.passed
    return Text(
        "failed" if failed else part.result.state, "bold red" if failed else _STYLES.get(part.result.state, "bold red")
    )


def _count(part: Part) -> str:
    tally = part.tally
    return f"{tally.done}/{tally.total}" if tally.total else ""


def _clock(part: Part) -> str:
    return f"{int(part.seconds) // 60}:{int(part.seconds) % 60:02}"
