# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a shell offers when someone presses tab. It is quick, and silent about whatever goes wrong.

The scripts for the shells are typer's: ``kvmi-host --install-completion``.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from threading import Thread

import typer

from kvmi_host.protocol import Command, EventId, command_name, event_name, msrs

_VARIABLE = "_KVMI_HOST_COMPLETE"  # in which typer's scripts say what is wanted
_BREAKS = frozenset(":=")
"""What bash breaks words at, besides blanks: COMP_WORDBREAKS."""

_DEADLINE = 1.0  # seconds that libvirt may take: longer, and it seems to hang
_IMAGES = ("modewalk", "linux", "debian")


def running_vms(incomplete: str) -> list[str]:
    """VMs to attach to: libvirt's by name, others as ``pid:N``.

    Their processes' command lines tell, which every user may read: at once, and whether or not libvirt answers.
    """
    from kvmi_host.attach.target import command_line, option_of, processes

    vms = []
    for pid in processes():
        words = command_line(pid)
        if not words or not Path(words[0]).name.startswith("qemu-system"):
            continue
        name = option_of(words, "-name") or ""
        by_libvirt = name.startswith("guest=")  # always so; see virsh domxml-to-native
        if by_libvirt:
            vms.append(name.removeprefix("guest=").partition(",")[0])
        if not by_libvirt or incomplete.startswith("pid:"):
            vms.append(f"pid:{pid}")
    return sorted(vms)


def guests(ctx: typer.Context, incomplete: str) -> list[str]:
    """libvirt's guests: those that are off to start, those that run to stop and save, else all."""
    wanted = {"start": False, "stop": True, "save": True}.get(str(ctx.info_name))
    return _in_time(lambda: _domains(ctx.params.get("connect"), wanted))


def _domains(uri: str | None, running: bool | None) -> list[str]:
    from kvmi_host.provision import connect

    connection = connect(uri, _DEADLINE)
    domains = connection.listAllDomains()
    return sorted(domain.name() for domain in domains if running in (None, bool(domain.isActive())))


def _in_time(ask: Callable[[], list[str]]) -> list[str]:
    """What `ask` returns; nothing where it fails or takes too long. It goes on behind us until the process ends."""
    answer: list[str] = []

    def attempt() -> None:
        try:
            answer.extend(ask())
        except Exception:
            return  # whoever presses tab wants no error

    thread = Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(_DEADLINE)
    return list(answer)


def events(incomplete: str) -> list[str]:
    """What ``--events`` takes, after the last comma."""
    from kvmi_host.introspect.interests import NAMES

    watchable = [name for name, index in msrs.NAMES.items() if any(index in part for part in msrs.WATCHABLE)]
    return _next_of_list(incomplete, [*NAMES, *(f"msr:{name}" for name in watchable), "breakpoint:", "page:"])


def allowances(incomplete: str) -> list[str]:
    """What ``--allow`` takes: a profile, or a list of commands and events."""
    from kvmi_host.attach.policy import PROFILES

    commands = [command_name(command) for command in Command if command > Command.EVENT]
    listed = _next_of_list(incomplete, [*commands, *(f"event:{event_name(event)}" for event in EventId)])
    return listed if "," in incomplete else [*PROFILES, *listed]


def images() -> Sequence[str]:
    """What ``--image`` takes, besides a path."""
    return _IMAGES


def _next_of_list(incomplete: str, names: Iterable[str]) -> list[str]:
    before, comma, _ = incomplete.rpartition(",")
    there = before.split(",")
    return [f"{before}{comma}{name}" for name in names if name not in there]


def complete_as_bash_breaks_words(app: Callable[[], object]) -> bool:
    """Run `app` for typer's bash script, if that is who asks: with the words as they were typed.

    bash breaks ``msr:lstar`` in three, and puts what it is told in the place of the last of them.

    :return: whether it was.
    """
    words = os.environ.get("COMP_WORDS", "").split("\n")
    if os.environ.get(_VARIABLE) != "complete_bash" or len(words) < 2:
        return False
    try:
        at = int(os.environ["COMP_CWORD"])
    except (KeyError, ValueError):
        return False
    typed = list(_typed(words[: at + 1]))
    os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = "\n".join(typed), str(len(typed) - 1)
    stays = typed[-1][: typed[-1].rfind(":") + 1]
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            app()
    finally:
        typer.echo("\n".join(line.removeprefix(stays) for line in said.getvalue().splitlines()))
    return True


def _typed(words: Sequence[str]) -> Iterator[str]:
    """The words as they were before they were broken."""
    word, joins = words[0], False
    for part in words[1:]:
        breaks = bool(part) and not set(part) - _BREAKS
        if not breaks and not joins:
            yield word
            word = ""
        word, joins = word + part, breaks
    yield word
