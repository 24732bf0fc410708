# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attaching as a library does it: the name of a running VM in, the VM as an introspector sees it out."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from kvmi_host.attach.methods import choose, require_full
from kvmi_host.attach.policy import Allow, Policy, policy_for
from kvmi_host.attach.policy_file import policy_of
from kvmi_host.attach.qemu_object import connect_object, leave_object
from kvmi_host.attach.target import Target, find_target
from kvmi_host.attach.vmfd import VmHandle
from kvmi_host.introspect import PeerInfo, Session, Tap, Vm
from kvmi_host.provision import Method


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
    allow: Allow | None = None,
    policy: str | os.PathLike[str] | None = None,
    method: str = "auto",
    wait: float = 0.0,
    timeout: float = 10.0,
    tap: Tap | None = None,
) -> Vm:
    """Attach to a running VM of this host. Needs root.

    :param vm: a libvirt name or UUID, or ``pid:N``.
    :param uri: of the libvirt that knows the name.
    :param allow: what the session may do, as :func:`kvmi_host.attach.policy.policy_for` takes it; by default what the
        VM's policy file says, and observing where it has none.
    :param policy: a policy file in place of the VM's own; see :mod:`kvmi_host.attach.policy_file`.
    :param method: how, as :func:`kvmi_host.attach.methods.choose` takes it. ``qemu-object`` takes ``allow="full"``.
    :param wait: seconds that the VM has to come to run.
    :param timeout: the session's deadline for commands, in seconds.
    :param tap: is told of everything that crosses the socket, from the first byte on: what records a session.
    :raise AttachError: see its branches.
    :raise ProvisionError: libvirt could not be asked.
    :raise ValueError: `allow` or `method` names something that there is not.
    """
    connected = connect_kernel(vm, uri, allow, policy, method, wait)
    return Vm(Session(connected.sock, peer=connected.peer, timeout=timeout, tap=tap), leave=connected.leave)


def connect_kernel(
    vm: str, uri: str | None, allow: Allow | None, policy: str | os.PathLike[str] | None, method: str, wait: float
) -> Connected:
    """A socket with KVM for that VM at its other end, and which VM it is. Raises what :func:`attach` does."""
    if allow is not None:
        allow = policy_for(allow)
    target = find_target(vm, uri, wait)
    return connect_target(target, policy_of(target, allow, policy), method)


def connect_target(target: Target, rules: Policy, method: str) -> Connected:
    """The same for a VM that was found."""
    chosen = choose(target, method)
    peer = PeerInfo(target.uuid, target.name, target.start_time, target.pid, str(chosen), rules.name)
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
