# SPDX-License-Identifier: LGPL-2.1-or-later
"""A VM that is saved, migrated or reset: its introspector is asked to leave first, and what it has put into the guest's
memory does not go along.

KVM sees both: the VMM begins to log writes to memory, or puts the first vCPU where it was switched on. So it does not
matter who asks the VMM for it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep

import pytest

from kvmi_host.attach import attach, detach, find_target
from kvmi_host.introspect import Breakpoint, Vm
from kvmi_host.protocol import EventId, messages
from kvmi_host.testing.live import DEADLINE, LiveGuest, Wire, await_end, await_event, hook, hook_socket
from kvmi_host.testing.puppet import Puppet, address

pytestmark = pytest.mark.hardware

GRACE = Path("/sys/module/kvm/parameters/introspection_grace")
VCPUS = 2
INT3 = b"\xcc"


@pytest.fixture
def own_puppet() -> Iterator[LiveGuest]:
    with LiveGuest(VCPUS, "puppet") as guest:
        yield guest.booted()


@pytest.fixture
def grace() -> Iterator[Callable[[int], None]]:
    """Sets how many seconds a VM waits for its introspector."""
    before = GRACE.read_text()

    def set_it(seconds: int) -> None:
        GRACE.write_text(str(seconds))

    yield set_it
    GRACE.write_text(before)


class Introspector(threading.Thread):
    """Watches a breakpoint, as a program does that leaves when it is asked to.

    :ivar hits: how often it was met.
    """

    def __init__(self, vm: Vm, where: int) -> None:
        super().__init__(daemon=True)
        self._vm = vm
        self.hits = 0
        self._events = vm.events(Breakpoint(where, physical=True))  # which is in when this returns
        self.start()

    def run(self) -> None:
        with self._vm:
            for _ in self._events:
                self.hits += 1

    def leaves(self) -> None:
        """Wait until it has, because it was asked to."""
        self.join(DEADLINE)
        assert not self.is_alive(), "it is still there"
        assert self._vm.unhooked, "the session ended, and nobody asked it to leave"


def save(guest: LiveGuest, path: Path) -> None:
    """What libvirt does for a managed save."""
    guest.monitor.command("stop")
    guest.monitor.command("migrate", uri=f"exec:cat > {path}")
    finish(guest)


def finish(guest: LiveGuest) -> None:
    """Wait until the VM has been saved, or sent away."""
    await_status(guest, "completed", "query-migrate")


def await_status(guest: LiveGuest, wanted: str, query: str = "query-status") -> None:
    """Wait until QEMU tells a status."""
    deadline = monotonic() + DEADLINE
    while (status := guest.monitor.command(query)["status"]) != wanted:
        assert status != "failed"
        assert monotonic() < deadline, f"QEMU does not come to {wanted}, it is {status}"
        sleep(0.05)  # it tells of changes only to whom has its events


@contextlib.contextmanager
def another(*options: str) -> Iterator[LiveGuest]:
    """A QEMU beside the one there is, which has made its VM."""
    with LiveGuest(VCPUS, "puppet", options=options) as guest:
        guest.monitor.command("query-status")
        yield guest


def await_hit(introspector: Introspector) -> None:
    """Wait until its breakpoint is met once more."""
    met, deadline = introspector.hits, monotonic() + DEADLINE
    while introspector.hits == met:
        assert monotonic() < deadline, "nothing is met any more"
        sleep(0.01)


def test_what_is_saved_has_no_breakpoint_and_the_introspector_was_asked_to_leave(
    own_puppet: LiveGuest, tmp_path: Path
) -> None:
    where = address("loop_nop")
    vm = attach(own_puppet.name, allow="full", timeout=DEADLINE)
    original = vm.memory[where : where + 1]
    introspector = Introspector(vm, where)
    save(own_puppet, tmp_path / "state")
    introspector.leaves()
    own_puppet.kill()
    with another("-incoming", f"exec:cat {tmp_path}/state") as guest, Vm(hook(guest)) as again:
        await_status(guest, "paused")
        assert original != INT3
        assert again.memory[where : where + 1] == original
        guest.monitor.command("cont")
        Puppet(again.session).run(0, "loop_nop", r15=3)


def test_a_vm_that_is_migrated_while_it_meets_a_breakpoint_goes_on_elsewhere_without(
    own_puppet: LiveGuest, tmp_path: Path
) -> None:
    where = address("loop_nop")
    vm = attach(own_puppet.name, allow="full", timeout=DEADLINE)
    original = vm.memory[where : where + 1]
    Puppet(vm.session).start(0, "loop_nop", r15=1 << 40)
    introspector = Introspector(vm, where)
    link = f"unix:{tmp_path}/link"
    with another("-incoming", link) as there:
        await_hit(introspector)
        own_puppet.monitor.command("migrate", uri=link)
        introspector.leaves()
        finish(own_puppet)
        own_puppet.kill()
        with Vm(hook(there)) as again:
            assert again.memory[where : where + 1] == original
            Puppet(again.session).advances(0)


def test_stopped_over_and_over_by_its_vmm_a_vm_gets_over_its_breakpoints(own_puppet: LiveGuest) -> None:
    where = address("loop_nop")
    vm = attach(own_puppet.name, allow="full", timeout=DEADLINE)
    puppet = Puppet(vm.session)
    for vcpu in range(VCPUS):
        puppet.start(vcpu, "loop_nop", r15=1 << 40)
    introspector = Introspector(vm, where)
    for _ in range(10):
        own_puppet.monitor.command("stop")
        own_puppet.monitor.command("cont")
        await_hit(introspector)
    assert detach(find_target(own_puppet.name), DEADLINE)
    introspector.leaves()
    with hook(own_puppet) as session:
        for vcpu in range(VCPUS):
            Puppet(session).advances(vcpu)


def test_an_introspector_that_does_not_leave_holds_the_vm_up_for_the_time_of_grace(
    own_puppet: LiveGuest, tmp_path: Path, grace: Callable[[int], None]
) -> None:
    grace(1)
    with hook(own_puppet) as session:
        session.control_vm_events(EventId.UNHOOK, True)
        save(own_puppet, tmp_path / "state")
        assert await_event(session).event == EventId.UNHOOK
        assert session.guest_info() == VCPUS
        # Once is enough: the next time nobody waits.
        grace(3600)
        own_puppet.monitor.command("cont")
        save(own_puppet, tmp_path / "state")
        assert session.next_event(0) is None
        own_puppet.monitor.command("cont")
    own_puppet.goes_on()


@pytest.mark.parametrize("why", ["it has not asked for it", "nobody is asked"])
def test_an_introspector_that_is_not_asked_stays(
    own_puppet: LiveGuest, tmp_path: Path, grace: Callable[[int], None], why: str
) -> None:
    grace(0 if why == "nobody is asked" else 3600)
    with hook(own_puppet) as session:
        session.control_vm_events(EventId.UNHOOK, why == "nobody is asked")
        save(own_puppet, tmp_path / "state")
        assert session.next_event(0) is None
        own_puppet.monitor.command("cont")
        assert session.guest_info() == VCPUS
    own_puppet.goes_on()


def test_an_introspector_that_does_not_read_cannot_keep_its_vm_from_being_saved(
    own_puppet: LiveGuest, tmp_path: Path, grace: Callable[[int], None]
) -> None:
    grace(1)
    sock = hook_socket(own_puppet)
    with sock:
        wire = Wire(sock)
        enable = messages.control_vm_events(EventId.UNHOOK, True)
        wire.send(enable.command, enable.payload, 1)
        wire.receive()
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            for seq in range(2, 1 << 20):
                wire.send(messages.get_version().command, b"", seq)
        save(own_puppet, tmp_path / "state")
        own_puppet.monitor.command("cont")
    own_puppet.goes_on()


def test_a_guest_that_boots_and_logs_its_displays_memory_is_neither_saved_nor_reset() -> None:
    with another("-S", "-vga", "std") as guest, hook(guest) as session:
        session.control_vm_events(EventId.UNHOOK, True)
        guest.monitor.command("cont")
        guest.booted()  # its firmware puts the display's memory in its place
        assert session.next_event(0) is None


def test_a_vm_that_is_reset_is_left_by_its_introspector(own_puppet: LiveGuest) -> None:
    introspector = Introspector(attach(own_puppet.name, allow="full", timeout=DEADLINE), address("loop_nop"))
    own_puppet.monitor.command("system_reset")
    introspector.leaves()
    own_puppet.await_line(lambda line: line == f"puppet: {VCPUS} vcpus")
    own_puppet.goes_on()


@pytest.mark.parametrize("asked", [True, False])
def test_a_reset_ends_the_session_of_whoever_does_not_leave(
    own_puppet: LiveGuest, grace: Callable[[int], None], asked: bool
) -> None:
    grace(1)
    with hook(own_puppet) as session:
        session.control_vm_events(EventId.UNHOOK, asked)
        own_puppet.monitor.command("system_reset")
        if asked:
            assert await_event(session).event == EventId.UNHOOK
        await_end(session)
    own_puppet.goes_on()
    with hook(own_puppet) as session:
        assert session.guest_info() == VCPUS
