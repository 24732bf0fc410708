# SPDX-License-Identifier: LGPL-2.1-or-later
"""vCPUs that are plugged into a running VM while it is hooked: counted at once, refused until the guest starts them,
announced when it does, and from then on like the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from kvmi_host.introspect import Session
from kvmi_host.protocol import CommandError, ErrorCode, Event, EventId, KvmiError
from kvmi_host.testing.live import LiveGuest, SharedGuests, hook
from kvmi_host.testing.puppet import Puppet, address, page

pytestmark = pytest.mark.hardware

MAX_VCPUS = 12
"""As many as the tests plug in, and one."""
LOCAL_APIC = 0xFEE00000
INIT, START = 0x4500, 0x4608
"""Commands of that APIC, to one vCPU: the second names page 8."""
RESET_VECTOR = (0xFFFF0000, 0xFFF0)
SEND = bytes.fromhex("898610030000 899e00030000 898e00030000 c3")
"""Code: EAX to the upper half of the interrupt command register of the APIC at RSI; EBX, then ECX to the lower; RET."""


def plug(guest: LiveGuest) -> None:
    """Give the VM the next vCPU that it has room for."""
    slots = guest.monitor.command("query-hotpluggable-cpus")
    assert isinstance(slots, list)
    free = [slot for slot in slots if "qom-path" not in slot]
    slot = min(free, key=lambda slot: sorted(slot["props"].items()))
    guest.monitor.command("device_add", driver=slot["type"], id=f"vcpu{len(slots) - len(free)}", **slot["props"])


def start(puppet: Puppet, vcpu: int) -> None:
    """Have vCPU 0 start another one, as an operating system does, in the page where the guest's vCPUs begin."""
    puppet.session.write_physical(page(0), SEND)
    puppet.start(0, page(0), rsi=LOCAL_APIC, rax=vcpu << 24, rbx=INIT, rcx=START)


@pytest.fixture(scope="module")
def growing(shared: SharedGuests) -> Iterator[list[LiveGuest]]:
    """The guest to which each test adds, if it lives."""
    guests: list[LiveGuest] = []
    yield guests
    for guest in guests:
        guest.kill()


@pytest.fixture
def guest(shared: SharedGuests, growing: list[LiveGuest]) -> Iterator[LiveGuest]:
    """One with a single vCPU at first, and room for more. All that it has been given are started and at home."""
    shared.stand_aside()
    if not growing or not growing[-1].alive:
        growing.append(LiveGuest(1, "puppet", options=["-smp", f"1,maxcpus={MAX_VCPUS}"]).booted())
    guest = growing[-1]
    yield guest
    try:
        with hook(guest) as session:
            Puppet(session).settle(session.guest_info())
    except (AssertionError, KvmiError):
        guest.kill()
        raise


@pytest.fixture
def puppet(guest: LiveGuest, hooked: Callable[..., Session]) -> Puppet:
    """On a session that may do everything, and that knows of the vCPUs there are."""
    puppet = Puppet(hooked(guest))
    announced(puppet, puppet.session.guest_info())
    return puppet


def announced(puppet: Puppet, vcpus: int) -> None:
    """Switch CREATE_VCPU on, and let the vCPUs that run announce themselves."""
    puppet.session.control_vm_events(EventId.CREATE_VCPU, True)
    events = [puppet.event() for _ in range(vcpus)]
    assert {event.event for event in events} == {EventId.CREATE_VCPU}
    assert sorted(event.vcpu for event in events) == list(range(vcpus))
    for event in events:
        puppet.session.reply(event)


def refusal(session: Session, command: Callable[[], object]) -> int:
    with pytest.raises(CommandError) as refused:
        command()
    assert session.get_version().version == 1
    return refused.value.code


COMMANDS: dict[str, Callable[[Session, int], object]] = {
    "GET_VCPU_INFO": lambda session, vcpu: session.vcpu_info(vcpu),
    "PAUSE_VCPU": lambda session, vcpu: session.pause_vcpu(vcpu),
    "CONTROL_EVENTS": lambda session, vcpu: session.control_events(vcpu, EventId.HYPERCALL, True),
    "CONTROL_CR": lambda session, vcpu: session.control_cr(vcpu, 3, True),
    "CONTROL_MSR": lambda session, vcpu: session.control_msr(vcpu, 0xC0000082, True),
    "GET_REGISTERS": lambda session, vcpu: session.get_registers(vcpu),
    "GET_CPUID": lambda session, vcpu: session.cpuid(vcpu, 0),
    "GET_XSAVE": lambda session, vcpu: session.xsave(vcpu),
    "INJECT_EXCEPTION": lambda session, vcpu: session.inject_exception(vcpu, 6),
}


def begun(guest: LiveGuest, puppet: Puppet) -> Event:
    """Plug a vCPU in and have it started: the event with which it announces itself."""
    vcpu = puppet.session.guest_info()
    plug(guest)
    start(puppet, vcpu)
    event = puppet.event()
    assert (event.event, event.vcpu) == (EventId.CREATE_VCPU, vcpu)
    return event


