# SPDX-License-Identifier: LGPL-2.1-or-later
"""State fidelity, against the guest's own account and against QEMU's: what an event says of a vCPU is what the guest's
instructions read, and what QEMU's monitor prints."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

import pytest

from kvmi_host.introspect import Session
from kvmi_host.protocol import Event, EventId, Registers
from kvmi_host.protocol.msrs import NAMES
from kvmi_host.protocol.x86 import DescriptorTable, Msrs, Segment
from kvmi_host.testing.live import DEADLINE, LiveGuest, await_event
from kvmi_host.testing.puppet import Puppet, page

pytestmark = pytest.mark.hardware


GENERAL = {
    name: 0x0101_0101_0101_0101 * number
    for number, name in enumerate(Registers._fields[:16], 1)
    if name not in {"rsp", "rax", "rdi"}
}
RAX_LOW, RDX_HIGH = (1 << 32) - 1, 32
PRESENT = 1 << 15  # in the second half of a descriptor


def stopped_at_its_hypercall(puppet: Puppet, **registers: int) -> Event:
    """vCPU 0 waits for the reply to its hypercall."""
    puppet.session.control_events(0, EventId.HYPERCALL, True)
    puppet.start(0, puppet.hypercall(), rax=34, rdi=24, **registers)
    return puppet.event()


def table_at(memory: bytes) -> DescriptorTable:
    """What SGDT and SIDT store."""
    return DescriptorTable(int.from_bytes(memory[2:10], "little"), int.from_bytes(memory[:2], "little"))


@pytest.mark.rule("4.71")
def test_the_general_registers_are_those_that_the_guest_has_loaded(puppet: Puppet) -> None:
    event = stopped_at_its_hypercall(puppet, **GENERAL)
    puppet.session.reply(event)
    loaded = GENERAL | {"rax": 34, "rdi": 24}
    assert {name: getattr(event.registers, name) for name in loaded} == loaded
    left = puppet.finish(0).registers
    assert {name: getattr(left, name) for name in loaded} == loaded | {"rax": 0}


@pytest.mark.rule("4.72")
@pytest.mark.parametrize("cr", ["cr0", "cr3", "cr4"])
def test_the_control_registers_are_those_that_the_guest_reads(puppet: Puppet, cr: str) -> None:
    event = stopped_at_its_hypercall(puppet)
    puppet.session.reply(event)
    puppet.finish(0)
    assert puppet.run(0, f"mov_from_{cr}").registers.rax == getattr(event.sregs, cr)


@pytest.mark.rule("4.73")
@pytest.mark.parametrize("msr", Msrs._fields)
def test_the_msrs_are_those_that_the_guest_reads(puppet: Puppet, msr: str) -> None:
    event = stopped_at_its_hypercall(puppet)
    puppet.session.reply(event)
    puppet.finish(0)
    index = NAMES["kernel-gs-base" if msr == "shadow_gs" else msr.replace("_", "-")]
    read = puppet.run(0, "rdmsr", rcx=index).registers
    assert read.rax & RAX_LOW | read.rdx << RDX_HIGH == getattr(event.msrs, msr)


@pytest.mark.rule("4.73")
@pytest.mark.parametrize(
    ("msr", "value"),
    {
        "sysenter_cs": 0x58,
        "sysenter_esp": 0x5100_1000,
        "sysenter_eip": 0x5100_2000,
        "star": 0x0023_0010_0000_3000,
        "lstar": 0xFFFF_8000_0000_4000,
        "cstar": 0xFFFF_8000_0000_5000,
        "shadow_gs": 0xFFFF_8000_0000_6000,
    }.items(),
)
def test_what_the_guest_writes_to_an_msr_is_told(puppet: Puppet, msr: str, value: int) -> None:
    index = NAMES["kernel-gs-base" if msr == "shadow_gs" else msr.replace("_", "-")]
    puppet.run(0, "wrmsr", rcx=index, rax=value & RAX_LOW, rdx=value >> RDX_HIGH)
    event = stopped_at_its_hypercall(puppet)
    puppet.session.reply(event)
    assert getattr(event.msrs, msr) == value


@pytest.mark.rule("4.72")
@pytest.mark.parametrize("table", ["gdt", "idt"])
def test_the_descriptor_tables_are_those_that_the_guest_reads(puppet: Puppet, table: str) -> None:
    event = stopped_at_its_hypercall(puppet)
    puppet.session.reply(event)
    puppet.finish(0)
    puppet.run(0, f"s{table}", rsi=page(0))
    assert table_at(puppet.session.read_physical(page(0), 10)) == getattr(event.sregs, table)


@pytest.mark.rule("4.72")
@pytest.mark.parametrize(("snippet", "register"), [("sldt", "ldt"), ("str", "tr")])
def test_the_system_segments_are_those_that_the_guest_reads(puppet: Puppet, snippet: str, register: str) -> None:
    event = stopped_at_its_hypercall(puppet)
    puppet.session.reply(event)
    puppet.finish(0)
    assert puppet.run(0, snippet).registers.rax & 0xFFFF == getattr(event.sregs, register).selector


# -- QEMU's monitor

REGISTER = re.compile(r"\b(R[A-Z0-9]{2}|R8|R9|RFL|CR\d|EFER) ?=([0-9a-f]+)")
SEGMENT = re.compile(r"^(ES|CS|SS|DS|FS|GS|LDT|TR) *=([0-9a-f]{4}) ([0-9a-f]{16}) ([0-9a-f]{8}) ([0-9a-f]{8})", re.M)
TABLE = re.compile(r"^(GDT|IDT)= +([0-9a-f]{16}) ([0-9a-f]{8})", re.M)
NAMED_OTHERWISE = {"rflags": "RFL"}


def attributes(segment: Segment) -> int:
    """The flags as a descriptor has them: bits 8 to 23 of its second half."""
    _, _, _, kind, present, dpl, db, s, long, g, avl, unusable = segment
    there = present and not unusable
    return that_count(kind << 8 | s << 12 | dpl << 13 | there << 15 | avl << 20 | long << 21 | db << 22 | g << 23)


def that_count(flags: int) -> int:
    """The flags of a segment that is not there count for nothing."""
    return flags & 0x00F0FF00 if flags & PRESENT else 0


def of_event(event: Event) -> dict[str, object]:
    """What an event says, as :func:`of_monitor` has it."""
    registers, sregs = event.registers, event.sregs
    general: dict[str, object] = {
        NAMED_OTHERWISE.get(name, name.upper()): value for name, value in registers._asdict().items()
    }
    control: dict[str, object] = {name: getattr(sregs, name.lower()) for name in ("CR0", "CR2", "CR3", "CR4", "EFER")}
    segments: dict[str, object] = {}
    for name in ("ES", "CS", "SS", "DS", "FS", "GS", "LDT", "TR"):
        segment = getattr(sregs, name.lower())
        segments[name] = (segment.selector, segment.base, segment.limit, attributes(segment))
    tables: dict[str, object] = {name: tuple(getattr(sregs, name.lower())) for name in ("GDT", "IDT")}
    return general | control | segments | tables


def of_monitor(text: str) -> dict[str, object]:
    """What `info registers` prints of a vCPU in 64-bit mode."""
    general: dict[str, object] = {name: int(value, 16) for name, value in REGISTER.findall(text)}
    segments: dict[str, object] = {
        name: (int(selector, 16), int(base, 16), int(limit, 16), that_count(int(flags, 16)))
        for name, selector, base, limit, flags in SEGMENT.findall(text)
    }
    tables: dict[str, object] = {name: (int(base, 16), int(limit, 16)) for name, base, limit in TABLE.findall(text)}
    return general | segments | tables


def info_registers(guest: LiveGuest) -> str:
    """Of vCPU 0."""
    answer = guest.monitor.command("human-monitor-command", command_line="info registers")
    assert isinstance(answer, str)
    return answer


def vcpu_thread(guest: LiveGuest) -> int:
    vcpus = guest.monitor.command("query-cpus-fast")
    assert isinstance(vcpus, list)
    return int(vcpus[0]["thread-id"])


def await_signal(guest: LiveGuest, thread: int) -> None:
    """Wait until QEMU has called its vCPU's thread away from KVM: a signal waits for it."""
    status = Path(f"/proc/{guest.pid}/task/{thread}/status")
    deadline = monotonic() + DEADLINE
    while not re.search(r"^SigPnd:\s+0*[1-9a-f]", status.read_text(), re.MULTILINE):
        assert monotonic() < deadline, "QEMU does not ask for its vCPU"


