# SPDX-License-Identifier: LGPL-2.1-or-later
"""A VM as an introspector sees it, with the kernel simulated: what is switched on and off, and who is answered what."""

from __future__ import annotations

import logging
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from kvmi_host.introspect import (
    BREAKPOINTS,
    CR3,
    CR4,
    HYPERCALL,
    PAUSE,
    Breakpoint,
    Msr,
    NotMapped,
    PageWatch,
    SessionClosed,
    SessionTimeout,
    Vm,
)
from kvmi_host.introspect.handlers import Handlers
from kvmi_host.introspect.holding import Hold
from kvmi_host.introspect.plans import run
from kvmi_host.introspect.watch import RETRY_EVERY, Watch
from kvmi_host.protocol import Access, Action, Command, CommandError, EventId, messages
from kvmi_host.testing.peer import SimulatedKernel, next_reply

INT3, NOP = b"\xcc", b"\x90"
LSTAR = 0xC0000082

MakeVm = Callable[..., tuple[SimulatedKernel, Vm]]


@pytest.fixture
def make_vm(pair) -> MakeVm:
    """Makes a simulated kernel with the given settings, and its VM."""

    def make(vcpus: int = 1, **settings: object) -> tuple[SimulatedKernel, Vm]:
        kernel, session = pair(vcpus, **settings)
        return kernel, Vm(session)

    return make


def cr3_write(new: int = 0x2000) -> bytes:
    return struct.pack("<H6xQQ", 3, 0x1000, new)


def hit(gpa: int) -> bytes:
    """A breakpoint's own data."""
    return struct.pack("<QB7x", gpa, 1)


def fault(gpa: int, access: Access) -> bytes:
    """A page fault's own data."""
    return struct.pack("<QQBxHI", gpa, gpa, access, 0, 0)


def step_when_told(kernel: SimulatedKernel, vcpu: int) -> bool:
    """The guest executes an instruction once it may; whether that makes a step."""
    kernel.await_running(vcpu)
    stepped = kernel.enabled(EventId.SINGLESTEP, vcpu)
    if stepped:
        kernel.fire(EventId.SINGLESTEP, vcpu)
    return stepped


# -- memory and vCPUs


def test_memory_is_read_and_written_across_pages(make_vm):
    kernel, vm = make_vm(pages=3)
    data = bytes(range(256)) * 20
    vm.memory[0x800 : 0x800 + len(data)] = data
    assert kernel.memory[0x800 : 0x800 + len(data)] == data
    assert vm.memory[0x800 : 0x800 + len(data)] == data
    assert vm.memory[0x1000:0x1000] == b""


@pytest.mark.parametrize("part", [slice(None, 4), slice(4, None), slice(0, 8, 2), slice(8, 4)])
def test_a_slice_of_memory_is_a_range_of_addresses(make_vm, part):
    _, vm = make_vm()
    with pytest.raises(ValueError, match="memory is sliced as in"):
        vm.memory[part]


def test_memory_does_not_grow(make_vm):
    _, vm = make_vm()
    with pytest.raises(ValueError, match="3 bytes for a range of 2"):
        vm.memory[0:2] = b"abc"


def test_without_paging_linear_addresses_are_physical_ones(make_vm):
    kernel, vm = make_vm()
    kernel.memory[0x1234:0x1238] = b"abcd"
    assert vm.vcpus[0].memory[0x1234:0x1238] == b"abcd"
    assert vm.vcpus[0].translate(0x1234).gpa == 0x1234


def test_there_are_as_many_vcpus_as_the_vm_has(make_vm):
    _, vm = make_vm(3)
    assert [vcpu.index for vcpu in vm.vcpus] == [0, 1, 2]


def test_an_msr_is_read_by_its_name(make_vm):
    _, vm = make_vm()
    assert vm.vcpus[0].msr("lstar") == vm.vcpus[0].msr(LSTAR) == LSTAR + 1


# -- pausing


def test_vcpus_are_paused_within_the_block_and_no_longer(make_vm):
    kernel, vm = make_vm(2)
    with vm.paused():
        assert kernel.waiting_for(0) is not None
        assert kernel.waiting_for(1) is not None
    vm.session.get_version()  # the replies are read before this
    assert kernel.waiting_for(0) is None
    assert kernel.waiting_for(1) is None