def added(guest: LiveGuest, puppet: Puppet) -> int:
    """Plug a vCPU in, have it started and let it go, until it is at home with the others: its index."""
    event = begun(guest, puppet)
    puppet.session.reply(event)
    puppet.finish(0)
    puppet.run(event.vcpu, "nops")
    return event.vcpu


@pytest.mark.rule("2.13", "2.26", "3.4", "4.79")
def test_it_is_counted_when_it_is_plugged_in_and_takes_no_commands_until_it_starts(
    guest: LiveGuest, puppet: Puppet
) -> None:
    session = puppet.session
    vcpu = session.guest_info()
    refusals = {name: refusal(session, partial(command, session, vcpu)) for name, command in COMMANDS.items()}
    assert refusals == dict.fromkeys(COMMANDS, ErrorCode.EINVAL)
    plug(guest)
    assert session.guest_info() == vcpu + 1
    refusals = {name: refusal(session, partial(command, session, vcpu)) for name, command in COMMANDS.items()}
    assert refusals == dict.fromkeys(COMMANDS, ErrorCode.EAGAIN)
    assert puppet.run(0, "nops").exceptions == 0
    assert session.waiting == 0
    start(puppet, vcpu)
    session.reply(puppet.event())
    puppet.finish(0)
    for name, command in COMMANDS.items():
        if name not in {"PAUSE_VCPU", "INJECT_EXCEPTION"}:  # which would have it do something
            command(session, vcpu)


@pytest.mark.rule("4.76", "4.78")
def test_it_announces_itself_before_its_first_instruction_and_waits(guest: LiveGuest, puppet: Puppet) -> None:
    event = begun(guest, puppet)
    # As a reset has left it, or where it was told to start.
    assert (event.sregs.cs.base, event.rip) in {RESET_VECTOR, ((START & 0xFF) << 12, 0)}
    assert event.mode == 2
    puppet.finish(0)
    online = puppet.session.read_physical(address("ONLINE"), 4)
    assert puppet.run(0, "nops").exceptions == 0
    assert puppet.session.read_physical(address("ONLINE"), 4) == online
    puppet.session.reply(event)
    assert puppet.run(event.vcpu, "nops").exceptions == 0
    assert int.from_bytes(puppet.session.read_physical(address("ONLINE"), 4), "little") == event.vcpu + 1


@pytest.mark.rule("4.39", "4.41")
def test_the_events_of_one_after_the_other_are_counted_on(guest: LiveGuest, puppet: Puppet) -> None:
    counted = puppet.session.guest_info()
    for _ in range(2):
        event = begun(guest, puppet)
        counted += 1
        assert event.seq == counted
        puppet.session.reply(event)
        puppet.finish(0)


@pytest.mark.rule("4.34", "4.79")
def test_it_starts_unannounced_where_nobody_wants_to_know(guest: LiveGuest, puppet: Puppet) -> None:
    puppet.session.control_vm_events(EventId.CREATE_VCPU, False)
    vcpu = puppet.session.guest_info()
    plug(guest)
    start(puppet, vcpu)
    puppet.finish(0)
    assert puppet.run(vcpu, "nops").exceptions == 0
    assert puppet.session.vcpu_info(vcpu) == puppet.session.vcpu_info(0)


@pytest.mark.rule("4.35", "4.79")
def test_its_events_are_switched_on_and_off(guest: LiveGuest, puppet: Puppet) -> None:
    session = puppet.session
    vcpu = added(guest, puppet)
    call = puppet.hypercall()
    session.control_events(vcpu, EventId.HYPERCALL, True)
    events, _ = puppet.watch(vcpu, call, rax=34, rdi=24)
    assert [(event.event, event.vcpu) for event in events] == [(EventId.HYPERCALL, vcpu)]
    puppet.run(0, call, rax=34, rdi=24)  # and no event: vCPU 0 was not asked for
    session.control_events(vcpu, EventId.HYPERCALL, False)
    puppet.run(vcpu, call, rax=34, rdi=24)


@pytest.mark.rule("3.6", "4.79")
def test_it_is_paused_like_the_others(guest: LiveGuest, puppet: Puppet) -> None:
    vcpu = added(guest, puppet)
    puppet.session.pause_vcpu(vcpu)
    event = puppet.event()
    assert (event.event, event.vcpu, event.mode) == (EventId.PAUSE_VCPU, vcpu, 8)
    puppet.session.reply(event)


@pytest.mark.rule("2.21")
def test_the_session_may_end_while_it_announces_itself(
    guest: LiveGuest, puppet: Puppet, hooked: Callable[..., Session]
) -> None:
    vcpu = begun(guest, puppet).vcpu
    puppet.session.close()
    again = Puppet(hooked(guest))
    again.finish(0)
    assert again.run(vcpu, "nops").exceptions == 0


@pytest.mark.rule("4.77")
def test_another_session_is_told_of_it_as_of_the_others(
    guest: LiveGuest, puppet: Puppet, hooked: Callable[..., Session]
) -> None:
    vcpu = added(guest, puppet)
    puppet.session.close()
    announced(Puppet(hooked(guest)), vcpu + 1)
