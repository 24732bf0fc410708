# SPDX-License-Identifier: LGPL-2.1-or-later
"""``kvmi-host detach``: end whoever's session of a VM."""

from __future__ import annotations

from typing import Annotated

import typer

from kvmi_host.cli.options import AttachMethod, Connect, Methods, Vm

app = typer.Typer(add_completion=False)


@app.command()
def detach(
    vm: Vm,
    timeout: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long the introspector may clean up before we insist.")
    ] = 5.0,
    method: AttachMethod = Methods.AUTO,
    connect: Connect = None,
) -> None:
    """End the introspection of a VM: ask its introspector to clean up, insist after a while."""
    from kvmi_host.attach import detach as end_session
    from kvmi_host.attach import find_target

    target = find_target(vm, connect)
    cleaned_up = end_session(target, timeout, method)
    typer.echo(f"{target.name}: {'the introspector closed the session' if cleaned_up else 'the session was ended'}")
