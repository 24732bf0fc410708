# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whichever allocation fails: whoever asked is told, nothing is promised that does not happen, and the VM can be hooked
again.

The n-th allocation of one thread is made to fail, for every n that its work comes to.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from uuid import uuid4

import pytest

from kvmi_host.attach.errors import AttachError
from kvmi_host.attach.vmfd import VmHandle
from kvmi_host.host.footprint import users_of_kvm
from kvmi_host.introspect import Session, SessionClosed, SessionTimeout
from kvmi_host.protocol import Access, CommandError, ErrorCode, EventId, KvmiError, msr_index
from kvmi_host.testing.live import DEADLINE, LiveGuest, SharedGuests, await_end, await_event, hook_socket
from kvmi_host.testing.puppet import Puppet, page

pytestmark = [pytest.mark.hardware, pytest.mark.debug_kernel]

FAILSLAB = Path("/sys/kernel/debug/failslab")
LSTAR = msr_index("lstar")
VALUES = 0x4000_0000
"""What is written counts from here: an MSR that has the value already makes no event."""


@pytest.fixture(autouse=True)
def _failslab() -> None:
    """Allocations that may sleep can fail, too, and the kernel's log does not tell of each."""
    (FAILSLAB / "ignore-gfp-wait").write_text("N")
    (FAILSLAB / "verbose").write_text("0")


class Failing:
    """While it is entered, the n-th allocation of a thread fails.

    :ivar happened: afterwards: whether one has.
    """

    def __init__(self, thread: int, nth: int) -> None:
        self.happened = False
        self._nth = nth
        # Here, for it allocates something.
        self._control = os.open(f"/proc/{thread}/fail-nth", os.O_RDWR | os.O_CLOEXEC)

    def __enter__(self) -> Failing:
        os.pwrite(self._control, b"%d" % self._nth, 0)
        return self

    def __exit__(self, *_: object) -> None:
        # A thread of the kernel that is gone had a reason.
        self.happened = True
        with suppress(ProcessLookupError):
            self.happened = int(os.pread(self._control, 16, 0)) == 0
            os.pwrite(self._control, b"0", 0)
        os.close(self._control)


@contextmanager
def noted(errors: list[KvmiError]) -> Iterator[None]:
    """An error ends the block, and is noted."""
    try:
        yield
    except KvmiError as error:
        errors.append(error)


def receiver(guest: LiveGuest) -> int:
    """The thread of the guest's session: the newest, for that of the last one may not be gone yet."""
    names = ((int(path.parent.name), path.read_text().strip()) for path in Path("/proc").glob("[0-9]*/comm"))
    return max(thread for thread, name in names if name == f"kvmi-{guest.pid}")


def vcpu_thread(guest: LiveGuest) -> int:
    """The VMM's thread that runs vCPU 0."""
    vcpus = guest.monitor.command("query-cpus-fast")
    assert isinstance(vcpus, list)
    return int(vcpus[0]["thread-id"])


def runs(guest: LiveGuest) -> bool:
    """Whether QEMU runs the VM. It stops one that KVM has no memory to run."""
    status = guest.monitor.command("query-status")
    assert isinstance(status, dict)
    return bool(status["running"])


def session_with(guest: LiveGuest) -> Session:
    return Session(hook_socket(guest), timeout=DEADLINE)


def commands(session: Session) -> None:
    """What takes memory to be done: in the receiving thread, and in that of a vCPU."""
    session.get_registers(0, [LSTAR])
    session.xsave(0)
    session.set_page_access(dict.fromkeys(map(page, range(0, 256, 64)), Access.R))
    session.control_events(0, EventId.PF, True)
    session.control_msr(0, LSTAR, True)
    # The last, for each command makes the vCPU try again what it could not do before.
    session.control_events(0, EventId.MSR, True)


def events(session: Session, value: int) -> None:
    """What these commands were for."""
    puppet = Puppet(session)
    seen, _ = puppet.watch(0, "wrmsr", rcx=LSTAR, rax=value)
    assert [event.event for event in seen] == [EventId.MSR]
    seen, _ = puppet.watch(0, "write8", rsi=page(64), rax=value)
    assert [event.event for event in seen] == [EventId.PF]


def codes(errors: list[KvmiError]) -> set[int]:
    """The answers among the errors."""
    return {error.code for error in errors if isinstance(error, CommandError)}


@pytest.mark.rule("5.20")
def test_a_vm_is_hooked_or_not(own_guest: LiveGuest) -> None:
    before = users_of_kvm()
    refusals: list[KvmiError] = []
    for nth in count(1):
        refused = len(refusals)
        ours, kernels = socket.socketpair()
        with VmHandle(own_guest.pid) as vm, kernels, Failing(os.getpid(), nth) as failing, noted(refusals):
            vm.hook(kernels, uuid4(), observe=False)
        with Session(ours, timeout=DEADLINE) as session:
            if refused == len(refusals):
                session.get_version()
            else:
                assert users_of_kvm() == before
                with pytest.raises(SessionClosed):
                    session.get_version()
        if not failing.happened:
            break
    causes = [error.__cause__ for error in refusals]
    assert {cause.errno for cause in causes if isinstance(cause, OSError)} == {errno.ENOMEM}


@pytest.mark.rule("2.19")
def test_the_receiving_thread_does_what_it_says_or_ends_the_session(puppet_guest: LiveGuest) -> None:
    refusals: list[KvmiError] = []
    for nth in count(1):
        refused = len(refusals)
        with session_with(puppet_guest) as session:
            with Failing(receiver(puppet_guest), nth) as failing, noted(refusals):
                commands(session)
            if refused == len(refusals):
                events(session, VALUES + nth)
        if not failing.happened:
            break
    assert codes(refusals) == {ErrorCode.ENOMEM}
    assert all(isinstance(error, CommandError | SessionClosed) for error in refusals)


@pytest.mark.rule("2.19")
def test_a_vcpu_does_what_it_says_or_ends_the_session(shared: SharedGuests) -> None:
    refusals: list[KvmiError] = []
    for nth in count(1):
        guest = shared.use("puppet", 2)
        with session_with(guest) as session, Failing(vcpu_thread(guest), nth) as failing, noted(refusals):
            commands(session)
            events(session, VALUES + nth)
        if refusals and isinstance(refusals[-1], SessionTimeout):
            refusals.pop()
            assert not runs(guest)
            guest.kill()
        else:
            with session_with(guest) as session:
                Puppet(session).settle(guest.vcpus)
        if not failing.happened:
            break
    assert codes(refusals) == {ErrorCode.ENOMEM}
    assert all(isinstance(error, CommandError | SessionClosed) for error in refusals)


@pytest.mark.rule("2.19")
def test_an_introspector_is_asked_to_unhook_or_its_session_ends(own_guest: LiveGuest) -> None:
    for nth in count(1):
        with VmHandle(own_guest.pid) as vm, session_with(own_guest) as session:
            session.control_vm_events(EventId.UNHOOK, True)
            refusals: list[KvmiError] = []
            with Failing(os.getpid(), nth) as failing, noted(refusals):
                vm.unhook_request()
            if not refusals:
                assert await_event(session).event == EventId.UNHOOK
            else:
                assert isinstance(refusals[0], AttachError)
                await_end(session)
        if not failing.happened:
            break
    assert nth > 1
