# SPDX-License-Identifier: LGPL-2.1-or-later
"""``kvmi-host report``: the page and the junit.xml of a night."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="report", pretty_exceptions_enable=False, add_completion=False)


@app.command()
def report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", exists=True, file_okay=False, help="What hwtest left of a night: night.json, hosts/NAME/."
        ),
    ],
    history: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="The nights before, a file of SQLite's: the night is compared with them, and written to it. Made if "
            "it is not there.",
        ),
    ] = None,
) -> None:
    """Write the report of a night: DIR/index.html for people and DIR/junit.xml for machines.

    The page is one file that loads nothing. Its links to the hosts' logs are good as long as it stays in DIR. With
    --history, it begins with what changed since the night before, and ends with the trend. A night that is written to
    the history again takes its own place.

    Exit status: 0 the night passed; 1 it did not, or there is no report of it, and then one line says why.
    """
    from kvmi_host.report import write

    status = write(folder, history)
    typer.echo(f"{folder / 'index.html'}: the night {'failed' if status else 'passed'}")
    raise typer.Exit(status)
