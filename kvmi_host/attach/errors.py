# SPDX-License-Identifier: LGPL-2.1-or-later
"""Why a VM cannot be attached to. The root of the tree is drawn in :mod:`kvmi_host.protocol.errors`.

::

    AttachError
    +-- NoSuchVm            nothing has that name, UUID or process id
    +-- VmNotRunning        the domain exists, but has no process
    +-- NoVmDescriptor      the process runs no KVM guest (emulated by TCG, or not a VMM)
    +-- AlreadyHooked       someone introspects this VM: detach first
    +-- NotHooked           nobody introspects this VM
    +-- PolicyRefused       the VM's policy file does not allow it, or cannot be used
    +-- AttachRefused       the host has no way for it, or forbids it; also a HostError: the host must change
    +-- MonitorUnreachable  QEMU's monitor does not answer, or serves someone else
    +-- MonitorRefused      QEMU returned an error for a command
"""

from kvmi_host.host import HostError
from kvmi_host.protocol import KvmiError


class AttachError(KvmiError):
    """This VM cannot be attached to."""


class NoSuchVm(AttachError):
    """Nothing has that name, UUID or process id."""


class VmNotRunning(AttachError):
    """The domain exists, but has no process: start it."""


class NoVmDescriptor(AttachError):
    """The process holds no KVM VM: the guest is emulated (TCG), or the process is no VMM."""


class AlreadyHooked(AttachError):
    """Someone introspects this VM already: detach first."""


class NotHooked(AttachError):
    """Nobody introspects this VM."""


class PolicyRefused(AttachError):
    """The VM's policy file does not allow what was asked for, or cannot be used: ask for less, or change the file."""


class AttachRefused(AttachError, HostError):
    """The host says no: modules and a QEMU without introspection, introspection switched off, or not privileged."""


class MonitorUnreachable(AttachError):
    """QEMU's monitor does not answer, or serves someone else."""


class MonitorRefused(AttachError):
    """QEMU returned an error.

    :ivar command: for which command.
    :ivar kind: the error's class, ``GenericError`` mostly.
    :ivar description: QEMU's words.
    """

    def __init__(self, command: str, kind: str, description: str) -> None:
        self.command = command
        self.kind = kind
        self.description = "".join(letter if letter.isprintable() else "?" for letter in description)
        super().__init__(f"QEMU refuses {command}: {self.description}")
