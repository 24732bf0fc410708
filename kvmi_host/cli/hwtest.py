# SPDX-License-Identifier: LGPL-2.1-or-later
"""``kvmi-host hwtest``: the hardware suite on a lab host."""

from __future__ import annotations

import signal
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kvmi_host.cli.options import CpuVendor, Kernel
from kvmi_host.host.kernels import Series
from kvmi_host.host.vendor import Vendor

app = typer.Typer(name="hwtest", pretty_exceptions_enable=False, add_completion=False)


class Host(StrEnum):
    """Where the suite runs."""

    BOX = "box"
    LOCAL = "local"


@app.command()
def hwtest(
    extra: Annotated[list[str] | None, typer.Argument(metavar="[-- PYTEST_ARGUMENT...]", show_default=False)] = None,
    host: Annotated[
        Host, typer.Option(envvar="HOST", help="A host in a box of its own, or this machine, as root.")
    ] = Host.BOX,
    kernel: Kernel = Series.V6_1,
    cpu: CpuVendor = Vendor.AMD,
    report: Annotated[Path, typer.Option(help="Folder for junit.xml and kernel logs.")] = Path("build/hardware"),
    expression: Annotated[str | None, typer.Option("-k", metavar="EXPR", help="Which tests, as pytest's -k.")] = None,
    modules: Annotated[
        str | None, typer.Option(help="Folder of kvm.ko and the others for the box.", show_default="build this tree's")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The name of the box.", show_default="hwtest-CPU-KERNEL")
    ] = None,
    smp: Annotated[int, typer.Option(min=1, max=16, help="CPUs of the box (not with Bochs).")] = 1,
    deadline: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which the suite is ended (not with Bochs).", show_default="2400; debug: 14400"
        ),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the box up, to look around in it (not with Bochs).")
    ] = False,
) -> None:
    """Run the hardware suite: live vCPUs under KVM with introspection.

    Fails when a test fails, or when the host's kernel complains while they run (WARN, BUG, oops, lockup).
    """
    # Here, not above: `kvmi-host --help` imports this module, and none of these.
    from kvmi_host.lab import Box, suite
    from kvmi_host.lab.bochs import BochsHost

    # Its host goes with it, whoever ends it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    name = name or f"hwtest-{cpu}-{kernel.replace('.', '-')}"
    if host is Host.LOCAL:
        raise typer.Exit(suite.run(suite.here, report, expression, extra or []))
    if cpu is Vendor.INTEL:
        if kernel is Series.DEBUG:
            raise typer.BadParameter("the debug kernel has no driver for the disks of the Intel host")
        intel = suite.in_bochs(BochsHost(name, kernel, modules))
        raise typer.Exit(suite.run(intel, report, expression, extra or []))
    box = Box(name, kernel, modules, smp)
    try:
        box.up()
        status = suite.run(suite.in_box(box, deadline), report, expression, extra or [])
    finally:
        if not keep:
            box.down()
    raise typer.Exit(status)
