# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a session is shown: JSON lines, plain lines, or a live table on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import typer

from kvmi_host.cli.records import COLUMNS, LINE, Record, cells


class Situation(NamedTuple):
    """What goes on, for who watches: ``running``, ``paused`` and the like; more about it; what each key does now."""

    state: str
    detail: str = ""
    keys: tuple[tuple[str, str], ...] = ()


class View(Protocol):
    """Shows a session: its facts, every event, the summary."""

    def session(self, facts: Record) -> None: ...

    def event(self, record: Record) -> None: ...

    def poll(self, situation: Callable[[], Situation]) -> str:
        """Draw, if it is time to; the keys that were pressed. Call it often: it costs next to nothing."""

    def summary(self, summary: Record) -> None: ...

    def close(self) -> None:
        """Leave the terminal as it was. May be called again."""


class JsonView:
    """One JSON object per line: the session, each event, the summary."""

    def session(self, facts: Record) -> None:
        _print_json({"session": facts})

    def event(self, record: Record) -> None:
        _print_json(record)

    def poll(self, situation: Callable[[], Situation]) -> str:
        return ""

    def summary(self, summary: Record) -> None:
        _print_json({"summary": summary})

    def close(self) -> None:
        pass


class PlainView:
    """Aligned lines, each as it comes: for pipes, logs and slow terminals."""

    def session(self, facts: Record) -> None:
        print_facts(facts)
        typer.echo(LINE.format(*COLUMNS))

    def event(self, record: Record) -> None:
        typer.echo(LINE.format(*cells(record)).rstrip())
        sys.stdout.flush()

    def poll(self, situation: Callable[[], Situation]) -> str:
        return ""

    def summary(self, summary: Record) -> None:
        print_summary(summary)

    def close(self) -> None:
        pass


def view_for(as_json: bool, *, recorded: bool = False) -> View:
    """The view that fits where standard output goes.

    :param recorded: what is shown is over: time is that of its events.
    """
    if as_json:
        return JsonView()
    if not sys.stdout.isatty():
        return PlainView()
    from kvmi_host.cli.live import LiveView

    return LiveView(recorded=recorded)


def show_table(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Aligned lines of what a verb lists, each whole whatever the width; ``-`` for what is not known."""
    lines = [list(columns), *(["-" if row[name] is None else str(row[name]) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_facts(facts: Record) -> None:
    """What the session is and may do."""
    typer.echo(f"{facts['name']}  uuid {facts['uuid']}  {facts['vcpus']} vCPUs")
    typer.echo(f"KVMI version {facts['version']}, dialect {facts['dialect']}, attached by {facts['method']}")
    typer.echo(f"policy:   {facts.get('policy', 'unknown')}")  # older recordings have none
    typer.echo(f"may send: {', '.join(facts['commands'])}")
    typer.echo(f"may see:  {', '.join(facts['events'])}")


def print_summary(summary: Record) -> None:
    """What came of the session."""
    kinds = ", ".join(f"{kind} {count}" for kind, count in summary["by_kind"].items()) or "none"
    modes = ", ".join(f"{mode} ({count})" for mode, count in summary["modes"].items()) or "none"
    trip = summary["round_trip"]
    typer.echo(f"\n{summary['events']} events in {summary['seconds']} s ({summary['events_per_second']}/s): {kinds}")
    typer.echo(f"modes seen: {modes}")
    typer.echo(f"seq gaps: {summary['seq_gaps']}, repeated: {summary['seq_repeated']}")
    if trip["samples"]:
        typer.echo(
            f"round trip of {trip['of']}: median {trip['median_us']} us, p99 {trip['p99_us']} us"
            f" ({trip['samples']} samples)"
        )
    typer.echo(f"ended: {summary['ended']}")


def _print_json(value: Record) -> None:
    typer.echo(json.dumps(value))
    sys.stdout.flush()
