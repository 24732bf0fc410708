# SPDX-License-Identifier: LGPL-2.1-or-later
"""``kvmi-host mutants``: whether the hardware suite finds what is broken on purpose."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvmi_host.cli.options import Kernel
from kvmi_host.host.kernels import Series

if TYPE_CHECKING:
    from kvmi_host.lab.hunt import Verdict

app = typer.Typer(name="mutants", pretty_exceptions_enable=False, add_completion=False)


@app.command()
def mutants(
    kernel: Kernel = Series.V6_1,
    report: Annotated[
        Path | None, typer.Option(help="Folder for the table and the logs.", show_default="build/mutants-KERNEL")
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option("-k", metavar="NAME", help="Which mutants: those with that in their names.", show_default="all"),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The name of the box.", show_default="mutants-KERNEL")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the box up, with the last mutant in it.")] = False,
) -> None:
    """Check the hardware suite: break the kernel part in one way after the other, and see that a test fails.

    Fails when the suite passes with one of these mutants, or fails without any.
    """
    if kernel is Series.DEBUG:
        raise typer.BadParameter("mutants are of Debian's kernels: 6.1 or 6.12", param_hint="--kernel")
    # Here, not above: `kvmi-host --help` imports this module, and none of these.
    from kvmi_host.lab import Box, cache, hunt
    from kvmi_host.lab.mutants import Tree, select

    # Its host goes with it, whoever ends it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    chosen = select(names or [])
    report = report or Path(f"build/mutants-{kernel}")
    report.mkdir(parents=True, exist_ok=True)
    box = Box(name or f"mutants-{kernel.replace('.', '-')}", kernel)
    verdicts: list[Verdict] = []
    try:
        with cache.locked(f"mutants_{kernel}"):
            for verdict in hunt.hunt(box, Tree(kernel), chosen, report):
                verdicts.append(verdict)
                (report / "mutants.json").write_text(hunt.as_json(verdicts))
                (report / "table.md").write_text(hunt.table(verdicts))
    finally:
        if not keep:
            box.down()
    _show(verdicts, report)
    raise typer.Exit(not all(verdict.caught for verdict in verdicts))


def _show(verdicts: list[Verdict], report: Path) -> None:
    from kvmi_host.lab import hunt

    console = Console()
    if console.is_terminal:
        table = Table(*hunt.HEADINGS)
        for verdict, row in zip(verdicts, hunt.rows(verdicts), strict=True):
            table.add_row(*row, style=None if verdict.caught else "bold red")
        console.print(table)
    else:
        typer.echo(f"\n{hunt.table(verdicts)}")
    survivors = [verdict.mutant.name for verdict in verdicts if not verdict.caught]
    left = f"; NOT caught: {', '.join(survivors)}: the suite lacks a test" if survivors else ""
    typer.echo(f"{len(verdicts) - len(survivors)} of {len(verdicts)} mutants caught{left}; all that was said: {report}")
