# SPDX-License-Identifier: LGPL-2.1-or-later
"""Several VMs at once, each with an introspector: none has to do with another's events, numbers, memory or end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from kvmi_host.attach import attach
from kvmi_host.introspect import Session
from kvmi_host.protocol import Access, Event, EventId, KvmiError
from kvmi_host.testing.live import DEADLINE, LiveGuest, SharedGuests, await_end, hook
from kvmi_host.testing.puppet import Puppet, page

pytestmark = pytest.mark.hardware

VMS = 3
ROUNDS = 1 << 40
"""More than a guest ever makes: it goes on until it is told to stop."""


@dataclass
class Vm:
    """One of them. RBX of its vCPU is the VM's number.

    :ivar events: those that were replied to.
    """

    number: int
    guest: LiveGuest
    puppet: Puppet
    events: int = 0

    @property
    def session(self) -> Session:
        return self.puppet.session

    def next(self) -> Event:
        """The next event, which is looked at and waits for its reply."""
        event = self.puppet.event()
        assert (event.seq, event.vcpu, event.event) == (self.events + 1, 0, EventId.HYPERCALL)
        assert event.registers.rbx == self.number
        return event

    def reply(self, event: Event) -> None:
        self.session.reply(event)
        self.events += 1


@pytest.fixture(scope="module")
def running(shared: SharedGuests) -> Iterator[list[LiveGuest]]:
    """The VMs' guests, which the tests share; none leaves one hooked or at work."""
    shared.stand_aside()
    guests: list[LiveGuest] = []
    yield guests
    for guest in guests:
        guest.kill()


@pytest.fixture
def guests(running: list[LiveGuest]) -> Iterator[list[LiveGuest]]:
    running[:] = [guest for guest in running if guest.alive]
    running += [LiveGuest(1, "puppet", memory="16") for _ in range(VMS - len(running))]
    yield [guest.booted() for guest in running]
    for guest in running:
        if guest.alive:
            try:
                with hook(guest) as session:
                    Puppet(session).settle(1)
            except (AssertionError, KvmiError):
                guest.kill()
                raise


@pytest.fixture
def vms(guests: list[LiveGuest], hooked: Callable[..., Session]) -> list[Vm]:
    """Hooked, and each makes one hypercall after the other."""
    vms = [Vm(number, guest, Puppet(hooked(guest))) for number, guest in enumerate(guests, 1)]
    for vm in vms:
        calls = f"loop_{vm.puppet.hypercall()}"
        vm.puppet.start(0, calls, rax=34, rdi=24, rbx=vm.number, r15=ROUNDS)
        vm.session.control_events(0, EventId.HYPERCALL, True)
    return vms


@pytest.mark.rule("1.3", "4.39", "4.40")
def test_each_has_its_own_events_and_count_and_they_are_answered_in_any_order(vms: list[Vm]) -> None:
    for turn in range(20):
        events = [(vm, vm.next()) for vm in vms]
        for vm, event in events[turn % VMS :] + events[: turn % VMS]:
            vm.reply(event)


@pytest.mark.rule("1.3", "1.5")
def test_a_reply_lets_its_own_vms_vcpu_go_on_and_no_others(vms: list[Vm]) -> None:
    first, *others = vms
    waiting = [vm.next() for vm in others]  # with the same number, of the same vCPU
    stood = [vm.puppet.progress(0) for vm in others]
    for _ in range(10):
        first.reply(first.next())
    first.next()
    assert [vm.puppet.progress(0) for vm in others] == stood
    for vm, event in zip(others, waiting, strict=True):
        vm.reply(event)
        vm.next()


@pytest.mark.rule("1.5")
def test_one_whose_vcpu_waits_keeps_no_other_from_its_commands(vms: list[Vm]) -> None:
    for vm in vms:
        vm.next()
    for vm in vms:
        assert vm.session.guest_info() == 1
        assert vm.session.get_registers(0).registers.rbx == vm.number


@pytest.mark.rule("1.3")
def test_what_is_written_is_in_the_memory_of_one(vms: list[Vm]) -> None:
    for vm in vms:
        vm.session.write_physical(page(7), bytes([vm.number]) * 4096)
    for vm in vms:
        assert vm.session.read_physical(page(7), 4096) == bytes([vm.number]) * 4096


@pytest.mark.rule("1.3")
def test_registers_are_set_in_one(vms: list[Vm]) -> None:
    first, *others = vms
    event = first.next()
    first.session.set_registers(0, event.registers._replace(rbx=0xBEEF))
    for vm in others:
        vm.reply(vm.next())
        vm.next()
    first.session.reply(event)
    assert first.puppet.event().registers.rbx == 0xBEEF


@pytest.mark.rule("1.3")
def test_a_page_is_watched_in_one(vms: list[Vm]) -> None:
    first, *others = vms
    for vm in vms:
        event = vm.puppet.event()
        vm.session.control_events(0, EventId.HYPERCALL, False)
        vm.session.reply(event)
        vm.puppet.stop(0)
        vm.puppet.finish(0)
        vm.session.control_events(0, EventId.PF, True)
    first.session.set_page_access({page(0): Access.R})
    for vm in others:
        assert vm.session.page_access(page(0)) == (Access.ALL,)
        assert vm.puppet.run(0, "write64", rsi=page(0)).exceptions == 0  # and no event
    events, _ = first.puppet.watch(0, "write64", rsi=page(0))
    assert {event.data.gpa for event in events} == {page(0)}


@pytest.mark.rule("1.4")
def test_one_that_breaks_the_rules_loses_its_own_session(vms: list[Vm]) -> None:
    first, *others = vms
    first.next()
    first.session.send_raw(b"\xff" * 64)
    await_end(first.session)
    for vm in others:
        for _ in range(5):
            vm.reply(vm.next())
    with hook(first.guest) as again:
        Puppet(again).advances(0)


@pytest.mark.rule("1.4")
def test_one_that_leaves_is_hooked_again_and_the_others_count_on(vms: list[Vm]) -> None:
    first, *others = vms
    for vm in others:
        vm.reply(vm.next())
    first.next()
    first.session.close()
    with attach(first.guest.name, timeout=DEADLINE).session as again:
        assert again.guest_info() == 1
        for vm in others:
            vm.reply(vm.next())


@pytest.mark.rule("1.4", "2.25")
def test_a_vm_that_is_killed_ends_no_session_but_its_own(vms: list[Vm]) -> None:
    first, *others = vms
    first.next()
    for vm in others:
        vm.next()
    first.guest.kill()
    await_end(first.session)
    for vm in others:
        assert vm.session.get_registers(0).registers.rbx == vm.number
