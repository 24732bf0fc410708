# SPDX-License-Identifier: LGPL-2.1-or-later
"""The library as a program uses it: a VM's vCPUs, memory and events."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections import Counter
from contextlib import closing
from itertools import islice

import pytest

from kvmi_host.introspect import CR3, Breakpoint, Msr, PageWatch, Vm
from kvmi_host.introspect.async_session import AsyncSession
from kvmi_host.introspect.async_vm import AsyncVm
from kvmi_host.protocol import Access, EventId
from kvmi_host.testing.live import DEADLINE, LiveGuest, hook, hook_socket
from kvmi_host.testing.puppet import Puppet, address, alias, page

pytestmark = pytest.mark.hardware

BP = 3
LSTAR = 0xC0000082
NOP_AND_RET = b"\x90\xc3"


@pytest.fixture
def vm(puppet: Puppet) -> Vm:
    """The puppet guest."""
    return Vm(puppet.session)


def test_paused_vcpus_stand_still_and_go_on_afterwards(vm: Vm, puppet: Puppet) -> None:
    for vcpu in (0, 1):
        puppet.start(vcpu, "spin")
        puppet.advances(vcpu)
    with vm.paused():
        before = [puppet.progress(vcpu) for vcpu in (0, 1)]
        states = [vcpu.state() for vcpu in vm.vcpus]
        assert [vcpu.state() for vcpu in vm.vcpus] == states
        assert [puppet.progress(vcpu) for vcpu in (0, 1)] == before
        for state in states:
            assert state.mode == 8
            assert address("spin") <= state.registers.rip < address("spin") + 64
    for vcpu in (0, 1):
        puppet.advances(vcpu)


def test_a_paused_vcpu_steps_from_instruction_to_instruction(vm: Vm, puppet: Puppet) -> None:
    puppet.start(0, "spin")
    puppet.advances(0)
    with vm.paused():
        stepped = [vm.vcpus[0].step() for _ in range(20)]
        assert {event.event for event in stepped} == {EventId.SINGLESTEP}
        assert vm.vcpus[0].registers == stepped[-1].registers
    rounds = [event.rip for event in stepped].count(address("spin"))
    assert rounds >= 2  # four instructions a round, and an interrupt's handler at most
    puppet.advances(0)


def test_linear_addresses_lead_through_the_page_tables(vm: Vm) -> None:
    gva, gpa = alias(3)
    assert vm.vcpus[0].translate(gva + 5)[:2] == (gpa + 5, 4096)
    _, next_gpa = alias(4)
    vm.vcpus[0].memory.write(gva + 4090, b"from page to page")
    assert vm.memory[gpa + 4090 : gpa + 4096] + vm.memory[next_gpa : next_gpa + 11] == b"from page to page"
    assert vm.process_memory(address("other_root"))[gva + 4090 : gva + 4107] == b"from page to page"


def test_writes_of_cr3_and_an_msr_are_seen_and_no_others(vm: Vm, puppet: Puppet) -> None:
    root, other = address("root"), address("other_root")
    seen: Counter[tuple[int, int, int]] = Counter()
    with closing(vm.events(CR3, Msr("lstar"), duration=DEADLINE)) as events:
        puppet.start(0, "loop_mov_to_cr3", rax=other, rbx=root, r15=4)
        puppet.start(1, "loop_wrmsr", rax=0x1000, rbx=0x2000, rcx=LSTAR, r15=4)
        for event in events:
            seen[event.vcpu, event.event, event.data.new] += 1
            if seen.total() == 8:
                break
    assert seen == {
        (0, EventId.CR, other): 2,
        (0, EventId.CR, root): 2,
        (1, EventId.MSR, 0x1000): 2,
        (1, EventId.MSR, 0x2000): 2,
    }
    puppet.settle(2)


def test_a_reply_can_change_what_is_written(vm: Vm, puppet: Puppet) -> None:
    with closing(vm.events(Msr("lstar"), duration=DEADLINE)) as events:
        puppet.start(0, "wrmsr", rax=0x1000, rcx=LSTAR)
        next(events).reply(new_val=0x3000)
    puppet.finish(0)
    assert vm.vcpus[0].msr("lstar") == 0x3000


def test_no_vcpu_passes_a_breakpoint_unseen(vm: Vm, puppet: Puppet) -> None:
    rounds = 20
    there = address("loop_nop")
    original = vm.memory[there : there + 16]
    seen: Counter[int] = Counter()
    with closing(vm.events(Breakpoint(there), duration=DEADLINE)) as events:
        puppet.start(0, "loop_nop", r15=rounds)
        puppet.start(1, "loop_nop", r15=rounds)
        for event in events:
            assert event.rip == there
            seen[event.vcpu] += 1
            if seen.total() == 2 * rounds:
                break
    assert seen == {0: rounds, 1: rounds}
    assert vm.memory[there : there + 16] == original
    for vcpu in (0, 1):
        assert puppet.finish(vcpu).exceptions == 0


def test_an_interrupt_that_comes_before_the_instruction_makes_no_second_hit(vm: Vm, puppet: Puppet) -> None:
    rounds = 150
    hits = 0
    with closing(
        vm.events(Breakpoint(address("loop_nop")), Breakpoint(address("finish")), duration=DEADLINE)
    ) as events:
        puppet.start(0, "loop_nop", r15=rounds)
        for event in events:
            if event.rip == address("finish"):
                break
            hits += 1
    assert hits == rounds
    assert puppet.finish(0).exceptions == 0


def test_a_breakpoint_is_at_a_physical_address_by_whatever_name(vm: Vm, puppet: Puppet) -> None:
    gva, gpa = alias(2)
    vm.memory[gpa : gpa + 2] = NOP_AND_RET
    with closing(vm.events(Breakpoint(gpa, physical=True), duration=DEADLINE)) as events:
        puppet.start(0, gva)
        event = next(events)
        assert (event.rip, event.data.gpa) == (gva, gpa)
    assert puppet.finish(0).exceptions == 0


def test_the_guests_own_breakpoints_stay_its_own(vm: Vm, puppet: Puppet) -> None:
    with closing(vm.events(Breakpoint(address("finish")), duration=DEADLINE)) as events:
        puppet.start(0, "int3")
        assert next(events).rip == address("finish")
    result = puppet.finish(0)
    assert (result.exceptions, result.vector) == (1, BP)


def test_a_breakpoint_and_the_write_that_its_instruction_makes_are_both_seen(vm: Vm, puppet: Puppet) -> None:
    root, other = address("root"), address("other_root")
    there = address("loop_mov_to_cr3")
    with closing(vm.events(CR3, Breakpoint(there), duration=DEADLINE)) as events:
        puppet.start(0, "loop_mov_to_cr3", rax=other, rbx=root, r15=2)
        seen = [(event.event, event.rip) for event in islice(events, 4)]
    assert seen == [(EventId.BREAKPOINT, there), (EventId.CR, there)] * 2
    assert puppet.finish(0).exceptions == 0


def test_writes_to_a_page_are_seen_and_made(vm: Vm, puppet: Puppet) -> None:
    vm.memory[page(1) : page(1) + 16] = bytes(16)
    with closing(vm.events(PageWatch(page(1), Access.W), duration=DEADLINE)) as events:
        puppet.start(0, "write64", rsi=page(1) + 8, rax=0x1234)
        event = next(events)
        assert (event.data.gpa, event.data.access) == (page(1) + 8, Access.W)
        assert vm.memory[page(1) + 8 : page(1) + 10] == bytes(2)
    puppet.finish(0)
    assert vm.memory[page(1) + 8 : page(1) + 10] == b"\x34\x12"
    assert vm.session.page_access(page(1)) == (Access.ALL,)


def test_reads_of_a_page_are_seen_and_its_writes_pass(vm: Vm, puppet: Puppet) -> None:
    with closing(vm.events(PageWatch(page(2), Access.R), Breakpoint(address("finish")), duration=DEADLINE)) as events:
        puppet.start(0, "write64", rsi=page(2), rax=7)
        assert next(events).rip == address("finish")
        puppet.start(1, "read64", rsi=page(2))
        event = next(events)
        assert (event.vcpu, event.data.access) == (1, Access.R)
    assert puppet.finish(0).exceptions == puppet.finish(1).exceptions == 0
    assert vm.memory[page(2) : page(2) + 1] == b"\x07"


INTROSPECTOR = """
import signal
import sys
import kvmi_host
from kvmi_host import Access, Breakpoint, CR3, PageWatch

