# SPDX-License-Identifier: LGPL-2.1-or-later
"""The differential test finds what differs, and a kernel does not differ from itself."""

from __future__ import annotations

import pytest

from kvmi_host.protocol import Command, EventId
from kvmi_host.testing import peer, vm_state
from kvmi_host.testing.differential import Script, SimulatedSide, disagreement, drawn, written
from kvmi_host.testing.differential.scripts import carried_out
from kvmi_host.testing.differential.steps import Act, Ask, Deed, Raw, Reply, Seen

SCRATCH = [0x300000 + index * 4096 for index in range(4)]
SIMULATED = SimulatedSide(SCRATCH[0])
WRITTEN = written(SCRATCH[0])
DONE = "answer of 0 bytes"


def seen(name: str) -> list[Seen]:
    return list(carried_out(WRITTEN[name], SIMULATED))


@pytest.mark.parametrize("name", WRITTEN)
def test_a_written_exchange_comes_to_the_same_twice(name: str) -> None:
    assert disagreement(WRITTEN[name], SIMULATED, SIMULATED) is None


@pytest.mark.parametrize("seed", range(20))
def test_a_drawn_exchange_comes_to_the_same_twice(seed: int) -> None:
    assert disagreement(drawn(seed, SCRATCH, SIMULATED), SIMULATED, SIMULATED) is None


def test_what_is_drawn_follows_from_the_seed() -> None:
    assert drawn(5, SCRATCH, SIMULATED) == drawn(5, SCRATCH, SIMULATED)
    assert drawn(5, SCRATCH, SIMULATED) != drawn(6, SCRATCH, SIMULATED)


def test_what_is_drawn_is_of_every_kind() -> None:
    scripts = [drawn(seed, SCRATCH, SIMULATED) for seed in range(60)]
    steps = [step for script in scripts for step in script.steps]
    answers = [came.answer for script in scripts for came in script.seen]
    told = {what.partition(" ")[0] for script in scripts for came in script.seen for _, what in came.events}
    assert {type(step) for step in steps} == {Act, Ask, Raw, Reply}
    assert {step.command for step in steps if isinstance(step, Ask)} >= vm_state.COMMANDS.keys()
    assert {answer.partition(" ")[0] for answer in answers} == {"answer", "error", "silent", "ended"}
    assert {answer for answer in answers if answer.startswith("error")} == {f"error -{n}" for n in (1, 2, 22, 95)}
    assert told >= {"cr", "msr", "breakpoint", "hypercall", "pf", "descriptor", "create-vcpu", "pause-vcpu"}


# -- what a step comes to


def test_an_event_is_told_with_its_vcpu_its_sizes_and_its_number() -> None:
    *_, before, came, after = seen("a reply with 8 bytes of own data")
    assert came == Seen("silent", ((0, "msr of 544 and 24 bytes"),), (2,))
    assert before.events == after.events == ()


def test_the_end_of_the_session_is_told_and_nothing_after_it() -> None:
    assert seen("answers that are data cannot be off") == [Seen("silent"), Seen("ended")]
    script = Script(WRITTEN["each event and its reply"].policy, (Reply(0), Ask(Command.GET_VERSION)))
    assert list(carried_out(script, SIMULATED)) == [Seen("ended")]


def test_a_thousand_pauses_may_be_owed_and_no_more() -> None:
    came = [outcome.answer for outcome in seen("a thousand pauses and no more")]
    assert came[:1002] == [DONE] * 1001 + ["error -16"]


def test_vcpus_announce_themselves_before_their_pauses_and_once() -> None:
    paused, _, second, first, *rest = seen("vCPUs announce themselves once")
    assert paused.events == ((0, "pause-vcpu of 544 and 0 bytes"),)
    assert second.events == ()
    assert first.events == ((0, "create-vcpu of 544 and 0 bytes"),)
    assert [came.events for came in rest] == [(), (), ()]


# -- what differs is found


def differs(script: Script, monkeypatch: pytest.MonkeyPatch, what: str, value: object) -> str:
    """How a simulated kernel with a fault disagrees with what was seen without it."""
    script = script._replace(seen=carried_out(script, SIMULATED))
    monkeypatch.setattr(vm_state if what in vars(vm_state) else peer, what, value)
    return disagreement(script, SIMULATED, SIMULATED) or ""


def test_another_error_code_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = differs(WRITTEN["a thousand pauses and no more"], monkeypatch, "_MAX_PAUSES", 999)
    assert "live: Seen(answer='error -16'" in found
    assert "pause-vcpu" in found


def test_another_size_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(WRITTEN["each event and its reply"].policy, (Ask(Command.GET_XSAVE, bytes(8)),))
    assert "answer of 4095 bytes" in differs(script, monkeypatch, "XSAVE_SIZE", 4095)


def test_a_session_that_goes_on_where_it_should_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmi_host.testing.differential.sides._SIMULATED_DEADLINE", 0.05)
    sizes = {EventId.CR: 9, EventId.MSR: 8, EventId.PF: 272}
    found = differs(WRITTEN["an invalid reply: too much own data"], monkeypatch, "_OWN_REPLY", sizes)
    assert "in 0.05 s there was no more than" in found


def test_an_event_that_does_not_come_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmi_host.testing.differential.sides._SIMULATED_DEADLINE", 0.05)
    retry_is_unknown = {**peer._ACCEPTED, EventId.BREAKPOINT: frozenset({0, 2})}
    found = differs(WRITTEN["retry does it again"], monkeypatch, "_ACCEPTED", retry_is_unknown)
    assert "in 0.05 s there was no more than" in found


def test_an_event_that_should_not_come_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(WRITTEN["each event and its reply"].policy, (Act(0, Deed.HYPERCALL), Ask(Command.GET_VERSION)))
    script = script._replace(seen=carried_out(script, SIMULATED))
    monkeypatch.setattr(peer.SimulatedKernel, "enabled", lambda *_: True)
    assert "hypercall of 544" in (disagreement(script, SIMULATED, SIMULATED) or "")


def test_commands_of_the_simulated_kernel_are_those_of_the_kernel_part(pair) -> None:
    _, session = pair()
    absent = {Command.CONTROL_VE, Command.GET_MAP_TOKEN, *range(Command.CONTROL_SPP, Command.SET_PAGE_WRITE_BITMAP + 1)}
    assert {c for c in Command if not session.check_command(c)} == absent | {Command.EVENT_REPLY, Command.EVENT}
