# SPDX-License-Identifier: LGPL-2.1-or-later
"""``kvmi-host lab``: the host in a box from the command line."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from kvmi_host.cli.options import Kernel
from kvmi_host.host.kernels import Series

if TYPE_CHECKING:
    from kvmi_host.lab import Box

app = typer.Typer(
    name="lab",
    help="The host in a box: a KVM host with introspection inside an emulated machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Name = Annotated[str, typer.Option("--name", help="Which box: each name is a machine of its own.")]


def _box(name: str, kernel: Series = Series.V6_1, modules: str | None = None, cpus: int = 1, memory: int = 2048) -> Box:
    # Here, not above: `kvmi-host --help` imports this module, and none of what a box needs.
    from kvmi_host.lab import Box

    return Box(name, kernel, modules, cpus, memory)


@app.command()
def up(
    name: Name = "box",
    kernel: Kernel = Series.V6_1,
    modules: Annotated[
        str | None,
        typer.Option(
            help="Folder of kvm.ko and the others, or 'stock' for Debian's own.", show_default="build this tree's"
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Boot, whether or not there is saved state.")] = False,
    smp: Annotated[int, typer.Option(min=1, max=16, help="Virtual CPUs of the box.")] = 1,
    memory: Annotated[int, typer.Option(min=1024, help="Memory of the box in MiB.")] = 2048,
) -> None:
    """Bring it up: build what is missing, boot it or restore its saved state, deploy this package."""
    box = _box(name, kernel, modules, smp, memory)
    status = box.up(fresh)
    box.deploy()
    typer.echo(f"{name} is up: kernel {status.kernel}, ssh on 127.0.0.1:{status.port}, `kvmi-host lab ssh` enters it")


@app.command()
def down(name: Name = "box") -> None:
    """Take it down. What was changed in it is gone."""
    typer.echo(f"{name} is down" if _box(name).down() else f"{name} was not up")


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def ssh(
    command: Annotated[list[str] | None, typer.Argument(help="What to run there.", show_default="a shell")] = None,
    name: Name = "box",
) -> None:
    """Run a command in it as root, or an interactive shell."""
    argv = _box(name).ssh_command(*(command or []))
    os.execv(argv[0], argv)


@app.command()
def status(
    name: Name = "box",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say whether it runs, and with what. Exits with 1 when it does not."""
    facts = asdict(_box(name).status())
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for key, value in facts.items():
        typer.echo(f"{key.replace('_', ' '):16} {value}")
