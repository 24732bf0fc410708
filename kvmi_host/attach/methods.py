# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ways to attach to a VM, and which of them this host has for it."""

from __future__ import annotations

from kvmi_host.attach.errors import AttachError, AttachRefused
from kvmi_host.attach.policy import FULL, Policy
from kvmi_host.attach.qemu_object import require_object
from kvmi_host.attach.target import Target
from kvmi_host.attach.vmfd import VmHandle
from kvmi_host.provision import Method, ProvisionError


def choose(target: Target, wanted: str = "auto") -> Method:
    """The way that this host has for a VM; the VM's descriptor where there are both.

    :param wanted: ``auto``, or a :class:`Method`, which is not looked into.
    :raise AttachRefused: there is none; the message says what either lacks.
    :raise AttachError: the VM runs without KVM, or has ended.
    :raise ValueError: `wanted` is no method.
    """
    if wanted != "auto":
        return Method(wanted)
    try:
        with VmHandle(target.pid) as vm:
            vm.hooked()
        return Method.VM_FD
    except AttachRefused as error:
        lacks_vm_fd = error
    try:
        require_object(target)
    except (AttachError, ProvisionError) as error:
        raise AttachRefused(f"there is no way to attach. vm-fd: {lacks_vm_fd}. qemu-object: {error}") from error
    return Method.QEMU_OBJECT


def require_full(rules: Policy) -> None:
    """What QEMU's object makes possible: it allows a session everything, and nothing can take that back.

    :raise AttachRefused: the rules are narrower.
    """
    if rules != FULL:
        raise AttachRefused(
            "qemu-object cannot enforce a policy: QEMU allows the session everything. If that is what you want, say"
            " --allow full"
        )