def test_blocks_of_pauses_can_be_within_each_other(make_vm):
    kernel, vm = make_vm()
    with vm.paused():
        with vm.paused():
            pass
        vm.session.get_version()
        assert kernel.waiting_for(0) is not None


def test_a_vcpu_that_is_not_started_need_not_be_paused(make_vm):
    kernel, vm = make_vm(2, not_started=[1])
    with vm.paused():
        assert kernel.waiting_for(0) is not None
        assert kernel.waiting_for(1) is None


def test_a_vcpu_that_does_not_pause_is_an_error_and_the_others_go_on(make_vm):
    kernel, vm = make_vm(2, timeout=0.1)
    kernel.fire(EventId.HYPERCALL, vcpu=1)
    assert vm.session.next_event(5).vcpu == 1  # taken behind the VM's back, and not answered
    with pytest.raises(SessionTimeout, match=r"vCPUs \[1\] were asked to pause"), vm.paused():
        pass
    vm.session.get_version()
    assert kernel.waiting_for(0) is None


def test_an_event_that_comes_instead_of_the_pause_is_not_lost(make_vm):
    kernel, vm = make_vm()
    replies = kernel.fire(EventId.HYPERCALL)
    with vm.paused():
        pass
    vm.session.get_version()
    assert kernel.waiting_for(0) is not None
    with closing(vm.events(HYPERCALL)) as events:
        assert next(events).event == EventId.HYPERCALL
    assert next_reply(replies).action == Action.CONTINUE


def test_the_pause_that_comes_after_such_an_event_is_nobodys_business(make_vm):
    kernel, vm = make_vm()
    kernel.fire(EventId.HYPERCALL)
    with vm.paused():
        pass
    kinds = []
    for event in vm.events(HYPERCALL, PAUSE, duration=0.2):
        kinds.append(event.event)
        vm.session.get_version()
    assert kinds == [EventId.HYPERCALL, EventId.PAUSE_VCPU]  # its own one, for the interest
    assert kernel.waiting_for(0) is None


def test_pausing_while_an_event_is_handled_leaves_its_vcpu_alone(make_vm):
    kernel, vm = make_vm(2)
    replies = kernel.fire(EventId.HYPERCALL)
    for _ in vm.events(HYPERCALL):
        with vm.paused():
            assert kernel.waiting_for(1) is not None
        break
    assert next_reply(replies).action == Action.CONTINUE


def test_a_step_is_made_by_a_paused_vcpu_alone(make_vm):
    kernel, vm = make_vm(2)
    with vm.paused():
        vcpu = vm.vcpus[0]
        threading.Thread(target=step_when_told, args=(kernel, 0)).start()
        assert vcpu.step().event == EventId.SINGLESTEP
        assert kernel.waiting_for(0) is not None
        assert kernel.waiting_for(1) is not None
        assert not kernel.enabled(EventId.SINGLESTEP)


def test_only_a_paused_vcpu_makes_steps(make_vm):
    _, vm = make_vm()
    with pytest.raises(ValueError, match="vCPU 0 is not paused"):
        vm.vcpus[0].step()


# -- events


def test_what_is_watched_is_switched_on_for_every_vcpu_and_off_again(make_vm):
    kernel, vm = make_vm(2)
    kernel.fire(EventId.CR, own=cr3_write())
    for event in vm.events(CR3, CR4, Msr("lstar")):
        assert event.data.new == 0x2000
        assert [kernel.watched_registers(vcpu) for vcpu in (0, 1)] == [{3, 4}] * 2
        assert [kernel.watched_msrs(vcpu) for vcpu in (0, 1)] == [{LSTAR}] * 2
        assert kernel.enabled(EventId.CR, 1)
        break
    assert [kernel.watched_registers(vcpu) for vcpu in (0, 1)] == [frozenset()] * 2
    assert [kernel.watched_msrs(vcpu) for vcpu in (0, 1)] == [frozenset()] * 2
    assert not kernel.enabled(EventId.CR, 1)


