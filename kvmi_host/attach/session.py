# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attaching as a library does it: a running VM in, a session out."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from uuid import UUID

from kvmi_host.attach.policy import Policy, policy_for
from kvmi_host.attach.target import Target, find_target
from kvmi_host.attach.vmfd import VmHandle
from kvmi_host.introspect import PeerInfo, Session, Tap
from kvmi_host.protocol import Command, EventId, command_name, event_name


@dataclass(frozen=True, slots=True)
class Facts:
    """What a session is and may do. ``commands`` and ``events`` are names, as the kernel allows them."""

    uuid: UUID
    name: str
    version: int
    dialect: str
    vcpus: int
    commands: tuple[str, ...]
    events: tuple[str, ...]
    method: str = "vm-fd"


@dataclass(frozen=True, slots=True)
class Attached:
    """A VM that is being introspected. Closing ends the session; the VM goes on."""

    session: Session
    facts: Facts

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the session. May be called again."""
        self.session.close()


def attach(
    vm: str,
    *,
    uri: str | None = None,
    allow: str | Iterable[str | int] | Policy = "observe",
    timeout: float = 10.0,
    tap: Tap | None = None,
) -> Attached:
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
    rules = policy_for(allow)
    target = find_target(vm, uri)
    ours, kernels = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    peer = PeerInfo(target.uuid, target.name, target.start_time, target.pid)
    session = Session(ours, peer=peer, timeout=timeout, tap=tap)
    try:
        with kernels:
            hand_to_kernel(target, kernels, rules)
        return Attached(session, facts_of(session, target))
    except BaseException:
        session.close()
        raise


def hand_to_kernel(target: Target, sock: socket.socket, rules: Policy) -> None:
    """Let KVM speak for this VM on `sock`, within these rules. The caller may close `sock` afterwards.

    :raise AttachError: see its branches.
    """
    with VmHandle(target.pid) as vm:
        vm.hook(sock, target.uuid, observe=rules.observe)
        vm.allow_commands(rules.commands)
        vm.allow_events(rules.events)


def facts_of(session: Session, target: Target) -> Facts:
    """What the kernel says of a session: a few dozen short commands."""
    version = session.get_version()
    commands = [c for c in Command if c > Command.EVENT and session.check_command(c)]
    events = [e for e in EventId if session.check_event(e)]
    return Facts(
        uuid=target.uuid,
        name=target.name,
        version=version.version,
        dialect=version.dialect,
        vcpus=session.guest_info() if Command.GET_GUEST_INFO in commands else 0,
        commands=tuple(map(command_name, commands)),
        events=tuple(map(event_name, events)),
    )
