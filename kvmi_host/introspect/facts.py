# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a session is and may do, as its first line says."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from kvmi_host.introspect.plans import Plan, allowed, ask
from kvmi_host.introspect.session import PeerInfo
from kvmi_host.protocol import Command, command_name, event_name, messages
from kvmi_host.protocol.dialects import DIALECTS

_NO_UUID = UUID(int=0)


@dataclass(frozen=True, slots=True)
class Facts:
    """``commands`` and ``events`` are names, as the kernel allows them. ``method``: how the VM was attached to;
    ``policy``: with which profile or policy file, or ``list``."""

    uuid: UUID
    name: str
    version: int
    dialect: str
    vcpus: int
    commands: tuple[str, ...]
    events: tuple[str, ...]
    method: str
    policy: str


def facts_of(peer: PeerInfo | None) -> Plan[Facts]:
    """Ask the kernel: a few dozen short commands."""
    version = yield from ask(messages.get_version())
    dialect = DIALECTS[version.dialect]
    may_send = {}
    for command in sorted(dialect.commands):
        may_send[command] = yield from allowed(messages.check_command(command))
    may_see = {}
    for event in sorted(dialect.events):
        may_see[event] = yield from allowed(messages.check_event(event))
    return Facts(
        uuid=peer.uuid if peer else _NO_UUID,
        name=(peer.name if peer else None) or "",
        version=version.version,
        dialect=version.dialect,
        vcpus=(yield from ask(messages.guest_info())) if may_send[Command.GET_GUEST_INFO] else 0,
        commands=tuple(command_name(command) for command, may in may_send.items() if may),
        events=tuple(event_name(event) for event, may in may_see.items() if may),
        method=peer.method if peer else "unknown",
        policy=peer.policy if peer else "unknown",
    )
