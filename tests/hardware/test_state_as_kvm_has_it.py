# SPDX-License-Identifier: LGPL-2.1-or-later
"""State fidelity, against KVM's own account: at one stop, an event, GET_REGISTERS, GET_XSAVE, GET_CPUID and
READ_PHYSICAL say what KVM's ioctls say of the vCPU.

The VMM is this process. It has given every register a value of its own, so that no two can be taken for each other.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import pytest

from kvmi_host.host import kvm
from kvmi_host.introspect import Session
from kvmi_host.protocol import Event, EventId, Registers, VcpuState
from kvmi_host.protocol.msrs import NAMES
from kvmi_host.protocol.x86 import DescriptorTable, Msrs, Segment, SpecialRegisters
from kvmi_host.testing.bare_vm import BareVm
from kvmi_host.testing.live import DEADLINE, await_event

pytestmark = pytest.mark.hardware

CODE, PML4, PDPT, DIRECTORY, OTHER_ROOT = 0x8000, 0x2000, 0x3000, 0x4000, 0x5000
PRESENT_WRITABLE, LARGE = 3, 0x80
HYPERCALL = b"\x0f\x01\xd9" if Path("/sys/module/kvm_amd").exists() else b"\x0f\x01\xc1"  # VMMCALL, VMCALL
MOV_TO_CR3 = b"\x0f\x22\xd8"  # from RAX
MSRS = Msrs(
    sysenter_cs=0x58,
    sysenter_esp=0x5100_1000,  # AMD: 32 bits
    sysenter_eip=0x5100_2000,
    efer=0xD01,  # NXE, LMA, LME, SCE
    star=0x0023_0010_0000_3000,
    lstar=0xFFFF_8000_0000_4000,
    cstar=0xFFFF_8000_0000_5000,
    pat=0x0007_0106_0007_0406,
    shadow_gs=0xFFFF_8000_0000_6000,
)
INDICES = Msrs(*(NAMES[name.replace("_", "-")] for name in Msrs._fields[:-1]), NAMES["kernel-gs-base"])
GENERAL = Registers(*(0x0101_0101_0101_0101 * number for number in range(1, 17)), rip=CODE, rflags=0x402)
LOW = Registers(*(value & 0xFFFF_FFFF for value in GENERAL))
"""For code that is not 64-bit: the CPU need not keep the upper halves while it runs (Intel's manual, 3.4.1.1)."""


def segment(selector: int, base: int, kind: int = 3, **fields: int) -> Segment:
    usual = {"limit": 0xFFFFFFFF, "present": 1, "dpl": 0, "db": 1, "s": 1, "l": 0, "g": 1, "avl": 0, "unusable": 0}
    return Segment(base=base, selector=selector, type=kind, **{**usual, **fields})


PROTECTED = {
    "cs": segment(0x10, 0, 11),
    "ds": segment(0x18, 0x11000),
    "es": segment(0x20, 0x12000),
    "fs": segment(0x28, 0x13000),
    "gs": segment(0x30, 0x14000),
    "ss": segment(0x38, 0x15000),
    "tr": segment(0x40, 0x16000, 11, limit=0x67, db=0, s=0, g=0),
    "ldt": segment(0x48, 0x17000, 2, limit=0xFF, db=0, s=0, g=0),
    "gdt": DescriptorTable(0x18000, 0x7F),
    "idt": DescriptorTable(0x19000, 0x3FF),
    "cr0": 0x31,  # NE, ET, PE
    "cr2": 0xDEAD_B000,
    "cr3": PML4,
    "cr4": 0x600,  # OSXMMEXCPT, OSFXSR
    "cr8": 5,
    "efer": 0,
}
LONG = PROTECTED | {
    "cs": segment(0x10, 0, 11, db=0, l=1),
    "fs": segment(0x28, 0x7F00_1234_5000),
    "gs": segment(0x30, 0xFFFF_8000_1234_6000),
    "cr0": 0x8001_0031,  # PG, WP
    "cr2": 0xFFFF_8000_DEAD_B000,
    "cr4": 0x6A0,  # PGE, PAE
    "efer": MSRS.efer,
}
REAL = PROTECTED | {
    "cs": segment(0, 0, limit=0xFFFF, db=0, g=0),
    **{
        name: segment(0x1100 + number, 0x11000 + 16 * number, limit=0xFFFF, db=0, g=0)
        for number, name in enumerate(("ds", "es", "fs", "gs", "ss"))
    },
    "cr0": 0x10,  # ET
    "idt": DescriptorTable(0, 0x3FF),
}
STATES: dict[str, tuple[dict[str, object], int]] = {
    # with the mode that it is
    "64-bit": (LONG, 8),
    "32-bit code in long mode": (LONG | {"cs": segment(0x10, 0, 11)}, 4),
    "16-bit code in long mode": (LONG | {"cs": segment(0x10, 0, 11, limit=0xFFFF, db=0, g=0)}, 2),
    "32-bit": (PROTECTED, 4),
    "16-bit": (PROTECTED | {"cs": segment(0x10, 0, 11, limit=0xFFFF, db=0, g=0)}, 2),
    "real": (REAL, 2),
}
states = pytest.mark.parametrize(("state", "mode"), STATES.values(), ids=STATES)


class Kept(NamedTuple):
    """What KVM keeps of the vCPU, as the VMM gets it."""

    registers: Registers
    sregs: SpecialRegisters
    msrs: Msrs


def kept(vm: BareVm) -> Kept:
    return Kept(vm.registers, vm.sregs, Msrs(*vm.msrs(INDICES).values()))


@pytest.fixture
def vm() -> Iterator[BareVm]:
    with BareVm() as vm:
        for table, entry in {
            PML4: PDPT | PRESENT_WRITABLE,
            OTHER_ROOT: PDPT | PRESENT_WRITABLE,
            PDPT: DIRECTORY | PRESENT_WRITABLE,
            DIRECTORY: LARGE | PRESENT_WRITABLE,
        }.items():
            vm.memory[table : table + 8] = entry.to_bytes(8, "little")
        yield vm


@pytest.fixture
def session(vm: BareVm) -> Iterator[Session]:
    """A session with it that may do everything."""
    ours, kvms = socket.socketpair()
    with kvms:
        kvm.hook(vm.fd, kvms.fileno(), uuid4(), observe=False)
    kvm.allow_command(vm.fd)
    kvm.allow_event(vm.fd)
    with Session(ours, timeout=DEADLINE) as session:
        yield session


def put(vm: BareVm, state: dict[str, object], code: bytes = b"\xf4", registers: Registers = GENERAL) -> Kept:
    """Give the vCPU this state, with some code to run."""
    vm.memory[CODE : CODE + len(code)] = code
    vm.sregs = vm.sregs._replace(**state)
    vm.registers = registers
    vm.set_msrs({index: value for index, value in zip(INDICES, MSRS, strict=True) if index != INDICES.efer})
    return kept(vm)


def told(event: Event) -> Kept:
    return Kept(event.registers, event.sregs, event.msrs)


def asked(answer: VcpuState) -> Kept:
    return Kept(answer.registers, answer.sregs, Msrs(*(answer.msrs[index] for index in INDICES)))


def stopped_at(session: Session, kind: EventId) -> Event:
    """The first event of this kind of a vCPU that was told to pause before it ran. It waits for the reply."""
    paused = await_event(session)
    session.control_events(0, kind, True)
    session.control_cr(0, 3, True)
    session.reply(paused)
    event = await_event(session)
    assert event.event == kind
    return event


@pytest.mark.rule("4.71", "4.72")
@states
def test_what_the_vmm_has_set_is_there_to_be_told(vm: BareVm, state: dict[str, object], mode: int) -> None:
    before = put(vm, state)
    assert before.registers == GENERAL
    assert before.msrs == MSRS._replace(efer=state["efer"])
    for name in ("gdt", "idt", "cr0", "cr2", "cr3", "cr4", "cr8", "efer"):
        assert getattr(before.sregs, name) == state[name], name
    for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"):
        got, given = getattr(before.sregs, name), state[name]
        assert (got.selector, got.base, got.limit, got.l) == (given.selector, given.base, given.limit, given.l), name


@pytest.mark.rule("4.70", "4.71", "4.72", "4.73", "3.16")
@states
def test_an_event_and_get_registers_tell_what_kvm_keeps(
    vm: BareVm, session: Session, state: dict[str, object], mode: int
) -> None:
    before = put(vm, state)
    session.pause_vcpu(0)
    with vm.running():
        event = await_event(session)
        answer = session.get_registers(0, INDICES)
        vm.kick()
        session.reply(event)
    assert (event.mode, answer.mode) == (mode, mode)
    assert told(event) == before
    assert asked(answer) == before
    assert kept(vm) == before


@pytest.mark.rule("4.70", "4.71", "4.72", "4.73", "4.74")
@states
def test_a_hypercalls_event_tells_the_state_before_it(
    vm: BareVm, session: Session, state: dict[str, object], mode: int
) -> None:
    operation = "rdi" if mode == 8 else "rbx"
    registers = (GENERAL if mode == 8 else LOW)._replace(rax=34, **{operation: 24})
    before = put(vm, state, HYPERCALL, registers)
    session.pause_vcpu(0)
    with vm.running():
        event = stopped_at(session, EventId.HYPERCALL)
        answer = session.get_registers(0, INDICES)
        vm.kick()
        session.reply(event)
    assert told(event) == asked(answer) == before
    assert kept(vm) == before._replace(registers=registers._replace(rax=0, rip=CODE + len(HYPERCALL)))


@pytest.mark.rule("4.5", "4.72", "4.74", "4.75")
@pytest.mark.parametrize("chosen", [None, PML4 + 0x1000], ids=["the guest's value", "the introspector's value"])
def test_an_event_of_a_write_to_cr3_tells_the_state_before(vm: BareVm, session: Session, chosen: int | None) -> None:
    registers = GENERAL._replace(rax=OTHER_ROOT)
    before = put(vm, LONG, MOV_TO_CR3, registers)
    session.pause_vcpu(0)
    with vm.running():
        event = stopped_at(session, EventId.CR)
        vm.kick()
        session.reply(event, new_val=chosen)
    assert told(event) == before
    after = before._replace(
        registers=registers._replace(rip=CODE + len(MOV_TO_CR3)),
        sregs=before.sregs._replace(cr3=chosen or OTHER_ROOT),
    )
    assert kept(vm) == after


@pytest.mark.rule("3.18")
def test_set_registers_gives_kvm_every_register(vm: BareVm, session: Session) -> None:
    before = put(vm, LONG)
    other = Registers(*(~value & (1 << 64) - 1 for value in GENERAL[:16]), rip=CODE + 0x100, rflags=0x87)
    session.pause_vcpu(0)
    with vm.running():
        event = await_event(session)
        session.set_registers(0, other)
        vm.kick()
        session.reply(event)
    assert kept(vm) == before._replace(registers=other)


@pytest.mark.rule("3.23")
def test_get_xsave_is_what_kvm_keeps(vm: BareVm, session: Session) -> None:
    put(vm, LONG)
    session.pause_vcpu(0)
    with vm.running():
        event = await_event(session)
        answer = session.xsave(0)
        vm.kick()
        session.reply(event)
    assert answer == vm.xsave
    assert any(answer)


@pytest.mark.rule("3.21")
def test_get_cpuid_is_what_the_vmm_has_set(vm: BareVm, session: Session) -> None:
    put(vm, LONG)
    functions = vm.cpuid
    session.pause_vcpu(0)
    with vm.running():
        event = await_event(session)
        answers = {key: session.cpuid(0, *key) for key in functions}
        vm.kick()
        session.reply(event)
    assert answers == vm.cpuid


@pytest.mark.rule("3.24", "3.27")
def test_physical_memory_is_the_vmms(vm: BareVm, session: Session) -> None:
    pattern = bytes(range(256)) * 16
    vm.memory[0x20000:0x21000] = pattern
    assert session.read_physical(0x20000, 4096) == pattern
    session.write_physical(0x21000, pattern[::-1])
    assert vm.memory[0x21000:0x22000] == pattern[::-1]
