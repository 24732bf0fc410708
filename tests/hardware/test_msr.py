# SPDX-License-Identifier: LGPL-2.1-or-later
"""MSR events: a write that changes a watched MSR, before it is made."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmi_host.introspect import Session
from kvmi_host.protocol import Event, EventId, MsrWrite, msr_index
from kvmi_host.testing.live import LiveGuest
from kvmi_host.testing.puppet import Puppet, Result, address

pytestmark = pytest.mark.hardware

LSTAR = msr_index("lstar")
GP = 13
NOT_CANONICAL = 1 << 63
CHANGES = {
    # by name: a bit of it that may be set or not
    "sysenter-cs": 1 << 3,
    "sysenter-esp": 1 << 12,
    "sysenter-eip": 1 << 12,
    "pat": 1 << 1,  # WB to UC-
    "efer": 1 << 0,  # SCE
    "star": 1 << 35,
    "lstar": 1 << 46,
    "cstar": 1 << 12,
    "sfmask": 1 << 9,
    "fs-base": 1 << 33,
    "kernel-gs-base": 1 << 33,
}


def value_of(puppet: Puppet, msr: int, vcpu: int = 0) -> int:
    registers = puppet.run(vcpu, "rdmsr", rcx=msr).registers
    return registers.rdx << 32 | registers.rax


def write(
    puppet: Puppet, msr: int, value: int, answer: Callable[[Event], None] | None = None, vcpu: int = 0
) -> tuple[list[Event], Result]:
    return puppet.watch(vcpu, "wrmsr", answer, rcx=msr, rax=value & 0xFFFFFFFF, rdx=value >> 32)


@pytest.fixture
def watched(puppet: Puppet) -> Puppet:
    """LSTAR of vCPU 0 is watched."""
    puppet.session.control_events(0, EventId.MSR, True)
    puppet.session.control_msr(0, LSTAR, True)
    return puppet


@pytest.mark.rule("4.7", "4.74")
@pytest.mark.parametrize("name", CHANGES)
def test_a_write_that_changes_a_watched_msr_is_an_event(puppet: Puppet, name: str) -> None:
    msr = msr_index(name)
    old = value_of(puppet, msr)
    puppet.session.control_events(0, EventId.MSR, True)
    puppet.session.control_msr(0, msr, True)
    for before, after in ((old, old ^ CHANGES[name]), (old ^ CHANGES[name], old)):
        (event,), result = write(puppet, msr, after)
        assert event.event == EventId.MSR
        assert event.data == MsrWrite(msr, before, after)
        assert event.rip == address("wrmsr")
        assert result.exceptions == 0
        assert value_of(puppet, msr) == after


@pytest.mark.rule("4.7", "4.75")
def test_the_write_is_made_after_the_reply(watched: Puppet) -> None:
    old = value_of(watched, LSTAR)

    def look(event: Event) -> None:
        assert event.msrs.lstar == old
        assert watched.session.get_registers(0, [LSTAR]).msrs[LSTAR] == old
        watched.session.reply(event)

    write(watched, LSTAR, old ^ 0x1000, look)
    assert watched.session.get_registers(0, [LSTAR]).msrs[LSTAR] == old ^ 0x1000


@pytest.mark.rule("4.9")
def test_the_new_value_of_a_reply_is_what_is_written(watched: Puppet) -> None:
    new = value_of(watched, LSTAR) ^ 0x1000
    events, result = write(watched, LSTAR, new, lambda event: watched.session.reply(event, new_val=new ^ 0x7000))
    assert len(events) == 1
    assert result.exceptions == 0
    assert value_of(watched, LSTAR) == new ^ 0x7000


@pytest.mark.rule("4.9")
def test_a_new_value_that_the_msr_does_not_take_faults_in_the_guest(watched: Puppet) -> None:
    old = value_of(watched, LSTAR)

    def spoil(event: Event) -> None:
        watched.session.reply(event, new_val=NOT_CANONICAL)

    _, result = write(watched, LSTAR, old ^ 0x1000, spoil)
    assert (result.exceptions, result.vector, result.rip) == (1, GP, address("wrmsr"))
    assert value_of(watched, LSTAR) == old


@pytest.mark.rule("4.7")
def test_a_value_that_the_msr_does_not_take_faults_in_the_guest_as_ever(watched: Puppet) -> None:
    old = value_of(watched, LSTAR)
    _, result = write(watched, LSTAR, NOT_CANONICAL)
    assert (result.exceptions, result.vector, result.rip) == (1, GP, address("wrmsr"))
    assert value_of(watched, LSTAR) == old


@pytest.mark.rule("4.11")
def test_a_write_of_the_same_value_is_no_event(watched: Puppet) -> None:
    value = value_of(watched, LSTAR)
    assert write(watched, LSTAR, value)[0] == []
    assert len(write(watched, LSTAR, value ^ 0x1000)[0]) == 1
    assert write(watched, LSTAR, value ^ 0x1000)[0] == []


@pytest.mark.rule("4.7")
def test_a_loop_of_writes_is_as_many_events(watched: Puppet) -> None:
    values = {"rax": 0x1000, "rbx": 0x2000}
    puppet = watched
    puppet.run(1, "nop")
    write(puppet, LSTAR, 0x2000)
    events, _ = puppet.watch(0, "loop_wrmsr", rcx=LSTAR, r15=50, **values)
    assert [event.data.new for event in events] == [0x1000, 0x2000] * 25


@pytest.mark.rule("4.8", "4.35")
def test_another_msr_and_another_vcpu_are_not_watched(watched: Puppet) -> None:
    cstar = msr_index("cstar")
    assert write(watched, cstar, value_of(watched, cstar) ^ 0x1000)[0] == []
    assert write(watched, LSTAR, value_of(watched, LSTAR, vcpu=1) ^ 0x1000, vcpu=1)[0] == []
    assert len(write(watched, LSTAR, value_of(watched, LSTAR) ^ 0x1000)[0]) == 1


@pytest.mark.rule("4.8", "4.34")
@pytest.mark.parametrize("missing", ["the event", "the msr"])
def test_one_switch_alone_brings_no_event(watched: Puppet, missing: str) -> None:
    session = watched.session
    if missing == "the event":
        session.control_events(0, EventId.MSR, False)
    else:
        session.control_msr(0, LSTAR, False)
    new = value_of(watched, LSTAR) ^ 0x1000
    assert write(watched, LSTAR, new)[0] == []
    assert value_of(watched, LSTAR) == new
    session.control_events(0, EventId.MSR, True)
    session.control_msr(0, LSTAR, True)
    assert len(write(watched, LSTAR, new ^ 0x1000)[0]) == 1


@pytest.mark.rule("3.14")
@pytest.mark.parametrize("msr", [0, 0x1FFF, 0xC0000000, 0xC0001FFF], ids=hex)
def test_every_msr_of_both_ranges_can_be_switched(puppet: Puppet, msr: int) -> None:
    puppet.session.control_msr(0, msr, True)
    puppet.session.control_msr(0, msr, False)


@pytest.mark.rule("5.19", "2.23")
def test_a_new_session_watches_no_msr(puppet_guest: LiveGuest, watched: Puppet, hooked: Callable[..., Session]) -> None:
    watched.session.close()
    again = Puppet(hooked(puppet_guest))
    again.session.control_events(0, EventId.MSR, True)
    assert write(again, LSTAR, value_of(again, LSTAR) ^ 0x1000)[0] == []