def test_an_event_is_answered_continue_when_the_loop_comes_back(make_vm):
    kernel, vm = make_vm()
    replies = kernel.fire(EventId.CR, own=cr3_write())
    events = vm.events(CR3, duration=0.2)
    next(events)
    assert kernel.waiting_for(0) is not None
    assert list(events) == []
    assert next_reply(replies).own == struct.pack("<Q", 0x2000)


def test_an_event_is_answered_as_it_was_told(make_vm):
    kernel, vm = make_vm()
    replies = kernel.fire(EventId.CR, own=cr3_write())
    for event in vm.events(CR3):
        event.reply(new_val=0x1000)
        break
    assert next_reply(replies).own == struct.pack("<Q", 0x1000)


def test_registers_are_set_in_the_same_write_as_the_answer(make_vm):
    kernel, vm = make_vm()
    replies = kernel.fire(EventId.HYPERCALL)
    for event in vm.events(HYPERCALL):
        kernel.carried_out.clear()
        event.reply(registers=event.registers._replace(rip=0x1000))
        break
    assert next_reply(replies).action == Action.CONTINUE
    switch = Command.CONTROL_CMD_RESPONSE
    end = kernel.carried_out[-3:]
    assert end == [switch, Command.SET_REGISTERS, switch]


def test_a_batch_is_not_answered(make_vm):
    kernel, vm = make_vm()
    kernel.carried_out.clear()
    vm.batch(messages.write_physical(0, b"a"), messages.write_physical(1, b"b"))
    switch, write = Command.CONTROL_CMD_RESPONSE, Command.WRITE_PHYSICAL
    assert kernel.carried_out == [switch, write, write, switch]
    assert kernel.memory[:2] == b"ab"


def test_what_a_batch_may_not_do_is_told_all_the_same(make_vm):
    _, vm = make_vm(observe=True)
    with pytest.raises(CommandError, match="write-physical: -EPERM"):
        vm.batch(messages.write_physical(0, b"a"))
    assert vm.session.guest_info() == 1


def test_the_loop_ends_when_the_host_wants_the_session_back(make_vm):
    kernel, vm = make_vm()
    kernel.fire(EventId.UNHOOK)
    assert list(vm.events(CR3)) == []
    assert not kernel.enabled(EventId.UNHOOK)


def test_the_loop_over_a_vm_that_ends_ends_with_an_error(make_vm):
    kernel, vm = make_vm()
    kernel.fire(EventId.HYPERCALL)
    events = vm.events(HYPERCALL)
    next(events)
    kernel.end("the VM died")
    with pytest.raises(SessionClosed):
        next(events)


def test_a_vcpu_that_starts_later_is_watched_from_then_on(make_vm):
    kernel, vm = make_vm(2, not_started=[1])
    watch = Watch(Hold(), [HYPERCALL])
    run(vm.session, watch.begin())
    assert not kernel.enabled(EventId.HYPERCALL, 1)
    kernel.start_vcpu(1)
    assert run(vm.session, watch.next(2 * RETRY_EVERY)) is None
    assert kernel.enabled(EventId.HYPERCALL, 1)
    run(vm.session, watch.end())
    assert not kernel.enabled(EventId.HYPERCALL, 1)


def test_a_vcpu_that_is_created_is_watched_before_it_runs(make_vm):
    kernel, vm = make_vm(2, not_started=[1])
    watch = Watch(Hold(), [HYPERCALL])
    run(vm.session, watch.begin())
    kernel.start_vcpu(1)
    replies = kernel.fire(EventId.CREATE_VCPU, vcpu=1)
    assert run(vm.session, watch.next(0)) is None
    assert next_reply(replies).action == Action.CONTINUE
    assert kernel.enabled(EventId.HYPERCALL, 1)


def test_what_may_not_be_watched_is_an_error_and_nothing_is_left_on(make_vm):
    kernel, vm = make_vm(2, events=[EventId.HYPERCALL])
    with pytest.raises(CommandError, match="control-events: -EPERM"):
        vm.events(HYPERCALL, CR3)
    assert not any(kernel.enabled(EventId.HYPERCALL, vcpu) for vcpu in (0, 1))


def test_one_thing_is_watched_at_a_time(make_vm):
    kernel, vm = make_vm()
    kernel.fire(EventId.HYPERCALL)
    for _ in vm.events(HYPERCALL):
        with pytest.raises(ValueError, match="one thing at a time"):
            vm.events(CR3)
        break


