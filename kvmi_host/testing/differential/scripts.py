# SPDX-License-Identifier: LGPL-2.1-or-later
"""The exchanges: written ones, and those that a seed draws; and whether two sides come to the same."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from struct import pack
from typing import NamedTuple

from kvmi_host.attach.policy import FULL, OBSERVE, Policy
from kvmi_host.protocol import Action, Command, EventId, command_name, frame, msr_index
from kvmi_host.testing.differential.draw import Drawing
from kvmi_host.testing.differential.sides import VCPUS, Side
from kvmi_host.testing.differential.steps import VCPU, Act, Ask, Deed, Nothing, Raw, Reply, Seen, Step

PAGE = 4096
_LSTAR = msr_index("lstar")
_FEW = Policy(
    observe=True,
    commands=frozenset({Command.GET_GUEST_INFO, Command.PAUSE_VCPU, Command.CONTROL_EVENTS, Command.READ_PHYSICAL}),
    events=frozenset({EventId.CR, EventId.HYPERCALL}),
)
"""Without PAUSE_VCPU among the events."""
_POLICIES = (FULL, FULL, FULL, OBSERVE, _FEW)
_LENGTHS = (10, 30, 60)


class Script(NamedTuple):
    """An exchange. ``seen``: what has come of each step on the simulated side, for a script that was drawn there."""

    policy: Policy
    steps: tuple[Step, ...]
    seen: tuple[Seen, ...] = ()


def carried_out(script: Script, side: Side) -> tuple[Seen, ...]:
    """What comes of each step until the session ends, on a side that has all of it at once."""
    seen: list[Seen] = []
    with side.session(script.policy) as driver:
        for step in script.steps:
            seen.append(driver.carry_out(step))
            if driver.ended:
                break
    return tuple(seen)


def drawn(seed: int, scratch: Sequence[int], simulated: Side) -> Script:
    """The script that follows from a seed. It is carried out while it is drawn: what may be done depends on what waits.

    :param scratch: addresses of pages that the guest makes no use of, the one that :attr:`Deed.WRITE` writes to first.
    """
    random = Random(seed)
    policy, length = random.choice(_POLICIES), random.choice(_LENGTHS)
    steps: list[Step] = []
    seen: list[Seen] = []
    with simulated.session(policy) as driver:
        drawing = Drawing(random, policy, scratch, driver.waiting)
        opening = drawing.opening()
        while len(steps) < len(opening) + length and not driver.ended:
            steps.append(opening[len(steps)] if len(steps) < len(opening) else drawing.step())
            seen.append(driver.carry_out(steps[-1]))
    return Script(policy, tuple(steps), tuple(seen))


def disagreement(script: Script, simulated: Side, live: Side) -> str | None:
    """The first step of which the live side makes something else than the simulated one; None: they agree."""
    wanted = script.seen or carried_out(script, simulated)
    done: list[str] = []
    with live.session(script.policy) as driver:
        for step, expected in zip(script.steps, wanted, strict=False):
            done.append(f"{_said(step)}: {expected}")
            try:
                came: object = driver.carry_out(step, expected)
            except Nothing as nothing:
                came = nothing
            if came != expected:
                return f"live: {came}; simulated, of this and the steps before:\n" + "\n".join(done[-8:])
    return None


def _said(step: Step) -> str:
    if isinstance(step, Ask):
        return f"{command_name(step.command)} {step.payload.hex()}"
    return repr(step)


# -- those that are written


def _control(vcpu: int, event: EventId, enable: bool = True) -> Ask:
    return Ask(Command.CONTROL_EVENTS, VCPU.pack(vcpu, 0, 0) + pack("<HBBI", event, enable, 0, 0))


def _watch_cr3(vcpu: int) -> Ask:
    return Ask(Command.CONTROL_CR, VCPU.pack(vcpu, 0, 0) + pack("<BBHI", 1, 0, 0, 3))


def _watch_lstar(vcpu: int) -> Ask:
    return Ask(Command.CONTROL_MSR, VCPU.pack(vcpu, 0, 0) + pack("<BBHI", 1, 0, 0, _LSTAR))


def _pause(vcpu: int) -> Ask:
    return Ask(Command.PAUSE_VCPU, VCPU.pack(vcpu, 0, 0) + bytes(8))


def _answers(enable: bool, now: bool) -> Ask:
    return Ask(Command.CONTROL_CMD_RESPONSE, pack("<BBHI", enable, now, 0, 0))


def _page_access(gpa: int, access: int) -> Ask:
    return Ask(Command.SET_PAGE_ACCESS, pack("<HHIQBBHI", 0, 1, 0, gpa, access, 0, 0, 0))


def _inject(vcpu: int, vector: int) -> Ask:
    return Ask(Command.INJECT_EXCEPTION, VCPU.pack(vcpu, 0, 0) + pack("<BBHIQ", vector, 0, 0, 0, 0))


_VERSION = Ask(Command.GET_VERSION)
_VCPU_INFO = Ask(Command.GET_VCPU_INFO, VCPU.pack(0, 0, 0))
_BREAKPOINT = EventId.BREAKPOINT.value


def written(scratch: int) -> dict[str, Script]:
    """The exchanges that every rule of replies, numbers and states has a part in, by name.

    :param scratch: the address of the page that :attr:`Deed.WRITE` writes to.
    """
    every = range(VCPUS)
    hypercall = (_control(0, EventId.HYPERCALL), Act(0, Deed.HYPERCALL))
    cr3 = (_control(0, EventId.CR), _watch_cr3(0), Act(0, Deed.CR3))
    scripts: dict[str, tuple[Step, ...]] = {
        "each event and its reply": (
            *(_control(0, EventId(deed.value)) for deed in Deed),
            *(_watch_cr3(0), _watch_lstar(0), _page_access(scratch, 5)),
            *(step for deed in Deed for step in (Act(0, deed), _VCPU_INFO, Reply(0))),
            _VERSION,
        ),
        "no event is sent that is not on, or not watched": (
            *(Act(0, deed) for deed in Deed),
            *(_control(0, EventId(deed.value)) for deed in Deed),
            *(Act(0, deed) for deed in (Deed.CR3, Deed.LSTAR, Deed.WRITE)),
            *(Act(1, deed) for deed in Deed),
        ),
        "the vCPUs share one count, and wait for themselves": (
            *(_control(vcpu, EventId.HYPERCALL) for vcpu in every),
            *(step for _ in range(3) for step in (Act(0, Deed.HYPERCALL), Act(1, Deed.HYPERCALL), Reply(1), Reply(0))),
        ),
        "retry does it again": (
            *(_control(0, EventId.BREAKPOINT), Act(0, Deed.BREAKPOINT)),
            *(Reply(0, Action.RETRY), Reply(0, Action.RETRY), Reply(0), _VERSION),
            *(_control(0, EventId.PF), _page_access(scratch, 1), Act(0, Deed.WRITE)),
            *(Reply(0, Action.RETRY), _page_access(scratch, 7), Reply(0, Action.RETRY), _VERSION),
        ),
        "an action that the event does not accept is CONTINUE": (
            *hypercall,
            *(Reply(0, Action.RETRY), Act(0, Deed.HYPERCALL), Reply(0, 255), Act(0, Deed.HYPERCALL), Reply(0)),
        ),
        "pauses come last, one for each": (
            *(_control(0, EventId.HYPERCALL), Act(0, Deed.HYPERCALL), _pause(0), _pause(0), _pause(1)),
            *(Reply(0), Reply(0), Reply(1), Reply(0), _VERSION),
        ),
        "a thousand pauses and no more": (_pause(0), *[_pause(0)] * 1001, _VERSION, Reply(0), Reply(0)),
        "vCPUs announce themselves once": (
            *(_pause(0), Ask(Command.CONTROL_VM_EVENTS, pack("<HBBI", EventId.CREATE_VCPU, 1, 0, 0))),
            *(Reply(1), Reply(0), Reply(0), _VERSION),
            Ask(Command.CONTROL_VM_EVENTS, pack("<HBBI", EventId.CREATE_VCPU, 1, 0, 0)),
        ),
        "one exception at a time": (*hypercall, _inject(0, 3), _inject(0, 3), Reply(0), _VERSION),
        "answers off from now on": (
            *(_answers(False, True), _control(0, EventId.HYPERCALL), Ask(63, b"x"), _answers(True, True)),
            *(Act(0, Deed.HYPERCALL), Reply(0), _VERSION),
        ),
        "answers off from the next command on": (
            *(_answers(False, False), _control(0, EventId.HYPERCALL), _answers(True, False), _VERSION),
        ),
        "answers that are data cannot be off": (_answers(False, True), _VERSION),
        "a refusal of data may be off": (
            *(_answers(False, True), Ask(Command.READ_PHYSICAL, pack("<QQ", 1 << 40, 1)), _answers(True, True)),
            _VERSION,
        ),
        "the largest message, and a larger one": (
            Ask(63, bytes(8184)),
            _VERSION,
            Raw(pack("<HHI", Command.GET_VERSION, 8185, 1)),
        ),
    }
    invalid: dict[str, Step] = {
        "an older number": Reply(0, seq=-1),
        "a number to come": Reply(0, seq=1),
        "padding of the vCPU header": Reply(0, header_padding=(1, 0)),
        "more padding of the vCPU header": Reply(0, header_padding=(0, 1)),
        "padding": Reply(0, padding=(1, 0)),
        "more padding": Reply(0, padding=(0, 1)),
        "another vCPU": Reply(0, to=1),
        "no such vCPU": Reply(0, to=VCPUS),
        "too much own data": Reply(0, own=bytes(9)),
        "no event": Reply(0, common=1),
        "nothing but a vCPU header": Reply(0, common=0),
        "the reply to nothing": Reply(1),
        "half a vCPU header": Raw(frame(Command.EVENT_REPLY, 1, bytes(4))),
    }
    scripts |= {f"an invalid reply: {what}": (*cr3, step) for what, step in invalid.items()}
    scripts |= {
        f"an invalid reply to a page fault: {what}": (
            *(_control(0, EventId.PF), _page_access(scratch, 1), Act(0, Deed.WRITE), Reply(0, own=own)),
        )
        for what, own in {
            "too much context": pack("<QIBBH", 0, 257, 0, 0, 0) + bytes(256),
            "no flag": pack("<QIBBH", 0, 0, 2, 0, 0) + bytes(256),
            "no flag either": pack("<QIBBH", 0, 0, 0, 2, 0) + bytes(256),
            "padding": pack("<QIBBH", 0, 0, 0, 0, 1) + bytes(256),
        }.items()
    }
    scripts |= {
        f"a reply whose common part has {size} bytes": (*hypercall, Reply(0, common=size), _VERSION)
        for size in range(2, 8)
    }
    scripts |= {
        f"a reply with {size} bytes of own data": (
            *(_control(0, EventId.MSR), _watch_lstar(0), Act(0, Deed.LSTAR)),
            *(Reply(0, cut=size), Act(0, Deed.LSTAR), Reply(0)),
        )
        for size in range(9)
    }
    written_ones = {name: Script(FULL, steps) for name, steps in scripts.items()}
    written_ones["an observer may not crash the guest"] = Script(OBSERVE, (_pause(0), Reply(0, Action.CRASH)))
    written_ones["an observer is refused what changes the guest"] = Script(
        OBSERVE,
        (
            *(_page_access(scratch, 1), _inject(0, 3), Ask(Command.WRITE_PHYSICAL, pack("<QQ", scratch, 1) + b"x")),
            *(Ask(Command.SET_REGISTERS, VCPU.pack(0, 0, 0) + bytes(144)), _pause(0), Reply(0, Action.RETRY), _VERSION),
        ),
    )
    return written_ones