name, at, page = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell has started us in the background
with kvmi_host.attach(name, allow="full") as vm:
    events = vm.events(CR3, Breakpoint(at), PageWatch(page, Access.W))
    print(vm.memory[at : at + 1].hex(), vm.session.page_access(page), flush=True)
    for event in events:
        print(event)
"""


def test_ctrl_c_undoes_what_a_program_did(puppet_guest: LiveGuest) -> None:
    there = address("loop_nop")
    with hook(puppet_guest) as session:
        original = session.read_physical(there, 16)
    command = [sys.executable, "-c", INTROSPECTOR, puppet_guest.name, str(there), str(page(3))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == f"cc ({Access.R | Access.X!r},)\n"
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=DEADLINE)
    assert errors.endswith("KeyboardInterrupt\n")
    with hook(puppet_guest) as session:
        assert session.read_physical(there, 16) == original
        assert session.page_access(page(3)) == (Access.ALL,)
        assert Puppet(session).run(0, "loop_nop", r15=3).exceptions == 0


WATCHER = """
import sys
import kvmi_host

with kvmi_host.attach(sys.argv[1], timeout=float(sys.argv[2])) as vm:
    for event in vm.events(kvmi_host.CR3):
        print(event, flush=True)
"""


def test_the_guest_outlives_a_program_that_is_killed_in_the_middle_of_events(guest: LiveGuest) -> None:
    command = [sys.executable, "-c", WATCHER, guest.name, str(DEADLINE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        for _ in range(50):
            assert " cr " in program.stdout.readline()
        program.kill()
    guest.goes_on()


def test_the_asyncio_twin_does_the_same(puppet_guest: LiveGuest) -> None:
    there = address("loop_nop")
    with hook(puppet_guest) as session:
        Puppet(session).start(1, "loop_nop", r15=1 << 40)
        original = session.read_physical(there, 16)

    async def work() -> Counter[int]:
        hits: Counter[int] = Counter()
        async with AsyncVm(await AsyncSession.open(hook_socket(puppet_guest), timeout=DEADLINE)) as vm:
            async with vm.paused():
                assert [(await vcpu.state()).mode for vcpu in await vm.vcpus] == [8, 8]
            assert await vm.memory[there : there + 16] == original
            async for event in vm.events(Breakpoint(there), duration=DEADLINE):
                assert (await vm.memory[there : there + 1]) == b"\xcc"
                hits[event.vcpu] += 1
                if hits.total() == 5:
                    break
        return hits

    assert asyncio.run(work()) == {1: 5}
    with hook(puppet_guest) as session:
        assert session.read_physical(there, 16) == original
        Puppet(session).stop(1)
        assert Puppet(session).finish(1).exceptions == 0
