# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ``kvmi-host`` command. Each verb is a module, imported when it is called: start-up is what people wait for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from kvmi_host import __version__
from kvmi_host.cli.completion import complete_as_bash_breaks_words
from kvmi_host.host import HostError
from kvmi_host.protocol import KvmiError

FAILED = 1
HOST_CANNOT = 3

_VERBS = {
    "doctor": "kvmi_host.cli.doctor",
    "lab": "kvmi_host.cli.lab",
    "guest": "kvmi_host.cli.guest",
    "attach": "kvmi_host.cli.attach",
    "detach": "kvmi_host.cli.detach",
    "agent": "kvmi_host.cli.agent",
    "replay": "kvmi_host.cli.replay",
    "hwtest": "kvmi_host.cli.hwtest",
    "report": "kvmi_host.cli.report",
    "inventory": "kvmi_host.cli.inventory",
    "bench": "kvmi_host.cli.bench",
    "selftests": "kvmi_host.cli.selftests",
    "mutants": "kvmi_host.cli.mutants",
}
"""Each module holds a Typer application ``app``."""


class _Verbs(TyperGroup):
    """Imports a verb when it is called, and turns our errors into one line and an exit status."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _VERBS:
            return None
        command = typer.main.get_command(import_module(_VERBS[cmd_name]).app)
        command.name = cmd_name
        return command

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KvmiError as error:
            typer.secho(f"kvmi-host: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(HOST_CANNOT if isinstance(error, HostError) else FAILED) from None


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def kvmi_host(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
) -> None:
    """Introspection of KVM guests: a host in a box, guests, and live events of their virtual CPUs.

    Exit status: 0, 1 failed, 2 usage, 3 the host cannot.
    """


def main() -> None:
    """The entry point of the ``kvmi-host`` program."""

    def run() -> None:
        app(prog_name="kvmi-host")

    if not complete_as_bash_breaks_words(run):
        run()
