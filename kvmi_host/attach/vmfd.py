# SPDX-License-Identifier: LGPL-2.1-or-later
"""The introspection of a VM through a duplicate of its file descriptor, taken from its VMM's process.

A stock VMM knows nothing of introspection; our kernel part therefore accepts the introspection ioctls from any process
with CAP_SYS_ADMIN. The duplicate keeps the VM alive, so it must be closed as soon as the ioctls are done.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self
from uuid import UUID

from kvmi_host.attach.errors import AlreadyHooked, AttachError, AttachRefused, NoSuchVm, NotHooked, NoVmDescriptor
from kvmi_host.host import introspection_enabled, kvm
from kvmi_host.protocol import Command, command_name, event_name

_PIDFD_GETFD = 438  # <asm/unistd_64.h>; neither glibc 2.36 nor Python has a function for it
_VM_LINK = "anon_inode:kvm-vm"
_STOCK_MODULES = (errno.ENOTTY, errno.EINVAL, errno.EIO)


class VmHandle:
    """A duplicate of a VM's descriptor. Close it soon: the VM lives as long as it is open."""

    def __init__(self, pid: int) -> None:
        """
        :param pid: the VMM's process. If it runs several VMs, the first one that it made is taken.
        :raise NoSuchVm: there is no such process.
        :raise NoVmDescriptor: it runs no KVM guest.
        :raise AttachRefused: this process may not look into it.
        """
        self.pid = pid
        self._fd = _duplicate(pid, _find(pid))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the VM. May be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def hook(self, sock: socket.socket, uuid: UUID, *, observe: bool) -> None:
        """Let KVM speak on `sock`, a connected stream socket. KVM keeps it; ours may be closed then.

        :param uuid: the VM's, for the kernel's own messages.
        :param observe: the session can never change the guest.
        :raise AlreadyHooked: there is a session.
        :raise AttachRefused: see :class:`AttachRefused`.
        """
        try:
            kvm.hook(self._fd, sock.fileno(), uuid, observe=observe)
        except OSError as error:
            _explain_hook(self.pid, error)

    def allow_commands(self, commands: Iterable[int] | None = None) -> None:
        """Let the session send these commands; None: all that the kernel has and the session may have.

        :raise AttachRefused: one of them changes the guest, and the session may only observe.
        :raise NotHooked: the session has ended.
        """
        for command in [kvm.EVERYTHING] if commands is None else commands:
            try:
                kvm.allow_command(self._fd, command)
            except OSError as error:
                _explain_allow(self.pid, f"command {command_name(command)}", error)

    def allow_events(self, events: Iterable[int] | None = None) -> None:
        """Let the session enable these events; None: all that the kernel has.

        :raise NotHooked: the session has ended.
        """
        for event in [kvm.EVERYTHING] if events is None else events:
            try:
                kvm.allow_event(self._fd, event)
            except OSError as error:
                _explain_allow(self.pid, f"event {event_name(event)}", error)

    def hooked(self) -> bool:
        """Whether there is a session. Asked by allowing GET_VERSION, which every session may send anyway.

        :raise AttachRefused: the kernel does not serve us.
        """
        try:
            kvm.allow_command(self._fd, Command.GET_VERSION)
        except OSError as error:
            if error.errno == errno.EFAULT:
                return False
            _explain_hook(self.pid, error)
        return True

    def unhook_request(self) -> bool:
        """Send the introspector the UNHOOK event, so that it cleans up and closes. False: it has not asked for it.

        :raise NotHooked: there is no session.
        """
        try:
            kvm.unhook(self._fd)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            _explain_unhook(self.pid, error)
        return True

    def unhook_force(self) -> None:
        """End the session now.

        :raise NotHooked: there is no session.
        """
        try:
            kvm.unhook_force(self._fd)
        except OSError as error:
            _explain_unhook(self.pid, error)


def _find(pid: int) -> int:
    try:
        numbers = sorted(int(entry) for entry in os.listdir(f"/proc/{pid}/fd"))
    except PermissionError:
        raise AttachRefused(f"process {pid}: its descriptors are not for this user: run as root") from None
    except OSError:
        raise NoSuchVm(f"there is no process {pid}") from None
    for number in numbers:
        try:
            if os.readlink(Path("/proc", str(pid), "fd", str(number))) == _VM_LINK:
                return number
        except OSError:
            continue  # closed since it was listed
    raise NoVmDescriptor(f"process {pid} runs no KVM guest: it is emulated (TCG), or the process is no VMM")


def _duplicate(pid: int, number: int) -> int:
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        raise NoSuchVm(f"process {pid}: {error.strerror}") from None
    try:
        fd: int = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, pidfd, number, 0)
    finally:
        os.close(pidfd)
    if fd < 0:
        raise AttachRefused(f"process {pid}: its VM's descriptor: {os.strerror(ctypes.get_errno())}: run as root")
    return fd


def _explain_hook(pid: int, error: OSError) -> NoReturn:
    if error.errno == errno.EEXIST:
        raise AlreadyHooked(f"the VM of process {pid} is being introspected already: detach first") from error
    if error.errno == errno.EPERM:
        if introspection_enabled() is False:
            raise AttachRefused(f"introspection is switched off: write 1 to {kvm.PARAMETER}") from error
        raise AttachRefused("the kernel does not permit it: CAP_SYS_ADMIN is needed: run as root") from error
    if error.errno in _STOCK_MODULES:
        raise AttachRefused(
            f"the loaded KVM modules have no introspection ({error.strerror}): load the kvmi modules and start the VM"
            " again"
        ) from error
    raise AttachError(f"hooking the VM of process {pid}: {error.strerror}") from error


def _explain_allow(pid: int, what: str, error: OSError) -> NoReturn:
    if error.errno == errno.EFAULT:
        raise NotHooked(f"the VM of process {pid} is not being introspected (any more)") from error
    if error.errno == errno.EPERM:
        raise AttachRefused(f"{what} cannot be allowed: it changes the guest, the session only observes") from error
    raise AttachError(f"{what} cannot be allowed: {error.strerror}") from error


def _explain_unhook(pid: int, error: OSError) -> NoReturn:
    if error.errno == errno.EFAULT:
        raise NotHooked(f"the VM of process {pid} is not being introspected") from error
    if error.errno in _STOCK_MODULES:
        raise AttachRefused(f"the loaded KVM modules have no introspection ({error.strerror})") from error
    raise AttachError(f"unhooking the VM of process {pid}: {error.strerror}") from error
