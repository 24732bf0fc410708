# SPDX-License-Identifier: LGPL-2.1-or-later
"""``kvmi-host bench``: what exits and events cost, counted in instructions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvmi_host.cli.options import Kernel
from kvmi_host.host.kernels import Series

_EXIT = 1000
"""Instructions: what costs less did not leave the guest."""

app = typer.Typer(name="bench", pretty_exceptions_enable=False, add_completion=False)


@app.command()
def bench(
    kernel: Kernel = Series.V6_1,
    report: Annotated[Path, typer.Option(help="Where to write the figures.")] = Path("build/bench.json"),
    modules: Annotated[
        str | None, typer.Option(help="Folder of kvm.ko and the others.", show_default="build this tree's")
    ] = None,
) -> None:
    """Count what an exit costs with stock modules and with ours, and what an event costs.

    The figures are instructions of an emulated host. An introspector in C answers each event at once.
    """
    from rich.console import Console
    from rich.table import Table

    from kvmi_host.lab import images
    from kvmi_host.lab.counting import count

    image = images.host_image()
    with images.kvm_modules(kernel, modules) as built:
        folder = built()
    if folder is None:
        raise typer.BadParameter("stock modules have nothing to compare", param_hint="--modules")
    counted = count(image.kernel(kernel), folder)

    table = Table("instruction", "stock", "ours, not hooked", "ratio", "as an event", "ratio")
    figures: dict[str, float] = {}
    for kind, stock in counted.stock.items():
        ours, event = counted.ours[kind], counted.events.get(kind)
        figures[f"exit_{kind}_ratio"] = round(ours / stock, 4)
        figures[f"exit_{kind}_stock_instructions"] = stock
        figures[f"exit_{kind}_instructions"] = ours
        if event:
            figures[f"event_{kind}_instructions"] = event
        row = [kind, f"{stock:,}", f"{ours:,}", f"{ours / stock:.3f}"]
        if event:
            row += [f"{event:,}", f"{event / ours:.1f}" if ours > _EXIT else "no exit"]
        table.add_row(*row)
    Console().print(table)
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(figures, indent=1) + "\n")
