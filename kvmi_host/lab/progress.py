# SPDX-License-Identifier: LGPL-2.1-or-later
"""Saying what takes its time, on standard error: a line that lives on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from kvmi_host.lab.errors import LabError

_console = Console(stderr=True, highlight=False)


_teller: ContextVar[Callable[[str], None] | None] = ContextVar("teller", default=None)

_NOTABLE = 1.0
"""Seconds that a step may take without a word about it."""


@contextmanager
def told_to(teller: Callable[[str], None]) -> Iterator[None]:
    """Have what this thread would show, while the block runs, told to somebody who shows it along with the others'."""
    token = _teller.set(teller)
    try:
        yield
    finally:
        _teller.reset(token)


@contextmanager
def step(what: str) -> Iterator[Callable[[str], None]]:
    """Show that something is going on while the block runs, and how long it took, unless it took no time.

    :param what: what is being done, as in "booting the host in a box".
    :return: a function that shows a detail beside it, where there is a terminal to show it on.
    """
    if teller := _teller.get():
        teller(what)
        yield lambda detail: None
        return
    began = time.monotonic()
    if _console.is_terminal:
        name, more = TextColumn("{task.description}"), TextColumn("{task.fields[detail]}")
        with Progress(SpinnerColumn(), name, TimeElapsedColumn(), more, console=_console, transient=True) as progress:
            task = progress.add_task(escape(what), detail="")
            yield lambda detail: progress.update(task, detail=f"[dim]{escape(detail[:60])}[/dim]")
    else:
        announcement = threading.Timer(_NOTABLE, say, [f"{what} ..."])
        announcement.start()
        try:
            yield lambda detail: None
        finally:
            announcement.cancel()
    took = time.monotonic() - began
    if took > _NOTABLE:
        say(f"{what}: {took:.1f} s")


def say(message: str) -> None:
    """Tell the user one thing that matters to them."""
    if teller := _teller.get():
        teller(message)
        return
    _console.print(escape(message), soft_wrap=True)


def show(piece: str) -> None:
    """Pass on what a host's program writes, as it comes, on standard output."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def tail(path: Path, lines: int = 30) -> str:
    """The last lines of a log, for an error message."""
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        return f"(no log: {error})"
    return "\n".join(text.splitlines()[-lines:])


@contextmanager
def started(what: str, argv: Sequence[str | Path], env: Mapping[str, str] | None = None) -> Iterator[Callable[[], str]]:
    """Have a program make something while the block does something else. What has not ended with the block is ended.

    :param env: what to add to the environment.
    :return: a function that waits for it, showing its last word from standard error, and returns its standard output.
        It raises a LabError with the end of what the program said when that failed.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.NamedTemporaryFile("w") as log:
        process = subprocess.Popen(
            argv,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=log,
            start_new_session=True,
        )

        def finish() -> str:
            with step(what) as detail:
                while process.poll() is None:
                    detail(tail(Path(log.name), 1).strip())
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(0.2)
            if process.returncode:
                said = tail(Path(log.name))
                status = process.returncode
                raise LabError(f"{what} failed: {argv[0]} ended with status {status}. The last it said:\n{said}")
            output.seek(0)
            return output.read()

        try:
            yield finish
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()


def build(what: str, argv: Sequence[str | Path], env: Mapping[str, str] | None = None) -> str:
    """Run a program that makes something: :func:`started`, and waited for at once."""
    with started(what, argv, env) as finish:
        return finish()
