# SPDX-License-Identifier: LGPL-2.1-or-later
"""``kvmi-host selftests``: KVM's own selftests, with stock modules and with ours."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from kvmi_host.cli.options import CpuVendor, Kernel
from kvmi_host.host.kernels import Series
from kvmi_host.host.vendor import Vendor

_DEADLINES = {Vendor.AMD: 180, Vendor.INTEL: 60}
"""Seconds for a test. A second of Bochs's takes five to six of ours."""

_SILENCE = 600
"""Seconds of ours after which an Intel host is taken to hang: more than a test may take there."""

app = typer.Typer(name="selftests", pretty_exceptions_enable=False, add_completion=False)


@app.command()
def selftests(
    kernel: Kernel = Series.V6_1,
    cpu: CpuVendor = Vendor.AMD,
    pattern: Annotated[
        str | None,
        typer.Option("-k", metavar="REGEX", help="Which tests: those whose names it fits.", show_default="all"),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for logs and results.", show_default="build/selftests-CPU-KERNEL")
    ] = None,
    modules: Annotated[
        str | None, typer.Option(help="Folder of kvm.ko and the others to compare.", show_default="build this tree's")
    ] = None,
    deadline: Annotated[
        int | None,
        typer.Option(min=1, help="Seconds for each test, by its host's clock.", show_default="180; Intel's 60"),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="What its hosts are called.", show_default="selftests-CPU-KERNEL")
    ] = None,
) -> None:
    """Run the kernel's own KVM selftests twice on an emulated host: with Debian's modules, and with ours.

    Fails when a test comes to something else with ours. What differs is run again, up to twice, on both sides.
    """
    if kernel is Series.DEBUG:
        raise typer.BadParameter("the selftests are those of Debian's kernels: 6.1 or 6.12", param_hint="--kernel")
    # Here, not above: `kvmi-host --help` imports this module, and none of these.
    from kvmi_host.lab import Box, images
    from kvmi_host.lab import selftests as lab
    from kvmi_host.lab.bochs import BochsHost

    # Its host goes with it, whoever ends it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    name = name or f"selftests-{cpu}-{kernel.replace('.', '-')}"
    report = report or Path(f"build/selftests-{cpu}-{kernel}")
    deadline = deadline or _DEADLINES[cpu]
    folder = images.selftests(kernel)
    tests = lab.select(folder, pattern)

    def runner(side: str, modules: str | None) -> lab.Runner:
        if cpu is Vendor.INTEL:
            return lab.in_bochs(BochsHost(f"{name}-{side}", kernel, modules, _SILENCE), folder, deadline)
        return lab.in_box(Box(f"{name}-{side}", kernel, modules), folder, deadline)

    compared = lab.compare(runner("stock", images.STOCK), runner("ours", modules), folder, tests, report)
    table = lab.table(compared)
    (report / "table.md").write_text(table + "\n")
    typer.echo(f"\n{table}\n\n{lab.summary(compared)}; all that was said: {report}")
    raise typer.Exit(any(each.differs for each in compared))
