# SPDX-License-Identifier: LGPL-2.1-or-later
"""``kvmi-host doctor``: whether a host is ready, and what to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvmi_host.cli import HOST_CANNOT
from kvmi_host.cli.options import Json

if TYPE_CHECKING:
    from kvmi_host.host.doctor import Finding, Machine

app = typer.Typer(name="doctor", pretty_exceptions_enable=False, add_completion=False)


@app.command()
def doctor(
    host: Annotated[
        str | None,
        typer.Argument(metavar="[HOST]", help="[USER@]HOST[:PORT] by SSH, as ~/.ssh/config has it; else this one."),
    ] = None,
    config: Annotated[Path | None, typer.Option("-F", metavar="FILE", help="Instead of ~/.ssh/config.")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds until HOST must have let us in.")] = 30,
    as_json: Json = False,
) -> None:
    """Say what a host needs for introspection: what is there, what is missing, and what to do.

    Nothing is changed there, and HOST needs nothing of ours. As root it sees everything.

    Exit status: 0 all is there, 1 HOST cannot be reached, 3 something is missing.
    """
    from kvmi_host.host.doctor import State, examine

    findings = list(examine(_look(host, config, timeout)))
    if as_json:
        for finding in findings:
            typer.echo(json.dumps(asdict(finding)))
    else:
        _show(findings)
    if any(finding.state is State.MISSING for finding in findings):
        raise typer.Exit(HOST_CANNOT)


def _look(host: str | None, config: Path | None, timeout: float) -> Machine:
    """See what there is, and say meanwhile what is waited for."""
    from rich.console import Console

    from kvmi_host.host.doctor import machine_behind, this_machine

    console = Console(stderr=True)
    if host is None:
        with console.status("looking at this host ..."):
            return this_machine(sys.executable)

    from kvmi_host.host.remote import connect

    with console.status("connecting ...") as status, connect(host, config, timeout) as remote:
        status.update("looking at it ...")
        return machine_behind(remote)


def _show(findings: Sequence[Finding]) -> None:
    """What was found, and under it what to do: as wide as the terminal, or each in one line where there is none."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        width = max(len(finding.subject) for finding in findings)
        for finding in findings:
            typer.echo(f"{finding.state:7}  {finding.subject:{width}}  {finding.evidence}".replace("\n", "; "))
            if finding.remedy:
                typer.echo(f"{'':7}  {'':{width}}  -> {finding.remedy}".replace("\n", "; "))
        return
    styles = {"ok": "green", "note": "cyan", "missing": "bold red", "unknown": "yellow"}
    table = Table.grid(padding=(0, 2))
    group = ""
    for finding in findings:
        if finding.group != group:
            group = finding.group
            table.add_row(Text(group, "bold"))
        said = Text(finding.evidence)
        if finding.remedy:
            said.append(f"\n-> {finding.remedy}")
        table.add_row(Text(finding.state, styles[finding.state]), Text(finding.subject), said)
    console.print(table)
