# SPDX-License-Identifier: LGPL-2.1-or-later
"""``kvmi-host inventory``: the hosts of a lab, taken over from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="inventory",
    help="The hosts of a lab, for `kvmi-host hwtest --inventory`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def inventory() -> None:
    """The hosts of a lab, for `kvmi-host hwtest --inventory`."""


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="ANSIBLE_INVENTORY", help="As ansible's -i takes it.")],
    group: Annotated[str, typer.Option(help="Only the hosts of this group.")] = "all",
    ssh_config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write this file, too: what of the hosts belongs into SSH's configuration."),
    ] = None,
) -> None:
    """Print an inventory of the hosts that Ansible has.

    Variables kvmi_NAME become tags NAME, and groups become tags, too; kvmi_deadline is the deadline.
    """
    from kvmi_host.lab.ansible import import_inventory

    inventory, config = import_inventory(source, group, ssh_config)
    if ssh_config:
        ssh_config.write_text(config)
    typer.echo(inventory, nl=False)
