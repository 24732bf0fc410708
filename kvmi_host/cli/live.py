# SPDX-License-Identifier: LGPL-2.1-or-later
"""The live view: what goes on in a session, on a terminal.

It is drawn by who runs the event loop, between two events, at most eight times a second, and so seldom that drawing
takes no more than a tenth of the time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic, time_ns

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvmi_host.cli.keyboard import Keyboard
from kvmi_host.cli.rates import HISTORY, Rates
from kvmi_host.cli.records import COLUMNS, Record, cells
from kvmi_host.cli.view import Situation, print_facts, print_summary

_DRAW_EVERY = 1 / 8  # seconds
_SHARE = 10  # drawing takes at most one part in so many
_MOST_EVENTS = 20
_MOST_KINDS = 6
_FRAME_LINES = 8  # what is not a kind or an event: heads, rate, blank lines, keys
_BAR = 24  # columns
_SPARKS = "▁▂▃▄▅▆▇█"
_SPARKS_ASCII = "_.-:=+*#"
_COLORS = ("cyan", "magenta", "yellow", "green", "blue", "red")
_STATES = {"running": "bold green", "paused": "bold yellow", "replay": "bold cyan"}


class LiveView:
    """Draws the state of things over itself; leaves its last picture and the summary."""

    def __init__(self, *, recorded: bool = False) -> None:
        """
        :param recorded: time is that of the last event, not the clock's.
        """
        self._recorded = recorded
        self._console = Console()
        self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
        self._keyboard: Keyboard | None = None
        self._sparks = _SPARKS if self._console.encoding.startswith("utf") else _SPARKS_ASCII
        self._rates = Rates()
        self._rows: deque[Sequence[str]] = deque(maxlen=_MOST_EVENTS)
        self._facts: Record = {}
        self._first_ns = self._last_ns = 0
        self._draw_at = 0.0
        self._situation = Situation("running")

    def session(self, facts: Record) -> None:
        print_facts(facts)
        self._facts = facts
        if not self._recorded:
            self._first_ns = self._last_ns = time_ns()
        self._keyboard = Keyboard()
        self._live.start()

    def event(self, record: Record) -> None:
        self._last_ns = record["time_ns"]
        self._first_ns = self._first_ns or self._last_ns
        self._rates.enter(record["event"], self._last_ns)
        self._rows.append(cells(record))

    def poll(self, situation: Callable[[], Situation]) -> str:
        now = monotonic()
        if now < self._draw_at or self._keyboard is None:
            return ""
        self._situation = situation()
        self._draw()
        self._draw_at = now + max(_DRAW_EVERY, _SHARE * (monotonic() - now))
        keys = self._keyboard.pressed()
        if keys:
            self._draw_at = 0.0  # what came of them is seen at once
        return keys

    def summary(self, summary: Record) -> None:
        if self._keyboard is not None:
            self._situation = Situation("ended", str(summary["ended"]))
            self._draw()
        self.close()
        print_summary(summary)

    def close(self) -> None:
        self._live.stop()
        if self._keyboard is not None:
            self._keyboard.close()
            self._keyboard = None

    def _draw(self) -> None:
        now = self._last_ns if self._recorded else time_ns()
        kinds = self._rates.counts.most_common(_MOST_KINDS)
        room = self._console.height - _FRAME_LINES - len(kinds)
        rows = list(self._rows)[-max(1, room) :]
        self._live.update(
            Group(
                self._head(now),
                self._spark_line(now),
                self._kinds(kinds, now),
                self._events(rows),
                self._keys(),
            ),
            refresh=True,
        )

    def _head(self, now: int) -> RenderableType:
        seconds = max(0, now - self._first_ns) // 1_000_000_000
        state = self._situation.state
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        head.add_column(justify="right", no_wrap=True)
        head.add_row(
            Text.assemble(
                (str(self._facts.get("name", "")), "bold"),
                f"  {self._facts.get('vcpus', '?')} vCPUs  ",
                (self._situation.detail, "dim"),
            ),
            Text.assemble((state, _STATES.get(state, "bold")), f" {seconds // 60:02}:{seconds % 60:02}"),
        )
        return head

    def _keys(self) -> RenderableType:
        keys = [Text.assemble((f" {key} ", "reverse"), f" {does}") for key, does in self._situation.keys]
        return Text("  ").join(keys)

    def _spark_line(self, now: int) -> RenderableType:
        history = self._rates.per_second(now)
        highest = max(history)
        steps = len(self._sparks) - 1
        # Any event at all is more than none, and only the most is the most.
        line = "".join(self._sparks[-(-count * steps // highest) if highest else 0] for count in history)
        width = max(10, min(HISTORY, self._console.width - 36))
        told = f" {self._rates.counts.total():,} events, {history[-2]:,}/s, peak {self._rates.peak:,}/s"
        return Text.assemble((line[-width:], "green"), told, no_wrap=True, overflow="crop")

    def _kinds(self, kinds: Sequence[tuple[str, int]], now: int) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(no_wrap=True)
        most = kinds[0][1] if kinds else 1
        for kind, count in kinds:
            rate = self._rates.rate(kind, now)
            bar = Bar(most, 0, count, width=_BAR, color=_color(kind))
            table.add_row(Text(kind, _color(kind)), f"{count:,}", f"{rate:,.1f}/s", bar)
        return table

    def _events(self, rows: Sequence[Sequence[str]]) -> RenderableType:
        table = Table(box=None, padding=(0, 1), header_style="dim", expand=True)
        for name, width in zip(COLUMNS, (10, 4, 12, 4, 18, None), strict=True):
            numeric = name in ("seq", "vCPU", "mode", "rip")
            table.add_column(
                name, justify="right" if numeric else "left", no_wrap=True, width=width, overflow="ellipsis"
            )
        for seq, vcpu, kind, *others in rows:
            table.add_row(*map(Text, (seq, vcpu)), Text(kind, _color(kind)), *map(Text, others))
        return table


def _color(kind: str) -> str:
    """The same for a kind in every session."""
    return _COLORS[sum(kind.encode()) % len(_COLORS)]