# -- breakpoints


def test_a_breakpoint_is_in_memory_while_it_is_watched(make_vm):
    kernel, vm = make_vm()
    kernel.memory[0x1234:0x1235] = NOP
    kernel.fire(EventId.HYPERCALL)
    for _ in vm.events(Breakpoint(0x1234), HYPERCALL):
        assert kernel.memory[0x1234:0x1235] == INT3
        break
    assert kernel.memory[0x1234:0x1235] == NOP


def test_a_breakpoint_is_stepped_over_while_the_other_vcpus_wait(make_vm):
    kernel, vm = make_vm(2)
    kernel.memory[0x1234:0x1235] = NOP
    replies = kernel.fire(EventId.BREAKPOINT, own=hit(0x1234))
    told: list[object] = []

    def execute() -> None:
        reply = next_reply(replies)
        told.extend((reply.action, kernel.memory[0x1234:0x1235], kernel.waiting_for(1)))
        step_when_told(kernel, 0)

    guest = threading.Thread(target=execute)
    guest.start()
    assert len(list(vm.events(Breakpoint(0x1234, physical=True), duration=0.5))) == 1
    guest.join()
    assert told == [Action.RETRY, NOP, EventId.PAUSE_VCPU]
    assert kernel.waiting_for(0) is None
    assert kernel.waiting_for(1) is None
    assert not kernel.enabled(EventId.SINGLESTEP)


def test_vcpus_that_meet_a_breakpoint_at_once_step_over_it_one_after_the_other(make_vm):
    kernel, vm = make_vm(2)
    there = Breakpoint(0x1234, physical=True)
    replies = [kernel.fire(EventId.BREAKPOINT, vcpu, hit(0x1234)) for vcpu in (0, 1)]
    told = []

    def execute() -> None:
        for vcpu in (0, 1):
            told.append(next_reply(replies[vcpu]).action)
            # The second one was asked to pause meanwhile, and is not held by that.
            told.append(step_when_told(kernel, vcpu))

    guest = threading.Thread(target=execute)
    guest.start()
    assert [event.vcpu for event in vm.events(there, duration=0.5)] == [0, 1]
    guest.join()
    assert told == [Action.RETRY, True] * 2
    assert kernel.waiting_for(0) is None
    assert kernel.waiting_for(1) is None


def test_a_breakpoint_that_is_answered_retry_is_not_stepped_over(make_vm):
    kernel, vm = make_vm()
    replies = kernel.fire(EventId.BREAKPOINT, own=hit(0x1234))
    for event in vm.events(Breakpoint(0x1234, physical=True)):
        event.reply(Action.RETRY)
        break
    assert next_reply(replies).action == Action.RETRY


def test_a_breakpoint_that_waits_at_the_end_is_met_again_by_nobody(make_vm):
    kernel, vm = make_vm()
    kernel.memory[0x1234:0x1235] = NOP
    replies = kernel.fire(EventId.BREAKPOINT, own=hit(0x1234))
    for _ in vm.events(Breakpoint(0x1234, physical=True)):
        break
    assert next_reply(replies).action == Action.RETRY
    assert kernel.memory[0x1234:0x1235] == NOP


def test_the_guests_own_breakpoints_are_the_guests(make_vm):
    kernel, vm = make_vm()
    replies = kernel.fire(EventId.BREAKPOINT, own=hit(0x2000))
    assert list(vm.events(Breakpoint(0x1234), duration=0.1)) == []
    assert next_reply(replies).action == Action.CONTINUE


def test_all_breakpoints_can_be_watched(make_vm):
    kernel, vm = make_vm()
    replies = kernel.fire(EventId.BREAKPOINT, own=hit(0x2000))
    for _ in vm.events(BREAKPOINTS):
        break
    assert next_reply(replies).action == Action.CONTINUE


def test_a_breakpoint_needs_memory(make_vm):
    kernel, vm = make_vm(pages=1)
    with pytest.raises(CommandError, match="read-physical: -EINVAL"):
        vm.events(Breakpoint(0x1000), HYPERCALL)
    assert not kernel.enabled(EventId.HYPERCALL)


