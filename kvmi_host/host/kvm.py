# SPDX-License-Identifier: LGPL-2.1-or-later
"""KVM's introspection interface on the host: the ioctls of a VM's descriptor, the capability, the module parameter."""

from __future__ import annotations

import os
from fcntl import ioctl
from pathlib import Path
from struct import Struct
from uuid import UUID

from kvmi_host.host.errors import HostError

KVM_DEVICE = Path("/dev/kvm")
PARAMETER = Path("/sys/module/kvm/parameters/introspection")

# <linux/kvm.h> and <asm-generic/ioctl.h>; introspection has the numbers of KVMI 6, its forced unhook that of 7.
_KVMIO = 0xAE
_IOC_WRITE = 1
_HOOK = Struct("<iI16s")
_ALLOW = Struct("<Ii")


def _io(number: int, direction: int = 0, size: int = 0) -> int:
    return direction << 30 | size << 16 | _KVMIO << 8 | number


KVM_CHECK_EXTENSION = _io(0x03)
KVM_INTROSPECTION_HOOK = _io(0xFF, _IOC_WRITE, _HOOK.size)
KVM_INTROSPECTION_UNHOOK = _io(0xFE)
KVM_INTROSPECTION_COMMAND = _io(0xFD, _IOC_WRITE, _ALLOW.size)
KVM_INTROSPECTION_EVENT = _io(0xFC, _IOC_WRITE, _ALLOW.size)
KVM_INTROSPECTION_UNHOOK_FORCE = _io(0xFB)

KVM_CAP_INTROSPECTION = (180, 999)
"""The capability's number in KVMI 7's tree and in KVMI 6; a kernel without introspection answers 0 to both."""

HOOK_OBSERVE = 1
"""Flag of HOOK: the session cannot change the guest."""

EVERYTHING = -1
"""For the allow ioctls: every command, or every event."""


def hook(vm_fd: int, sock: int, uuid: UUID, *, observe: bool) -> None:
    """KVM_INTROSPECTION_HOOK: KVM speaks on the connected stream socket `sock` from now on.

    :raise OSError: EEXIST hooked already; EPERM switched off or no CAP_SYS_ADMIN; EINVAL no stream socket.
    """
    ioctl(vm_fd, KVM_INTROSPECTION_HOOK, _HOOK.pack(sock, HOOK_OBSERVE if observe else 0, uuid.bytes))


def unhook(vm_fd: int) -> None:
    """KVM_INTROSPECTION_UNHOOK: send the introspector the UNHOOK event.

    :raise OSError: ENOENT it has not asked for that event; EFAULT the VM is not hooked.
    """
    ioctl(vm_fd, KVM_INTROSPECTION_UNHOOK)


def unhook_force(vm_fd: int) -> None:
    """KVM_INTROSPECTION_UNHOOK, forced: end the session now.

    :raise OSError: EFAULT the VM is not hooked.
    """
    ioctl(vm_fd, KVM_INTROSPECTION_UNHOOK_FORCE)


def allow_command(vm_fd: int, command: int = EVERYTHING, *, allow: bool = True) -> None:
    """KVM_INTROSPECTION_COMMAND: let the session send `command`, or not.

    :raise OSError: EPERM a session hooked with OBSERVE cannot have it; EFAULT the VM is not hooked.
    """
    ioctl(vm_fd, KVM_INTROSPECTION_COMMAND, _ALLOW.pack(allow, command))


def allow_event(vm_fd: int, event: int = EVERYTHING, *, allow: bool = True) -> None:
    """KVM_INTROSPECTION_EVENT: let the session enable `event`, or not.

    :raise OSError: EFAULT the VM is not hooked.
    """
    ioctl(vm_fd, KVM_INTROSPECTION_EVENT, _ALLOW.pack(allow, event))


def require_introspection(device: Path = KVM_DEVICE, parameter: Path = PARAMETER) -> int:
    """The version of KVM's introspection interface here.

    :raise HostError: there is none, and why: no KVM, no access, stock modules, or switched off.
    """
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise HostError(f"no {device}: load kvm_amd or kvm_intel (virtualization is on in the firmware?)") from None
    except OSError as error:
        raise HostError(f"{device}: {error.strerror}: be root, or a member of the group kvm") from None
    try:
        version = max(capabilities(fd).values())
    except OSError as error:
        raise HostError(f"{device} does not answer as KVM does: {error.strerror}") from None
    finally:
        os.close(fd)
    if introspection_enabled(parameter) is False:
        raise HostError(f"introspection is switched off: load kvm with introspection=1, or write 1 to {parameter}")
    if not version:
        raise HostError("this kernel's KVM modules have no introspection: install and load the kvmi modules")
    return version


def capabilities(kvm_fd: int) -> dict[int, int]:
    """What each number of the capability is answered with: the version, or 0.

    :param kvm_fd: ``/dev/kvm``.
    :raise OSError: that is no KVM.
    """
    return {number: ioctl(kvm_fd, KVM_CHECK_EXTENSION, number) for number in KVM_CAP_INTROSPECTION}


def introspection_enabled(parameter: Path = PARAMETER) -> bool | None:
    """The module parameter ``kvm.introspection``; None if the loaded modules have none, as stock ones."""
    try:
        return parameter.read_text().strip() in {"Y", "1"}
    except OSError:
        return None
