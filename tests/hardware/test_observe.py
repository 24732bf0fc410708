# SPDX-License-Identifier: LGPL-2.1-or-later
"""A session hooked with OBSERVE cannot change the guest."""

from __future__ import annotations

import socket
from collections.abc import Callable
from uuid import uuid4

import pytest

from kvmi_host.attach.errors import AttachRefused
from kvmi_host.attach.vmfd import VmHandle
from kvmi_host.introspect import Session
from kvmi_host.protocol import Action, Command, CommandError, ErrorCode, EventId, msr_index
from kvmi_host.testing.live import LiveGuest, Walker, await_end
from kvmi_host.testing.modewalk import Actions, Station
from kvmi_host.testing.puppet import Puppet, address

pytestmark = pytest.mark.hardware

LSTAR = msr_index("lstar")

CHANGING = {Command.SET_REGISTERS, Command.WRITE_PHYSICAL, Command.INJECT_EXCEPTION, Command.SET_PAGE_ACCESS}


@pytest.fixture
def observer(guest: LiveGuest, hooked: Callable[..., Session]) -> Session:
    """An observing session; vCPU 0 is held at a station without paging."""
    full = hooked(guest)
    Walker(full, guest.vcpus).hold(0, Station.PROT32, Actions.CR3 | Actions.HYPERCALL)
    full.close()
    return hooked(guest, allow="observe")


@pytest.mark.rule("5.15")
def test_all_leaves_out_what_changes_the_guest(observer: Session) -> None:
    assert not any(observer.check_command(command) for command in CHANGING)
    assert observer.check_command(Command.READ_PHYSICAL)
    assert observer.check_command(Command.GET_REGISTERS)


@pytest.mark.rule("5.14")
@pytest.mark.parametrize("command", sorted(CHANGING), ids=lambda command: command.name.lower())
def test_what_changes_the_guest_cannot_be_allowed(observer: Session, handle: VmHandle, command: Command) -> None:
    with pytest.raises(AttachRefused):
        handle.allow_commands([command])
    assert not observer.check_command(command)


@pytest.mark.rule("5.14")
def test_writing_memory_is_refused(observer: Session) -> None:
    with pytest.raises(CommandError) as refused:
        observer.write_physical(0x300000, b"x")
    assert refused.value.code == ErrorCode.EPERM


@pytest.mark.rule("5.16")
def test_events_come_and_go_on(observer: Session) -> None:
    walker = Walker(observer, 1)
    walker.enable(EventId.CR, 0, cr=3)
    walker.enable(EventId.HYPERCALL, 0)
    assert {event.event for event in walker.answered(9)} == {EventId.CR, EventId.HYPERCALL}


@pytest.mark.rule("5.16")
def test_crash_is_no_valid_reply(guest: LiveGuest, observer: Session) -> None:
    walker = Walker(observer, 1)
    walker.enable(EventId.HYPERCALL, 0)
    observer.reply(walker.event(), Action.CRASH)
    await_end(observer)
    guest.goes_on()


@pytest.mark.rule("5.16")
def test_another_new_value_is_no_valid_reply(
    guest: LiveGuest, observer: Session, hooked: Callable[..., Session]
) -> None:
    walker = Walker(observer, 1)
    walker.enable(EventId.CR, 0, cr=3)
    observer.reply(walker.event(), new_val=0x123000)
    await_end(observer)
    guest.goes_on()
    again = Walker(hooked(guest), 1)
    again.enable(EventId.CR, 0, cr=3)
    assert 0x123000 not in {event.data.old for event in again.answered(4)}


LOOPS = {
    # what the guest does over and over, and what an observer may not reply to it
    "skipping a breakpoint": (EventId.BREAKPOINT, "loop_int3", {"action": Action.RETRY}),
    "skipping a descriptor access": (EventId.DESCRIPTOR, "loop_lidt", {"action": Action.RETRY}),
    "another value for an msr": (EventId.MSR, "loop_wrmsr", {"new_val": 0x3000}),
    "ending the vm": (EventId.BREAKPOINT, "loop_int3", {"action": Action.CRASH}),
}


@pytest.mark.rule("5.16")
@pytest.mark.parametrize(("event", "snippet", "reply"), LOOPS.values(), ids=LOOPS)
def test_a_reply_that_changes_the_guest_ends_the_session(
    puppet_guest: LiveGuest, hooked: Callable[..., Session], event: EventId, snippet: str, reply: dict[str, int]
) -> None:
    registers = {"rcx": LSTAR, "rax": 0x1000, "rbx": 0x2000, "rsi": address("other_idtr"), "rdi": address("idtr")}
    full = Puppet(hooked(puppet_guest))
    full.start(0, snippet, **registers, r15=1 << 40)
    full.advances(0)
    full.session.close()
    watching = hooked(puppet_guest, allow="observe")
    watching.control_events(0, event, True)
    watching.control_msr(0, LSTAR, True)
    walker = Walker(watching, 1)
    for seen in walker.answered(5):
        assert seen.event == event
    watching.reply(walker.event(), **reply)
    await_end(watching)
    again = Puppet(hooked(puppet_guest))
    again.advances(0)
    again.stop(0)
    assert again.finish(0).exceptions == (again.progress(0) if snippet == "loop_int3" else 0)


@pytest.mark.rule("5.17")
def test_unknown_flags_are_refused(handle: VmHandle) -> None:
    from fcntl import ioctl

    from kvmi_host.host import kvm

    ours, kernels = socket.socketpair()
    with ours, kernels, pytest.raises(OSError, match="Invalid argument"):
        ioctl(handle._fd, kvm.KVM_INTROSPECTION_HOOK, kvm._HOOK.pack(kernels.fileno(), 2, uuid4().bytes))
