# SPDX-License-Identifier: LGPL-2.1-or-later
"""DESCRIPTOR events: the registers of descriptor tables, before they are read or written."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from kvmi_host.protocol import Action, Descriptor, DescriptorAccess, Event, EventId
from kvmi_host.testing.puppet import LDT_SELECTOR, PAGE, Puppet, address, page, tss

pytestmark = pytest.mark.hardware

INSTRUCTION_SIZE = 3
AVAILABLE_TSS = b"\x89"


@dataclass(frozen=True)
class Register:
    """How a register is written, read, and what with. ``in_memory``: its operand is at RSI, else it is AX."""

    load: str
    store: str
    in_memory: bool

    def read(self, puppet: Puppet) -> int:
        """Its value, without events."""
        puppet.session.write_physical(page(0), bytes(16))
        registers = puppet.run(0, self.store, rsi=page(0)).registers
        return int.from_bytes(puppet.session.read_physical(page(0), 10), "little") if self.in_memory else registers.rax

    def operand(self, puppet: Puppet, which: int) -> tuple[dict[str, int], int]:
        """What to load its other value (0), or the one that it has at boot (1) with, and the value."""
        if self.in_memory:
            at = address(("other_" if which == 0 else "") + self.store[1:] + "r")
            return {"rsi": at}, int.from_bytes(puppet.session.read_physical(at, 10), "little")
        if self.load == "lldt":
            selector = (LDT_SELECTOR, 0)[which]
        else:
            selector, access = tss(0, (1, 0)[which])
            puppet.session.write_physical(access, AVAILABLE_TSS)
        return {"rax": selector}, selector


REGISTERS = {
    Descriptor.IDTR: Register("lidt", "sidt", in_memory=True),
    Descriptor.GDTR: Register("lgdt", "sgdt", in_memory=True),
    Descriptor.LDTR: Register("lldt", "sldt", in_memory=False),
    Descriptor.TR: Register("ltr", "str", in_memory=False),
}
each = pytest.mark.parametrize("descriptor", Descriptor, ids=lambda descriptor: descriptor.name.lower())


@pytest.fixture
def watched(puppet: Puppet) -> Puppet:
    """The registers of vCPU 0 are watched, and as at boot."""
    for register in REGISTERS.values():
        puppet.run(0, register.load, **register.operand(puppet, 1)[0])
    puppet.session.control_events(0, EventId.DESCRIPTOR, True)
    return puppet


def off(puppet: Puppet) -> Puppet:
    puppet.session.control_events(0, EventId.DESCRIPTOR, False)
    return puppet


@pytest.mark.rule("4.30", "4.74")
@each
def test_a_write_is_an_event_and_made(watched: Puppet, descriptor: Descriptor) -> None:
    register = REGISTERS[descriptor]
    operand, value = register.operand(watched, 0)
    (event,), result = watched.watch(0, register.load, **operand)
    assert (event.event, event.vcpu, event.rip) == (EventId.DESCRIPTOR, 0, address(register.load))
    assert event.data == DescriptorAccess(descriptor, write=1)
    assert result.exceptions == 0
    assert register.read(off(watched)) == value


@pytest.mark.rule("4.30")
@each
def test_a_read_is_an_event_and_made(watched: Puppet, descriptor: Descriptor) -> None:
    register = REGISTERS[descriptor]
    before = register.read(off(watched))
    watched.session.write_physical(page(0), bytes(PAGE))
    watched.session.control_events(0, EventId.DESCRIPTOR, True)
    (event,), result = watched.watch(0, register.store, rsi=page(0))
    assert (event.event, event.rip) == (EventId.DESCRIPTOR, address(register.store))
    assert event.data == DescriptorAccess(descriptor, write=0)
    stored = int.from_bytes(watched.session.read_physical(page(0), 10), "little")
    assert (stored if register.in_memory else result.registers.rax) == before


@pytest.mark.rule("4.30", "4.75")
@each
def test_a_register_keeps_its_value_until_the_reply(watched: Puppet, descriptor: Descriptor) -> None:
    register = REGISTERS[descriptor]
    fields = {Descriptor.IDTR: "idt", Descriptor.GDTR: "gdt", Descriptor.LDTR: "ldt", Descriptor.TR: "tr"}
    values = []

    def look(event: Event) -> None:
        values.append(getattr(watched.session.get_registers(0).sregs, fields[descriptor]))
        watched.session.reply(event)

    (event,), _ = watched.watch(0, register.load, look, **register.operand(watched, 0)[0])
    assert values == [getattr(event.sregs, fields[descriptor])]
    assert getattr(watched.session.get_registers(0).sregs, fields[descriptor]) != values[0]


@pytest.mark.rule("4.31")
@each
@pytest.mark.parametrize("kind", ["load", "store"])
def test_retry_behind_it_passes_it_over(watched: Puppet, descriptor: Descriptor, kind: str) -> None:
    register = REGISTERS[descriptor]
    before = register.read(off(watched))
    watched.session.control_events(0, EventId.DESCRIPTOR, True)
    operand = register.operand(watched, 0)[0] if kind == "load" else {"rsi": page(1), "rax": 0x77}
    watched.session.write_physical(page(1), bytes(PAGE))

    def skip(event: Event) -> None:
        watched.session.set_registers(0, event.registers._replace(rip=event.rip + INSTRUCTION_SIZE))
        watched.session.reply(event, Action.RETRY)

    events, result = watched.watch(0, getattr(register, kind), skip, **operand)
    assert len(events) == 1
    assert result.exceptions == 0
    assert register.read(off(watched)) == before
    if kind == "store":
        assert result.registers.rax == 0x77
        assert watched.session.read_physical(page(1), PAGE) == bytes(PAGE)


@pytest.mark.rule("4.31")
@each
def test_retry_alone_meets_it_again(watched: Puppet, descriptor: Descriptor) -> None:
    register = REGISTERS[descriptor]
    operand, value = register.operand(watched, 0)
    actions = iter([Action.RETRY, Action.RETRY, Action.CONTINUE])

    def answer(event: Event) -> None:
        watched.session.reply(event, next(actions))

    events, _ = watched.watch(0, register.load, answer, **operand)
    assert [event.rip for event in events] == [address(register.load)] * 3
    assert register.read(off(watched)) == value


@pytest.mark.rule("4.34")
@each
def test_switched_off_there_is_no_event(watched: Puppet, descriptor: Descriptor) -> None:
    register = REGISTERS[descriptor]
    operand, value = register.operand(watched, 0)
    off(watched).run(0, register.load, **operand)
    assert register.read(watched) == value


@pytest.mark.rule("4.11")
@pytest.mark.parametrize("descriptor", [Descriptor.IDTR, Descriptor.GDTR], ids=["idtr", "gdtr"])
def test_loading_what_is_loaded_already_is_no_event(watched: Puppet, descriptor: Descriptor) -> None:
    register = REGISTERS[descriptor]
    operand, _ = register.operand(watched, 0)
    assert len(watched.watch(0, register.load, **operand)[0]) == 1
    watched.run(0, register.load, **operand)


@pytest.mark.rule("4.35")
def test_another_vcpu_is_not_watched(watched: Puppet) -> None:
    watched.run(1, "lidt", rsi=address("other_idtr"))
    watched.run(1, "sidt", rsi=page(0))
    watched.run(1, "lidt", rsi=address("idtr"))


@pytest.mark.rule("4.30")
def test_a_fault_of_the_instruction_is_the_guests_as_ever(watched: Puppet) -> None:
    general_protection, nowhere = 13, 0xFFF8
    events, result = watched.watch(0, "ltr", rax=nowhere)
    assert len(events) <= 1
    assert (result.exceptions, result.vector, result.error_code) == (1, general_protection, nowhere)
    assert result.rip == address("ltr")


@pytest.mark.rule("4.30")
def test_every_round_of_a_loop_is_an_event(watched: Puppet) -> None:
    events, _ = watched.watch(0, "loop_lidt", rsi=address("other_idtr"), rdi=address("idtr"), r15=20)
    assert [event.data for event in events] == [DescriptorAccess(Descriptor.IDTR, 1)] * 20
