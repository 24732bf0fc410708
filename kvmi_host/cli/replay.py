# SPDX-License-Identifier: LGPL-2.1-or-later
"""``kvmi-host replay``: a session that is over, shown as attach showed it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import closing
from time import monotonic, sleep
from typing import IO, Annotated, cast

import typer

from kvmi_host.cli.options import Json
from kvmi_host.cli.recorded import Line, recorded_lines
from kvmi_host.cli.signals import noted_signals
from kvmi_host.cli.view import Situation, View, view_for
from kvmi_host.recording import DISSECTOR, FIRST_BYTE, BadRecording

app = typer.Typer(add_completion=False)

_NAP = 0.1  # seconds that a key waits at most
_LONGEST_LINE = 1 << 20


def _show_dissector(wanted: bool) -> None:
    if wanted:
        typer.echo(DISSECTOR)
        raise typer.Exit


@app.command()
def replay(
    file: Annotated[
        typer.FileBinaryRead,
        typer.Argument(metavar="FILE", help="What attach --record wrote or --json printed; - for a pipe."),
    ],
    as_json: Json = False,
    speed: Annotated[
        float | None, typer.Option(min=0.001, metavar="FACTOR", help="1: as fast as it was, 2: twice; else at once.")
    ] = None,
    dissector: Annotated[
        bool,
        typer.Option(
            "--dissector",
            callback=_show_dissector,
            is_eager=True,
            help="Show where Wireshark's dissector is: wireshark -X lua_script:PATH FILE.",
        ),
    ] = False,
) -> None:
    """Show a recorded session, or one that comes through a pipe."""
    # A pipe's reader that returns what there is, where standard input may be something else in its place.
    stream = cast(IO[bytes], file if hasattr(file, "peek") else io.BufferedReader(cast(io.RawIOBase, file)))
    recorded = cast(io.BufferedReader, stream).peek(1)[:1] == FIRST_BYTE
    lines = recorded_lines(stream) if recorded else _printed(stream, file.name)
    with noted_signals() as signalled, closing(view_for(as_json, recorded=True)) as view:
        pace = _Pace(view, speed, signalled)
        for where, line in lines:
            try:
                if "session" in line:
                    view.session(line["session"])
                elif "summary" in line:
                    view.summary(line["summary"])
                elif pace.wait_for(line["time_ns"]):
                    view.event(line)
                else:
                    break
            except (KeyError, TypeError, ValueError) as error:
                raise BadRecording(f"{where} is nothing that attach --json prints: {error!r}") from None


class _Pace:
    """When the next event is due, and what the keys of the live view say about it."""

    def __init__(self, view: View, speed: float | None, signalled: list[str]) -> None:
        self._view = view
        self._speed = speed
        self._signalled = signalled
        self._paused = False
        self._steps = 0
        self._quit = False
        self._last_ns: int | None = None
        self._due = monotonic()

    def wait_for(self, time_ns: int) -> bool:
        """Wait until the event of that time is due; False: no more of them."""
        if self._speed and self._last_ns is not None:
            self._due = max(self._due, monotonic() - _NAP) + max(0, time_ns - self._last_ns) / 1e9 / self._speed
        self._last_ns = time_ns
        while True:
            self._press(self._view.poll(self._situation))
            if self._quit or self._signalled:
                return False
            if self._steps:
                self._steps -= 1
                return True
            left = self._due - monotonic() if self._speed else 0.0
            if left <= 0 and not self._paused:
                return True
            sleep(_NAP if self._paused else min(left, _NAP))

    def _press(self, keys: str) -> None:
        for key in keys:
            if key in " p":
                self._paused = not self._paused
            elif key == "s" and self._paused:
                self._steps += 1
            elif key in "q\x04":
                self._quit = True

    def _situation(self) -> Situation:
        if self._paused:
            return Situation("paused", keys=(("space", "go on"), ("s", "next event"), ("q", "quit")))
        return Situation("replay", keys=(("space", "pause"), ("q", "quit")))


def _printed(stream: IO[bytes], name: str) -> Iterator[Line]:
    """What ``attach --json`` printed."""
    for number, line in enumerate(iter(lambda: stream.readline(_LONGEST_LINE), b""), 1):
        where = f"line {number} of {name}"
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadRecording(f"{where} is nothing that attach --json prints: {error!r}") from None
