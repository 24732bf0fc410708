# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attaching as a library does it: the name of a running VM in, the VM as an introspector sees it out."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from kvmi_host.attach.methods import Method, choose, require_full
from kvmi_host.attach.policy import Policy, policy_for
from kvmi_host.attach.qemu_object import connect_object, leave_object
from kvmi_host.attach.target import Target, find_target
from kvmi_host.attach.vmfd import VmHandle
from kvmi_host.introspect import PeerInfo, Session, Tap, Vm


@dataclass(frozen=True, slots=True)
class Connected:
    """A VM's session before anything was said.

    :ivar sock: has KVM at its other end.
    :ivar leave: to be called when the socket is closed: takes away what was made in the VMM. May block for seconds.
    """

    sock: socket.socket
    peer: PeerInfo
    leave: Callable[[], None] | None = None


def attach(
    vm: str,
    *,
    uri: str | None = None,
    allow: str | Iterable[str | int] | Policy = "observe",
    method: str = "auto",
    timeout: float = 10.0,
    tap: Tap | None = None,
) -> Vm:
    """Attach to a running VM of this host. Needs root.

    :param vm: a libvirt name or UUID, or ``pid:N``.
    :param uri: of the libvirt that knows the name.
    :param allow: what the session may do, as :func:`kvmi_host.attach.policy.policy_for` takes it.
    :param method: how, as :func:`kvmi_host.attach.methods.choose` takes it. ``qemu-object`` takes ``allow="full"``.
    :param timeout: the session's deadline for commands, in seconds.
    :param tap: is told of everything that crosses the socket, from the first byte on: what records a session.
    :raise AttachError: see its branches.
    :raise ProvisionError: libvirt could not be asked.
    :raise ValueError: `allow` or `method` names something that there is not.
    """
    connected = connect_kernel(vm, uri, allow, method)
    return Vm(Session(connected.sock, peer=connected.peer, timeout=timeout, tap=tap), leave=connected.leave)


def connect_kernel(vm: str, uri: str | None, allow: str | Iterable[str | int] | Policy, method: str) -> Connected:
    """A socket with KVM for that VM at its other end, and which VM it is. Raises what :func:`attach` does."""
    return connect_target(find_target(vm, uri), policy_for(allow), method)


def connect_target(target: Target, rules: Policy, method: str) -> Connected:
    """The same for a VM that was found."""
    chosen = choose(target, method)
    peer = PeerInfo(target.uuid, target.name, target.start_time, target.pid, str(chosen))
    if chosen is Method.QEMU_OBJECT:
        require_full(rules)
        return Connected(connect_object(target), peer, partial(leave_object, target))
    ours, kernels = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with kernels:
            hand_to_kernel(target, kernels, rules)
    except BaseException:
        ours.close()
        raise
    return Connected(ours, peer)


def hand_to_kernel(target: Target, sock: socket.socket, rules: Policy) -> None:
    """Let KVM speak for this VM on `sock`, within these rules. The caller may close `sock` afterwards.

    :raise AttachError: see its branches.
    """
    with VmHandle(target.pid) as vm:
        vm.hook(sock, target.uuid, observe=rules.observe)
        vm.allow_commands(rules.commands)
        vm.allow_events(rules.events)
