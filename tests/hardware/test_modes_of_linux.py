# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mode of a real Linux's vCPUs: from the first instruction of the firmware through the kernel's 16-bit, 32-bit and
64-bit code to a program that is 32-bit code and 64-bit code in turn."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import pytest

from kvmi_host.introspect import Session
from kvmi_host.protocol import Event, EventId
from kvmi_host.protocol.x86 import SpecialRegisters
from kvmi_host.provision import find_image
from kvmi_host.testing.live import DEADLINE, LiveGuest, SharedGuests, hook

pytestmark = pytest.mark.hardware

VCPUS = 2
CALLS = 12
"""Hypercalls of its program that are looked at."""
EFER = 0xC0000080
EFER_LME, EFER_LMA = 1 << 8, 1 << 10
CR0_PE, CR0_PG = 1, 1 << 31
CR4_PAE = 1 << 5
KERNEL_HALF = 0xFFFF_8000_0000_0000

MODES = {
    # EFER.LMA, CR0.PE, CS.L, CS.D/B: the operand size in bytes
    (1, 1, 1, 0): 8,
    (1, 1, 0, 0): 2,
    (1, 1, 0, 1): 4,
    (0, 1, 0, 0): 2,
    (0, 1, 0, 1): 4,
    (0, 0, 0, 0): 2,
    (0, 0, 0, 1): 4,
}


def row(sregs: SpecialRegisters) -> tuple[int, int, int, int]:
    return int(bool(sregs.efer & EFER_LMA)), sregs.cr0 & CR0_PE, sregs.cs.l, sregs.cs.db


class Seen(NamedTuple):
    """What is kept of an event.

    :ivar answered: the mode that GET_REGISTERS answered at the same stop.
    :ivar what: the register that is written, ``cr0``, ``cr4`` or ``efer``, and its new value; else the event's name.
    """

    vcpu: int
    mode: int
    answered: int
    row: tuple[int, int, int, int]
    rip: int
    cpl: int
    what: str
    new: int

    @classmethod
    def of(cls, event: Event, answered: int) -> Seen:
        what, new = EventId(event.event).name.lower(), 0
        if event.event == EventId.CR:
            what, new = f"cr{event.data.cr}", event.data.new
        elif event.event == EventId.MSR:
            what, new = "efer", event.data.new
        return cls(event.vcpu, event.mode, answered, row(event.sregs), event.rip, event.sregs.ss.dpl, what, new)


@dataclass
class Boot:
    """A Linux that boots, and whose program runs.

    :ivar events: those from its vCPUs' first instructions up to the program's first hypercall.
    :ivar calls: the hypercalls of the program, from then on.
    """

    events: list[Seen] = field(default_factory=list)
    calls: list[Seen] = field(default_factory=list)

    def of(self, vcpu: int) -> list[Seen]:
        return [seen for seen in self.events if seen.vcpu == vcpu]


def watch(session: Session, vcpu: int) -> None:
    for cr in (0, 4):
        session.control_cr(vcpu, cr, True)
    session.control_msr(vcpu, EFER, True)
    for kind in (EventId.CR, EventId.MSR, EventId.HYPERCALL):
        session.control_events(vcpu, kind, True)


def follow(session: Session) -> Boot:
    """Follow a guest that has not begun to run."""
    boot = Boot()
    while len(boot.calls) < CALLS:
        event = session.next_event(4 * DEADLINE)
        assert event is not None, f"no event came after {boot.events[-5:]}, {boot.calls}"
        seen = Seen.of(event, session.get_registers(event.vcpu).mode)
        if event.event == EventId.CREATE_VCPU:
            watch(session, event.vcpu)
        (boot.calls if event.event == EventId.HYPERCALL else boot.events).append(seen)
        session.reply(event)
    return boot


@pytest.fixture(scope="module")
def boot(shared: SharedGuests) -> Boot:
    shared.stand_aside()
    image = find_image("linux")
    cmdline = f"{image.cmdline} rdinit=/bin/modes"
    options = ["-S", "-initrd", str(image.initrd), "-append", cmdline]
    with LiveGuest(VCPUS, "linux", memory="128", options=options) as guest:
        guest.monitor.command("query-status")  # which it answers when it has made its VM
        with hook(guest) as session:
            session.control_vm_events(EventId.CREATE_VCPU, True)
            guest.monitor.command("cont")
            return follow(session)


def phases(events: list[Seen]) -> list[int]:
    """The modes, one after the other."""
    return [mode for mode, _ in groupby(seen.mode for seen in events)]


@pytest.mark.rule("4.59", "4.62", "4.63", "4.64", "4.68")
def test_every_event_of_the_boot_tells_the_mode_of_its_row(boot: Boot) -> None:
    assert {seen.row: seen.mode for seen in boot.events} == {seen.row: MODES[seen.row] for seen in boot.events}
    assert {(0, 0, 0, 0), (0, 1, 0, 1), (1, 1, 1, 0)} <= {seen.row for seen in boot.events}


@pytest.mark.rule("4.67")
def test_get_registers_tells_the_same_mode_at_each_of_them(boot: Boot) -> None:
    assert [seen for seen in boot.events + boot.calls if seen.answered != seen.mode] == []


@pytest.mark.rule("4.68", "4.76")
@pytest.mark.parametrize("vcpu", range(VCPUS))
def test_a_vcpu_begins_in_real_mode(boot: Boot, vcpu: int) -> None:
    first = boot.of(vcpu)[0]
    assert (first.what, first.mode, first.row) == ("create_vcpu", 2, (0, 0, 0, 0))


@pytest.mark.rule("4.68")
@pytest.mark.parametrize("vcpu", range(VCPUS))
def test_a_vcpu_goes_from_16_through_32_to_64_bits_and_stays_there(boot: Boot, vcpu: int) -> None:
    modes = phases(boot.of(vcpu))
    assert modes[-3:] == [2, 4, 8]
    assert 8 not in modes[:-1]


@pytest.mark.rule("4.62", "4.63", "4.64", "4.68", "4.75")
@pytest.mark.parametrize("vcpu", range(VCPUS))
def test_a_write_that_changes_the_mode_is_told_in_the_mode_before(boot: Boot, vcpu: int) -> None:
    events = boot.of(vcpu)
    # Linux' own way to protected mode is the last one. For page tables of five levels it goes to long mode once more.
    (*_, to_protected) = [
        seen for seen in events if seen.what == "cr0" and seen.new & CR0_PE and seen.row == (0, 0, 0, 0)
    ]
    to_long = [seen for seen in events if seen.what == "cr0" and seen.new & CR0_PG and not seen.row[0]]
    assert to_protected.mode == 2
    assert {(seen.mode, seen.row) for seen in to_long} == {(4, (0, 1, 0, 1))}
    before = events[events.index(to_protected) : events.index(to_long[0])]
    assert any(seen.what == "efer" and seen.new & EFER_LME and seen.mode == 4 for seen in before)
    assert any(seen.what == "cr4" and seen.new & CR4_PAE for seen in before)
    after = events[events.index(to_long[-1]) + 1 :]
    assert {seen.mode for seen in after} == {8}
    assert any(seen.rip >= KERNEL_HALF for seen in after)


@pytest.mark.rule("4.59", "4.61", "4.69")
def test_a_program_is_in_the_mode_of_its_own_code(boot: Boot) -> None:
    assert {seen.cpl for seen in boot.calls} == {3}
    assert [seen.row for seen in boot.calls] == [(1, 1, 0, 1), (1, 1, 1, 0)] * (CALLS // 2)
    assert [seen.mode for seen in boot.calls] == [4, 8] * (CALLS // 2)
