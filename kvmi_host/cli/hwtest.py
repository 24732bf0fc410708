# SPDX-License-Identifier: LGPL-2.1-or-later
"""``kvmi-host hwtest``: the hardware suite on a lab host, or on all of them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvmi_host.cli.options import CpuVendor, Kernel
from kvmi_host.cli.rack import RackCoordinator, RackCount, RackFilters, RackPlace, RackWait
from kvmi_host.host.kernels import Series
from kvmi_host.host.vendor import Vendor

if TYPE_CHECKING:
    from kvmi_host.lab.inventory import LabHost

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
    inventory: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Instead: all hosts of this file, at once.", show_default=False)
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|TAG=VALUE", help="Of the inventory, only these hosts.", show_default=False),
    ] = None,
    forks: Annotated[int, typer.Option(min=1, help="Of the inventory, how many hosts at once.")] = 4,
    history: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Of the inventory, the nights before.", show_default=False),
    ] = None,
    lg_coordinator: RackCoordinator = None,
    lg_place: RackPlace = None,
    lg_filter: RackFilters = None,
    lg_count: RackCount = None,
    lg_wait: RackWait = 3600,
    kernel: Kernel = Series.V6_1,
    cpu: CpuVendor = Vendor.AMD,
    report: Annotated[
        Path, typer.Option(help="Folder for junit.xml and kernel logs; with --inventory, for the night's page.")
    ] = Path("build/hardware"),
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

    Fails when a test fails, or when the host's kernel complains while they run (WARN, BUG, oops, lockup). With an
    inventory it fails, too, when a host cannot be reached, dies or hangs; the others go on meanwhile.
    """
    # Here, not above: `kvmi-host --help` imports this module, and none of these.
    from kvmi_host.lab import Box, suite
    from kvmi_host.lab.bochs import BochsHost

    arguments = [*(["-k", expression] if expression else []), *(extra or [])]
    if lg_coordinator or lg_place or lg_filter:
        from kvmi_host.cli.rack import rack_hosts

        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with rack_hosts(lg_coordinator, lg_place, lg_filter or [], lg_count, lg_wait) as hosts:
            status = _night(hosts, report, arguments, forks, history)
        raise typer.Exit(status)
    if inventory:
        from kvmi_host.lab.inventory import chosen, read_inventory

        hosts = chosen(read_inventory(inventory), limit or [])
        raise typer.Exit(_night(hosts, report, arguments, forks, history))
    if limit:
        raise typer.BadParameter("--limit chooses among the hosts of --inventory")
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


def _night(hosts: Sequence[LabHost], folder: Path, arguments: Sequence[str], forks: int, history: Path | None) -> int:
    """Run the suite on all of them, and write the page; the exit status."""
    from kvmi_host.cli.fleet_view import watching
    from kvmi_host.lab.fleet import run_fleet
    from kvmi_host.report import write

    stop = threading.Event()

    def end(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)  # who cannot wait says it twice

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with watching() as watch:
            night = run_fleet(hosts, folder, arguments, forks=forks, stop=stop, watch=watch)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    status = write(folder, history)
    passed = sum(host.passed for host in night.hosts)
    typer.echo(f"{passed} of {len(night.hosts)} hosts passed: {folder / 'index.html'}", err=True)
    return status
