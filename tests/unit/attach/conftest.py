# SPDX-License-Identifier: LGPL-2.1-or-later
"""A VM whose kernel is simulated: the descriptor is real (an eventfd in place of KVM's), its ioctls are not."""

import errno
import os
import socket
from collections.abc import Callable, Iterator
from uuid import UUID

import pytest

from kvmi_host.attach import Target, vmfd
from kvmi_host.host import kvm
from kvmi_host.protocol import Command
from kvmi_host.testing.peer import SimulatedKernel


class SimulatedVm:
    """What KVM keeps of a VM's introspection, behind the functions of ``kvmi_host.host.kvm``.

    :ivar refuse: by function name, the errno with which it fails.
    :ivar calls: the calls that were made.
    :ivar when_asked: what the introspector does when it gets the UNHOOK event.
    """

    def __init__(self) -> None:
        self.refuse: dict[str, int] = {}
        self.calls: list[tuple[object, ...]] = []
        self.when_asked: Callable[[], None] = lambda: None
        self.kernel: SimulatedKernel | None = None

    def hook(self, vm_fd: int, sock: int, uuid: UUID, *, observe: bool) -> None:
        self._call("hook", uuid, observe)
        with socket.socket(fileno=os.dup(sock)) as theirs:
            self.kernel = SimulatedKernel(theirs, vcpus=2, observe=observe)

    def allow_command(self, vm_fd: int, command: int = -1, *, allow: bool = True) -> None:
        # What every session may send anyway is allowed to see whether there is one.
        if command != Command.GET_VERSION or "allow_command" in self.refuse:
            self._call("allow_command", command)
        if self.kernel is None or self.kernel.why:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))

    def allow_event(self, vm_fd: int, event: int = -1, *, allow: bool = True) -> None:
        self._call("allow_event", event)

    def unhook(self, vm_fd: int) -> None:
        self._call("unhook")
        self.when_asked()

    def unhook_force(self, vm_fd: int) -> None:
        self._call("unhook_force")
        if self.kernel:
            self.kernel.end("unhooked")

    def _call(self, name: str, *arguments: object) -> None:
        self.calls.append((name, *arguments))
        if name in self.refuse:
            raise OSError(self.refuse[name], os.strerror(self.refuse[name]))


@pytest.fixture
def vm_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    """This process, as if it ran a VM."""
    monkeypatch.setattr(vmfd, "_VM_LINK", "anon_inode:[eventfd]")
    fd = os.eventfd(0)
    yield Target(os.getpid(), "webserver", UUID(int=7), 1_700_000_000)
    os.close(fd)


@pytest.fixture
def simulated_vm(monkeypatch: pytest.MonkeyPatch, vm_process: Target) -> Iterator[SimulatedVm]:
    """The VM of this process, with a simulated kernel."""
    vm = SimulatedVm()
    functions: list[Callable[..., None]] = [vm.hook, vm.allow_command, vm.allow_event, vm.unhook, vm.unhook_force]
    for function in functions:
        monkeypatch.setattr(kvm, function.__name__, function)
    yield vm
    if vm.kernel:
        vm.kernel.end("the test is over")