def test_a_breakpoint_changes_the_guest(make_vm):
    kernel, vm = make_vm(observe=True)
    with pytest.raises(CommandError, match="write-physical: -EPERM"):
        vm.events(Breakpoint(0x1000))
    assert not kernel.enabled(EventId.BREAKPOINT)


def test_leaving_within_a_step_over_a_breakpoint_ends_the_step(make_vm):
    kernel, vm = make_vm(2)
    kernel.memory[0x1234:0x1235] = NOP
    replies = kernel.fire(EventId.BREAKPOINT, own=hit(0x1234))

    def write_cr3() -> None:
        next_reply(replies)
        kernel.fire(EventId.CR, own=cr3_write())

    guest = threading.Thread(target=write_cr3)
    guest.start()
    with closing(vm.events(Breakpoint(0x1234, physical=True), CR3)) as events:
        assert [next(events).event for _ in range(2)] == [EventId.BREAKPOINT, EventId.CR]
        assert kernel.enabled(EventId.SINGLESTEP)
        assert kernel.waiting_for(1) is not None
    guest.join()
    vm.session.get_version()
    assert not kernel.enabled(EventId.SINGLESTEP)
    assert kernel.waiting_for(0) is None
    assert kernel.waiting_for(1) is None


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("kvmi_host.introspect.breakpoints.STEP_PATIENCE", 0.05)


def test_a_step_that_its_vmm_has_stopped_is_put_off_and_the_other_vcpus_go_on(make_vm, impatient):
    kernel, vm = make_vm(2)
    kernel.memory[0x1234:0x1235] = NOP
    replies = kernel.fire(EventId.BREAKPOINT, own=hit(0x1234))
    told: list[object] = []

    def execute() -> None:
        told.append(next_reply(replies).action)
        kernel.stopped.add(0)
        kernel.await_running(1)
        told.append(kernel.memory[0x1234:0x1235])
        kernel.stopped.clear()
        told.append(next_reply(kernel.fire(EventId.BREAKPOINT, own=hit(0x1234))).action)
        told.append(step_when_told(kernel, 0))

    guest = threading.Thread(target=execute)
    guest.start()
    # It is met twice, and told of once.
    assert len(list(vm.events(Breakpoint(0x1234, physical=True), duration=1))) == 1
    guest.join()
    assert told == [Action.RETRY, INT3, Action.RETRY, True]
    assert kernel.waiting_for(1) is None


def test_a_step_that_another_vcpu_cannot_be_held_for_is_put_off(make_vm, impatient):
    kernel, vm = make_vm(3)
    kernel.memory[0x1234:0x1235] = NOP
    replies = kernel.fire(EventId.BREAKPOINT, own=hit(0x1234))
    with closing(vm.events(Breakpoint(0x1234, physical=True))) as events:
        kernel.stopped.add(2)
        next(events)
        guest = threading.Thread(target=lambda: (next_reply(replies), kernel.fire(EventId.UNHOOK)))
        guest.start()
        assert list(events) == []  # it goes back to its breakpoint, where its VMM can stop it
    guest.join()
    assert [kernel.waiting_for(vcpu) for vcpu in range(3)] == [None] * 3
    assert not kernel.enabled(EventId.SINGLESTEP)
    assert kernel.memory[0x1234:0x1235] == NOP


def test_leaving_at_the_hosts_wish_waits_for_no_vcpu_and_leaves_no_breakpoint(make_vm):
    kernel, vm = make_vm(2)
    kernel.memory[0x1234:0x1235] = NOP
    vm.session.timeout = 3600
    with closing(vm.events(Breakpoint(0x1234, physical=True), CR3)) as events:
        kernel.stopped |= {0, 1}
        kernel.fire(EventId.UNHOOK)
        assert list(events) == []
    assert vm.unhooked
    assert kernel.memory[0x1234:0x1235] == NOP


# -- pages


def test_a_page_is_watched_and_then_released(make_vm):
    kernel, vm = make_vm()
    replies = kernel.fire(EventId.PF, own=fault(0x1008, Access.W))
    for event in vm.events(PageWatch(0x1234, Access.W)):
        assert event.data.gpa == 0x1008
        assert kernel.access_to(0x1000) == Access.R | Access.X
        break
    assert next_reply(replies).action == Action.CONTINUE
    assert kernel.access_to(0x1000) == Access.ALL