@pytest.mark.rule("4.71", "4.72")
def test_the_monitor_prints_the_state_of_the_event_that_its_vcpu_waited_at(
    puppet_guest: LiveGuest, puppet: Puppet
) -> None:
    # QEMU asks its vCPU twice, which goes on in between: one that sleeps stays as it is.
    puppet.sleep(0, **GENERAL)
    thread = vcpu_thread(puppet_guest)
    puppet.session.pause_vcpu(0)
    event = puppet.event()
    with ThreadPoolExecutor() as pool:
        printed = pool.submit(info_registers, puppet_guest)
        await_signal(puppet_guest, thread)
        puppet.session.reply(event)
        assert of_monitor(printed.result(DEADLINE)) == of_event(event)
    puppet.wake(0)


@pytest.mark.rule("4.71", "4.72")
def test_a_vm_that_qemu_has_stopped_is_told_as_the_monitor_prints_it(
    puppet_guest: LiveGuest, hooked: Callable[..., Session]
) -> None:
    session = hooked(puppet_guest)
    puppet = Puppet(session)
    puppet.start(0, "spin", **GENERAL)
    puppet.advances(0)
    puppet_guest.monitor.command("stop")
    session.pause_vcpu(0)
    printed = info_registers(puppet_guest)
    puppet_guest.monitor.command("cont")
    event = await_event(session)
    session.reply(event)
    assert of_monitor(printed) == of_event(event)
