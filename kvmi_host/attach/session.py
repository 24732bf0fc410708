# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attaching as a library does it: the name of a running VM in, the VM as an introspector sees it out."""

from __future__ import annotations

import os
import socket

from kvmi_host.attach.policy import Allow, Policy, policy_for
from kvmi_host.attach.policy_file import policy_of
from kvmi_host.attach.target import Target, find_target
from kvmi_host.attach.vmfd import VmHandle
from kvmi_host.introspect import PeerInfo, Session, Tap, Vm


def attach(
    vm: str,
    *,
    uri: str | None = None,
    allow: Allow | None = None,
    policy: str | os.PathLike[str] | None = None,
    timeout: float = 10.0,
    tap: Tap | None = None,
) -> Vm:
    """Attach to a running VM of this host. Needs root.

    :param vm: a libvirt name or UUID, or ``pid:N``.
    :param uri: of the libvirt that knows the name.
    :param allow: what the session may do, as :func:`kvmi_host.attach.policy.policy_for` takes it; by default what the
        VM's policy file says, and observing where it has none.
    :param policy: a policy file in place of the VM's own; see :mod:`kvmi_host.attach.policy_file`.
    :param timeout: the session's deadline for commands, in seconds.
    :param tap: is told of everything that crosses the socket, from the first byte on: what records a session.
    :raise AttachError: see its branches.
    :raise ProvisionError: libvirt could not be asked.
    :raise ValueError: `allow` names something that there is not.
    """
    sock, peer = connect_kernel(vm, uri, allow, policy)
    return Vm(Session(sock, peer=peer, timeout=timeout, tap=tap))


def connect_kernel(
    vm: str, uri: str | None, allow: Allow | None, policy: str | os.PathLike[str] | None = None
) -> tuple[socket.socket, PeerInfo]:
    """A socket with KVM for that VM at its other end, and which VM it is. Raises what :func:`attach` does."""
    if allow is not None:
        allow = policy_for(allow)
    target = find_target(vm, uri)
    rules = policy_of(target, allow, policy)
    ours, kernels = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with kernels:
            hand_to_kernel(target, kernels, rules)
    except BaseException:
        ours.close()
        raise
    return ours, PeerInfo(target.uuid, target.name, target.start_time, target.pid, "vm-fd", rules.name)


def hand_to_kernel(target: Target, sock: socket.socket, rules: Policy) -> None:
    """Let KVM speak for this VM on `sock`, within these rules. The caller may close `sock` afterwards.

    :raise AttachError: see its branches.
    """
    with VmHandle(target.pid) as vm:
        vm.hook(sock, target.uuid, observe=rules.observe)
        vm.allow_commands(rules.commands)
        vm.allow_events(rules.events)
