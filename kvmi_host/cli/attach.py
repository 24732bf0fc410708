# SPDX-License-Identifier: LGPL-2.1-or-later
"""``kvmi-host attach``: the built-in agent, or the session for someone else."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from time import monotonic, time_ns
from typing import Annotated, TypeVar

import typer

import kvmi_host
from kvmi_host.attach import find_target, hand_over, policy_for, policy_of, run_with_session
from kvmi_host.cli.completion import allowances
from kvmi_host.cli.completion import events as events_of
from kvmi_host.cli.options import AttachMethod, Connect, Json, Methods, Vm
from kvmi_host.cli.records import event_record, facts_record
from kvmi_host.cli.signals import noted_signals
from kvmi_host.cli.steering import Steering
from kvmi_host.cli.tally import Tally
from kvmi_host.cli.view import View, view_for
from kvmi_host.introspect import Interest, SessionClosed
from kvmi_host.introspect.holding import Hold
from kvmi_host.introspect.interests import parse
from kvmi_host.introspect.plans import Plan, run
from kvmi_host.introspect.watch import Watch
from kvmi_host.protocol import Event, KvmiError
from kvmi_host.recording import Recorder

T = TypeVar("T")

app = typer.Typer(add_completion=False)

_DEFAULT_EVENTS = "cr0,cr3,cr4,hypercall,create-vcpu"
_FEWEST_SAMPLES = 16  # of the round trip: fewer say nothing
_SIGNALLED = 128  # and the signal's number: the exit status that shells give to what a signal ended
_TICK = 0.1  # seconds that a key waits at most when there are no events


@app.command()
def attach(
    vm: Vm,
    command: Annotated[
        list[str] | None, typer.Argument(metavar="CMD", help="With --exec: the program.", show_default=False)
    ] = None,
    events: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="What to watch: cr0,cr3,cr4,msr:lstar,hypercall,breakpoint,...",
            autocompletion=events_of,
        ),
    ] = _DEFAULT_EVENTS,
    allow: Annotated[
        str | None,
        typer.Option(
            metavar="observe|full|LIST",
            help="What the session may do; the kernel enforces it.",
            show_default="what the policy file says, else observe",
            autocompletion=allowances,
        ),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What it may do at most, as kvmi-policy(5) says.",
            show_default="/etc/kvmi-host/policies/VM.toml, if there is one",
        ),
    ] = None,
    as_json: Json = False,
    count: Annotated[int | None, typer.Option(min=1, help="Leave after so many events.")] = None,
    duration: Annotated[float | None, typer.Option(min=0, metavar="SECONDS", help="Leave after this time.")] = None,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Record the session: replay shows it again, Wireshark opens it.")
    ] = None,
    to: Annotated[str | None, typer.Option(metavar="SOCKET", help="Give the session to who listens there.")] = None,
    cookie_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --to: the secret that the introspector must know, as it stands there."),
    ] = None,
    execute: Annotated[bool, typer.Option("--exec", help="Give the session to a program: --exec -- CMD ARGS.")] = False,
    method: AttachMethod = Methods.AUTO,
    wait: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long to wait for the VM to run, if it does not yet.")
    ] = 0.0,
    connect: Connect = None,
) -> None:
    """Attach to a running VM and show its events, or give its session to an introspector.

    The VM is not stopped, and does not depend on us: when we end, it goes on.
    """
    try:
        asked = None if allow is None else policy_for(allow)
        interests = [interest for name in events.split(",") if name.strip() for interest in parse(name.strip())]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if execute != bool(command) or (execute and to):
        raise typer.BadParameter("--exec takes a program (--exec -- CMD ARGS), and excludes --to")
    if record and (to or execute):
        raise typer.BadParameter("--record is for the built-in agent, and excludes --to and --exec")
    if cookie_file and not to:
        raise typer.BadParameter("--cookie-file is for the introspector of --to")
    cookie = _cookie(cookie_file)
    if to:
        target = find_target(vm, connect, wait)
        hand_over(target, to, policy_of(target, asked, policy), cookie=cookie, method=method)
    elif command:
        target = find_target(vm, connect, wait)
        status = run_with_session(target, command, policy_of(target, asked, policy), method=method)
        raise typer.Exit(status if status >= 0 else _SIGNALLED - status)
    else:
        with ExitStack() as stack:
            recorder = stack.enter_context(Recorder(record, vm)) if record else None
            tap = recorder.tap if recorder else None
            attached = stack.enter_context(
                kvmi_host.attach(vm, uri=connect, allow=asked, policy=policy, method=method, wait=wait, tap=tap)
            )
            signalled = stack.enter_context(noted_signals())
            view = stack.enter_context(closing(view_for(as_json)))
            _watch(attached, interests, view, recorder, signalled, count, duration)


def _cookie(file: Path | None) -> bytes | None:
    try:
        return file.read_bytes() if file else None
    except OSError as error:
        raise typer.BadParameter(f"--cookie-file {file}: {error.strerror}") from None


def _watch(
    vm: kvmi_host.Vm,
    interests: Sequence[Interest],
    view: View,
    recorder: Recorder | None,
    signalled: list[str],
    count: int | None,
    duration: float | None,
) -> None:
    session, facts, tally = vm.session, vm.facts, Tally()
    deadline = None if duration is None else monotonic() + duration
    hold = Hold()
    watch = Watch(hold, interests)

    def heard(event: Event) -> None:
        tally.enter(event)
        view.event(event_record(facts.name, event, recorder.time_of(event) if recorder else time_ns()))

    def carry_out(plan: Plan[T]) -> T:
        return run(session, plan, heard)

    steering = Steering(hold, facts, carry_out)

    def ended() -> str:
        steering.press(view.poll(steering.situation))
        if signalled:
            return signalled[0]
        if steering.quit:
            return "quit"
        if count is not None and tally.events >= count:
            return "count"
        if deadline is not None and monotonic() >= deadline:
            return "duration"
        return "unhook" if watch.unhooked else ""

    shown_facts = facts_record(facts)
    if recorder:
        recorder.note({"session": shown_facts})
    try:
        try:
            try:
                carry_out(watch.obey())
            finally:  # who reads of the session can detach it
                view.session(shown_facts)
            carry_out(watch.begin())
            while not (why := ended()):
                if (event := carry_out(watch.next(_TICK))) is not None:
                    carry_out(watch.answer(event))
                if tally.sample_due:
                    tally.sample(session)
            tally.ended = why
        finally:
            if recorder:  # what comes from now on is answered, and not shown
                recorder.note({"leaving": {"events": tally.events}})
            if not session.closed:
                steering.let_go()
                run(session, watch.end())
        for _ in range(_FEWEST_SAMPLES):
            tally.sample(session)
    except SessionClosed:
        tally.ended = "the VM or its session ended"
    except KvmiError as error:
        tally.ended = str(error)
        raise
    finally:
        summary = tally.summary()
        view.summary(summary)
        if recorder:
            recorder.note({"summary": summary})
    if count is not None and tally.events < count:
        raise typer.Exit(1)