def test_accesses_that_nobody_asked_for_go_on(make_vm):
    kernel, vm = make_vm()
    replies = kernel.fire(EventId.PF, own=fault(0x1000, Access.X))
    assert list(vm.events(PageWatch(0x1000, Access.R), duration=0.1)) == []
    assert next_reply(replies).action == Action.CONTINUE


def test_watches_of_one_page_add_up(make_vm):
    kernel, vm = make_vm()
    kernel.fire(EventId.HYPERCALL)
    for _ in vm.events(PageWatch(0x1000, Access.W), PageWatch(0x1008, Access.X), HYPERCALL):
        assert kernel.access_to(0x1000) == Access.R
        break


# -- handlers, and the end


def test_handlers_are_called_with_what_they_are_for(make_vm):
    kernel, vm = make_vm(2)
    kernel.fire(EventId.CR, own=cr3_write())
    kernel.fire(EventId.HYPERCALL, vcpu=1)
    called = []
    vm.on(CR3)(lambda event: called.append(("cr3", event.vcpu)))
    vm.on(HYPERCALL, CR4)(lambda event: called.append(("other", event.vcpu)))
    vm.run(duration=0.2)
    assert sorted(called) == [("cr3", 0), ("other", 1)]


def test_a_handler_can_end_the_watching(make_vm):
    kernel, vm = make_vm()
    replies = kernel.fire(EventId.HYPERCALL)
    vm.on(HYPERCALL)(lambda event: vm.stop())
    vm.run()
    assert next_reply(replies).action == Action.CONTINUE


def test_handlers_of_several_makers_are_called_in_turn(make_vm):
    kernel, vm = make_vm()
    kernel.fire(EventId.HYPERCALL)
    called, others = [], Handlers()
    vm.on(HYPERCALL)(lambda event: called.append("first"))
    others.add([HYPERCALL])(lambda event: called.append("second"))
    vm.handlers.include(others)
    vm.on(HYPERCALL)(lambda event: vm.stop())
    vm.run()
    assert called == ["first", "second"]


def test_a_handler_that_raises_is_reported_and_the_guest_goes_on(make_vm, caplog):
    kernel, vm = make_vm()
    replies = kernel.fire(EventId.HYPERCALL)

    @vm.on(HYPERCALL)
    def broken(event: object) -> None:
        raise LookupError("a bug")

    with caplog.at_level(logging.ERROR):
        vm.run(duration=0.2)
    assert next_reply(replies).action == Action.CONTINUE
    assert vm.handlers.errors == 1
    assert "broken raised at <Event 1 hypercall" in caplog.text
    assert vm.session.get_version().version == 1


def fail() -> None:
    raise LookupError("a bug")


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Ctrl-C is KeyboardInterrupt, also where a shell has started this in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize(("leave", "error"), [(fail, LookupError), (press_ctrl_c, KeyboardInterrupt)])
def test_leaving_the_block_undoes_what_was_done(make_vm, leave, error):
    kernel, vm = make_vm()
    kernel.memory[0x1234:0x1235] = NOP
    replies = kernel.fire(EventId.HYPERCALL)

    def work() -> None:
        with vm:
            for _ in vm.events(Breakpoint(0x1234), PageWatch(0x2000), HYPERCALL, duration=5):
                kernel.carried_out.clear()
                leave()

    with pytest.raises(error):
        work()
    assert kernel.wait_ended() == "the introspector closed"
    assert next_reply(replies).action == Action.CONTINUE
    assert kernel.memory[0x1234:0x1235] == NOP
    assert kernel.access_to(0x2000) == Access.ALL
    assert not kernel.enabled(EventId.HYPERCALL)
    undone = [Command.WRITE_PHYSICAL, Command.CONTROL_EVENTS, Command.SET_PAGE_ACCESS]
    assert [command for command in dict.fromkeys(kernel.carried_out) if command in undone] == undone


def test_nothing_is_mapped_where_page_tables_say_so():
    assert str(NotMapped(0x1000, 2)) == (
        "the guest's page tables have nothing at 0x1000: its entry of level 2 is not present"
    )
