# SPDX-License-Identifier: LGPL-2.1-or-later
"""``kvmi-host attach``: the built-in agent, or the session for someone else."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic, time_ns
from typing import Annotated

import typer

import kvmi_host
from kvmi_host.attach import event_id, find_target, hand_over, policy_for, run_with_session
from kvmi_host.cli.options import Connect, Json, Vm
from kvmi_host.cli.tally import Tally
from kvmi_host.cli.view import View, event_record, facts_record, view_for
from kvmi_host.introspect import SessionClosed, Wanted, Watch, serve
from kvmi_host.protocol import Event, EventId, event_name

app = typer.Typer(add_completion=False)

_DEFAULT_EVENTS = "cr0,cr3,cr4,hypercall,create-vcpu"
_FEWEST_SAMPLES = 16  # of the round trip: fewer say nothing


@app.command()
def attach(
    vm: Vm,
    command: Annotated[
        list[str] | None, typer.Argument(metavar="CMD", help="With --exec: the program.", show_default=False)
    ] = None,
    events: Annotated[
        str, typer.Option(metavar="LIST", help="What to watch: cr0,cr3,cr4,msr:lstar,hypercall,breakpoint,...")
    ] = _DEFAULT_EVENTS,
    allow: Annotated[
        str,
        typer.Option(metavar="observe|full|LIST", help="What the session may do; the kernel enforces it."),
    ] = "observe",
    as_json: Json = False,
    count: Annotated[int | None, typer.Option(min=1, help="Leave after so many events.")] = None,
    duration: Annotated[float | None, typer.Option(min=0, metavar="SECONDS", help="Leave after this time.")] = None,
    to: Annotated[str | None, typer.Option(metavar="SOCKET", help="Give the session to who listens there.")] = None,
    run: Annotated[bool, typer.Option("--exec", help="Give the session to a program: --exec -- CMD ARGS.")] = False,
    connect: Connect = None,
) -> None:
    """Attach to a running VM and show its events, or give its session to an introspector.

    The VM is not stopped, and does not depend on us: when we end, it goes on.
    """
    try:
        rules = policy_for(allow)
        wanted = Wanted.parse([name.strip() for name in events.split(",") if name.strip()], event_id)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if run != bool(command) or (run and to):
        raise typer.BadParameter("--exec takes a program (--exec -- CMD ARGS), and excludes --to")
    if to:
        hand_over(find_target(vm, connect), to, rules)
    elif command:
        status = run_with_session(find_target(vm, connect), command, rules)
        raise typer.Exit(status if status >= 0 else 1)
    else:
        with kvmi_host.attach(vm, uri=connect, allow=rules) as attached, _signals() as signalled:
            _watch(attached, wanted, view_for(as_json), signalled, count, duration)


def _watch(
    attached: kvmi_host.Vm,
    wanted: Wanted,
    view: View,
    signalled: list[str],
    count: int | None,
    duration: float | None,
) -> None:
    session, tally = attached.session, Tally()
    deadline = None if duration is None else monotonic() + duration
    view.session(facts_record(attached.facts))
    if event_name(EventId.UNHOOK) in attached.facts.events:
        wanted = replace(wanted, events=wanted.events | {EventId.UNHOOK})  # so that detach can ask us
    try:
        watch = Watch(session, wanted)

        def handle(event: Event) -> None:
            tally.enter(event)
            view.event(event_record(attached.facts.name, event, time_ns()))
            watch.saw(event)

        def idle() -> bool:
            if signalled:
                tally.ended = signalled[0]
            elif count is not None and tally.events >= count:
                tally.ended = "count"
            elif deadline is not None and monotonic() >= deadline:
                tally.ended = "duration"
            else:
                watch.retry()
                if tally.sample_due:
                    tally.sample(session)
                return False
            return True

        if serve(session, handle, idle):
            tally.ended = "unhook"
        watch.stop()
        for _ in range(_FEWEST_SAMPLES):
            tally.sample(session)
    except SessionClosed:
        tally.ended = "the VM or its session ended"
    finally:
        view.summary(tally.summary())
    if count is not None and tally.events < count:
        raise typer.Exit(1)


@contextmanager
def _signals() -> Iterator[list[str]]:
    """A list that gets the name of a signal which asks us to leave. No event is left unanswered because of it."""
    names: list[str] = []

    def note(number: int, _frame: object) -> None:
        names.append(signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield names
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
