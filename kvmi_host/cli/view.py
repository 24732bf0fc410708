# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a session is shown: JSON lines, plain lines, or a live table on a terminal."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import typer

from kvmi_host.protocol import Descriptor, Event, EventId, event_name, msr_name

if TYPE_CHECKING:
    from rich.table import Table

    from kvmi_host.introspect import Facts

_COLUMNS = ("seq", "vCPU", "event", "mode", "rip", "detail")
_PLAIN = "{:>10} {:>4} {:<12} {:>4} {:>18} {}"
_ROWS = 20
_CR = event_name(EventId.CR)
_MSR = event_name(EventId.MSR)
_DESCRIPTOR = event_name(EventId.DESCRIPTOR)
_UNHOOK = event_name(EventId.UNHOOK)


Record = Mapping[str, Any]
"""What is shown is what ``--json`` prints: the object of one line."""


class View(Protocol):
    """Shows a session: its facts, every event, the summary."""

    def session(self, facts: Record) -> None: ...

    def event(self, record: Record) -> None: ...

    def summary(self, summary: Record) -> None: ...


class JsonView:
    """One JSON object per line: the session, each event, the summary."""

    def session(self, facts: Record) -> None:
        _print_json({"session": facts})

    def event(self, record: Record) -> None:
        _print_json(record)

    def summary(self, summary: Record) -> None:
        _print_json({"summary": summary})


class PlainView:
    """Aligned lines, each as it comes: for pipes, logs and slow terminals."""

    def session(self, facts: Record) -> None:
        _print_facts(facts)
        typer.echo(_PLAIN.format(*_COLUMNS))

    def event(self, record: Record) -> None:
        typer.echo(_PLAIN.format(*_cells(record)).rstrip())
        sys.stdout.flush()

    def summary(self, summary: Record) -> None:
        _print_summary(summary)


class LiveView:
    """A table of the last events that redraws itself."""

    def __init__(self) -> None:
        from rich.live import Live

        self._rows: deque[Sequence[str]] = deque(maxlen=_ROWS)
        self._count = 0
        self._live = Live(get_renderable=self._table, refresh_per_second=8)

    def session(self, facts: Record) -> None:
        _print_facts(facts)
        self._live.start()

    def event(self, record: Record) -> None:
        self._count += 1
        self._rows.append(_cells(record))

    def summary(self, summary: Record) -> None:
        self._live.stop()
        _print_summary(summary)

    def _table(self) -> Table:
        from rich.box import SIMPLE
        from rich.table import Table
        from rich.text import Text

        table = Table(*_COLUMNS, box=SIMPLE, caption=f"{self._count} events")
        for row in list(self._rows):  # drawn by a thread of rich's, while events come
            table.add_row(*map(Text, row))
        return table


def view_for(as_json: bool) -> View:
    """The view that fits where standard output goes."""
    if as_json:
        return JsonView()
    return LiveView() if sys.stdout.isatty() else PlainView()


def show_table(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Aligned lines of what a verb lists, each whole whatever the width; ``-`` for what is not known."""
    lines = [list(columns), *(["-" if row[name] is None else str(row[name]) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def facts_record(facts: Facts) -> Record:
    """A session's facts, as they are shown."""
    return {
        "uuid": str(facts.uuid),
        "name": facts.name,
        "version": facts.version,
        "dialect": facts.dialect,
        "vcpus": facts.vcpus,
        "commands": list(facts.commands),
        "events": list(facts.events),
        "method": facts.method,
    }


def event_record(vm: str, event: Event, time_ns: int) -> Record:
    """An event, as it is shown: what all events have, then its own fields.

    :param time_ns: when it was received, since the epoch.
    """
    data = event.data
    return {
        "vm": vm,
        "vcpu": event.vcpu,
        "seq": event.seq,
        "event": event_name(event.event),
        "mode": event.mode,
        "rip": event.rip,
        "time_ns": time_ns,
        **(data._asdict() if data is not None else {}),
    }


_COMMON = frozenset({"vm", "vcpu", "seq", "event", "mode", "rip", "time_ns"})


def _cells(record: Record) -> Sequence[str]:
    if record["event"] == _UNHOOK:
        return (str(record["seq"]), "", _UNHOOK, "", "", "")
    numbers = (str(record["seq"]), str(record["vcpu"]), record["event"], str(record["mode"]))
    return (*numbers, f"{record['rip']:#018x}", _detail(record))


def _detail(record: Record) -> str:
    if record["event"] == _CR:
        return f"cr{record['cr']} {record['old']:#x} -> {record['new']:#x}"
    if record["event"] == _MSR:
        return f"{msr_name(record['msr'])} {record['old']:#x} -> {record['new']:#x}"
    if record["event"] == _DESCRIPTOR:
        return f"{Descriptor(record['descriptor']).name.lower()} {'write' if record['write'] else 'read'}"
    return " ".join(f"{name}={value:#x}" for name, value in record.items() if name not in _COMMON)


def _print_json(value: Record) -> None:
    typer.echo(json.dumps(value))
    sys.stdout.flush()


def _print_facts(facts: Record) -> None:
    typer.echo(f"{facts['name']}  uuid {facts['uuid']}  {facts['vcpus']} vCPUs")
    typer.echo(f"KVMI version {facts['version']}, dialect {facts['dialect']}, attached by {facts['method']}")
    typer.echo(f"may send: {', '.join(facts['commands'])}")
    typer.echo(f"may see:  {', '.join(facts['events'])}")


def _print_summary(summary: Record) -> None:
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
