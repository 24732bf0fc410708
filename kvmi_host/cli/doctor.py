# SPDX-License-Identifier: LGPL-2.1-or-later
"""``kvmi-host doctor``: whether this host is ready, and what to do."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer

from kvmi_host.cli import HOST_CANNOT
from kvmi_host.cli.options import Json

app = typer.Typer(name="doctor", pretty_exceptions_enable=False, add_completion=False)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this host needs for introspection: what is there, what is missing, and what to do.

    Exit status: 0 all is there, 3 something is missing.
    """
    from kvmi_host.host.doctor import Machine, State, examine

    colours = {State.OK: typer.colors.GREEN, State.MISSING: typer.colors.RED, State.UNKNOWN: typer.colors.YELLOW}
    missing = False
    for finding in examine(Machine()):
        missing |= finding.state is State.MISSING
        if as_json:
            typer.echo(json.dumps(asdict(finding)))
            continue
        state = typer.style(f"{finding.state:7}", fg=colours[finding.state])
        typer.echo(f"{state}  {finding.subject}: {finding.evidence}")
        if finding.remedy:
            typer.echo(f"{'':7}  -> {finding.remedy}")
    if missing:
        raise typer.Exit(HOST_CANNOT)
