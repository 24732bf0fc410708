# SPDX-License-Identifier: LGPL-2.1-or-later
"""``kvmi-host replay``: what ``attach --json`` printed, shown as attach shows it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from kvmi_host.cli.view import view_for
from kvmi_host.protocol import KvmiError

app = typer.Typer(add_completion=False)


class BadRecording(KvmiError):
    """A line of it is not what attach prints."""


@app.command()
def replay(
    file: Annotated[typer.FileText, typer.Argument(metavar="FILE", help="What attach --json printed; - for a pipe.")],
) -> None:
    """Show a recorded session, or one that comes through a pipe."""
    view = view_for(as_json=False)
    for number, line in enumerate(file, 1):
        try:
            record = json.loads(line)
            if "session" in record:
                view.session(record["session"])
            elif "summary" in record:
                view.summary(record["summary"])
            else:
                view.event(record)
        except (ValueError, KeyError, TypeError) as error:
            raise BadRecording(f"line {number} of {file.name} is none that attach --json prints: {error!r}") from None
