# SPDX-License-Identifier: LGPL-2.1-or-later
"""The live view: what goes on in a session, on a terminal.

It is drawn by who runs the event loop, between two events: at most eight times a second, and while events come one upon
the other so seldom that drawing takes no more than a tenth of the time. The vCPUs wait for the loop, not for the view.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic, time_ns

from rich.console import Console
from rich.live import Live
from rich.text import Text

from kvmi_host.cli.keyboard import Keyboard
from kvmi_host.cli.rates import HISTORY, Rates
from kvmi_host.cli.records import COLUMNS, LINE, Record, cells
from kvmi_host.cli.view import Situation, print_facts, print_summary

_DRAW_EVERY = 1 / 8  # seconds
_LOOK_EVERY = 1 / 16  # ... for keys
_SHARE = 10  # drawing takes at most one part in so many
_MOST_EVENTS = 20
_MOST_KINDS = 6
_FRAME_LINES = 5  # what is not a kind or an event: both heads, the rate, the keys, and where the cursor is
_BAR = 24  # columns
_SPARKS = "▁▂▃▄▅▆▇█"
_SPARKS_ASCII = "_.-:=+*#"
_COLORS = ("cyan", "magenta", "yellow", "green", "blue", "red")
_KIND_AT = (16, 28)  # where a line of LINE has the kind of its event
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
        self._look_at = self._draw_at = self._rested_at = 0.0
        self._busy = False  # whether an event came since we were called last
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
        self._busy = True

    def poll(self, situation: Callable[[], Situation]) -> str:
        now = monotonic()
        busy, self._busy = self._busy, False
        if now < self._look_at or self._keyboard is None:
            return ""
        self._look_at = now + _LOOK_EVERY
        if now >= (self._rested_at if busy else self._draw_at):
            self._situation = situation()
            self._draw()
            drawn = monotonic()
            self._draw_at = max(now + _DRAW_EVERY, drawn + _LOOK_EVERY)
            self._rested_at = max(now + _DRAW_EVERY, now + _SHARE * (drawn - now))
        keys = self._keyboard.pressed()
        if keys:  # what comes of them is seen at once
            self._look_at = self._draw_at = self._rested_at = 0.0
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
        # One text of whole lines: tables that measure their cells take five times as long.
        lines = [self._head(now), self._spark_line(now), *self._kinds(kinds, now), *_events(rows), self._keys()]
        picture = Text("\n", no_wrap=True, overflow="ellipsis").join(lines)
        self._live.update(picture, refresh=True)

    def _head(self, now: int) -> Text:
        seconds = max(0, now - self._first_ns) // 1_000_000_000
        state = self._situation.state
        right = Text.assemble(" ", (state, _STATES.get(state, "bold")), f" {seconds // 60:02}:{seconds % 60:02}")
        head = Text.assemble(
            (str(self._facts.get("name", "")), "bold"),
            f"  {self._facts.get('vcpus', '?')} vCPUs  ",
            (self._situation.detail, "dim"),
        )
        head.truncate(max(1, self._console.width - len(right)), overflow="ellipsis", pad=True)
        return head + right

    def _keys(self) -> Text:
        keys = [Text.assemble((f" {key} ", "reverse"), f" {does}") for key, does in self._situation.keys]
        return Text("  ").join(keys)

    def _spark_line(self, now: int) -> Text:
        history = self._rates.per_second(now)
        highest = max(history)
        steps = len(self._sparks) - 1
        # Any event at all is more than none, and only the most is the most.
        line = "".join(self._sparks[-(-count * steps // highest) if highest else 0] for count in history)
        width = max(10, min(HISTORY, self._console.width - 36))
        told = f" {self._rates.counts.total():,} events, {history[-2]:,}/s, peak {self._rates.peak:,}/s"
        return Text.assemble((line[-width:], "green"), told)

    def _kinds(self, kinds: Sequence[tuple[str, int]], now: int) -> list[Text]:
        most = kinds[0][1] if kinds else 1
        lines = []
        for kind, count in kinds:
            told = f" {count:>10,} {self._rates.rate(kind, now):>11,.1f}/s "
            bar = self._sparks[-1] * -(-_BAR * count // most)
            lines.append(Text.assemble((f"{kind:<12}", _color(kind)), told, (bar, _color(kind))))
        return lines


def _events(rows: Sequence[Sequence[str]]) -> list[Text]:
    lines = [Text(LINE.format(*COLUMNS), "dim")]
    for row in rows:
        line = Text(LINE.format(*row))
        line.stylize(_color(row[2]), *_KIND_AT)
        lines.append(line)
    return lines


def _color(kind: str) -> str:
    """The same for a kind in every session."""
    return _COLORS[sum(kind.encode()) % len(_COLORS)]
