# SPDX-License-Identifier: LGPL-2.1-or-later
"""``kvmi-host agent``: the daemon."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from kvmi_host.agent import logs
from kvmi_host.agent.config import load
from kvmi_host.agent.service import serve

app = typer.Typer(add_completion=False)


@app.command()
def agent(
    config: Annotated[Path, typer.Option(metavar="FILE", help="The configuration, in TOML.", show_default=False)],
    check: Annotated[bool, typer.Option("--check", help="Only read the configuration.")] = False,
) -> None:
    """Introspect every VM that announces itself, until SIGTERM.

    VMs come by `kvmi-host attach VM --to SOCKET`, or from a QEMU that has an introspection object. SIGHUP reads the
    configuration again. Logs are JSON lines on standard error. Root is not needed.
    """
    if check:
        load(config)
    else:
        logs.set_up()
        asyncio.run(serve(config))
