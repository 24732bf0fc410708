# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attaching as a library does it: the name of a running VM in, the VM as an introspector sees it out."""

from __future__ import annotations

import socket
from collections.abc import Iterable

from kvmi_host.attach.policy import Policy, policy_for
from kvmi_host.attach.target import Target, find_target
from kvmi_host.attach.vmfd import VmHandle
from kvmi_host.introspect import PeerInfo, Session, Tap, Vm


def attach(
    vm: str,
    *,
    uri: str | None = None,
    allow: str | Iterable[str | int] | Policy = "observe",
    timeout: float = 10.0,
    tap: Tap | None = None,
) -> Vm:
    """Attach to a running VM of this host. Needs root.

    :param vm: a libvirt name or UUID, or ``pid:N``.
    :param uri: of the libvirt that knows the name.
    :param allow: what the session may do, as :func:`kvmi_host.attach.policy.policy_for` takes it.
    :param timeout: the session's deadline for commands, in seconds.
    :param tap: is told of everything that crosses the socket, from the first byte on: what records a session.
    :raise AttachError: see its branches.
    :raise ProvisionError: libvirt could not be asked.
    :raise ValueError: `allow` names something that there is not.
    """
    sock, peer = connect_kernel(vm, uri, allow)
    return Vm(Session(sock, peer=peer, timeout=timeout, tap=tap))


def connect_kernel(
    vm: str, uri: str | None, allow: str | Iterable[str | int] | Policy
) -> tuple[socket.socket, PeerInfo]:
    """A socket with KVM for that VM at its other end, and which VM it is. Raises what :func:`attach` does."""
    rules = policy_for(allow)
    target = find_target(vm, uri)
    ours, kernels = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with kernels:
            hand_to_kernel(target, kernels, rules)
    except BaseException:
        ours.close()
        raise
    return ours, PeerInfo(target.uuid, target.name, target.start_time, target.pid, "vm-fd")


def hand_to_kernel(target: Target, sock: socket.socket, rules: Policy) -> None:
    """Let KVM speak for this VM on `sock`, within these rules. The caller may close `sock` afterwards.

    :raise AttachError: see its branches.
    """
    with VmHandle(target.pid) as vm:
        vm.hook(sock, target.uuid, observe=rules.observe)
        vm.allow_commands(rules.commands)
        vm.allow_events(rules.events)
