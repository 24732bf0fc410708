# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is shown of a session: the objects that ``--json`` prints, and the cells of a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvmi_host.protocol import Descriptor, Event, EventId, event_name, msr_name

if TYPE_CHECKING:
    from kvmi_host.introspect import Facts

Record = Mapping[str, Any]
"""What is shown is what ``--json`` prints: the object of one line."""

COLUMNS = ("seq", "vCPU", "event", "mode", "rip", "detail")
LINE = "{:>10} {:>4} {:<12} {:>4} {:>18} {}"
"""How an event's cells are aligned."""

_COMMON = frozenset({"vm", "vcpu", "seq", "event", "mode", "rip", "time_ns"})
_CR = event_name(EventId.CR)
_MSR = event_name(EventId.MSR)
_DESCRIPTOR = event_name(EventId.DESCRIPTOR)
_UNHOOK = event_name(EventId.UNHOOK)
_DESCRIPTORS = {int(register): register.name.lower() for register in Descriptor}


def facts_record(facts: Facts) -> Record:
    """A session's facts, as they are shown."""
    return {
        "uuid": str(facts.uuid),
        "name": facts.name,
        "version": facts.version,
        "dialect": facts.dialect,
        "vcpus": facts.vcpus,
        "commands": list(facts.commands),
        "events": list(facts.events),
        "method": facts.method,
        "policy": facts.policy,
    }


def event_record(vm: str, event: Event, time_ns: int) -> Record:
    """An event, as it is shown: what all events have, then its own fields.

    :param time_ns: when it was received, since the epoch.
    """
    data = event.data
    return {
        "vm": vm,
        "vcpu": event.vcpu,
        "seq": event.seq,
        "event": event_name(event.event),
        "mode": event.mode,
        "rip": event.rip,
        "time_ns": time_ns,
        **(data._asdict() if data is not None else {}),
    }


def cells(record: Record) -> Sequence[str]:
    """An event's cells, for :data:`COLUMNS`."""
    if record["event"] == _UNHOOK:
        return (str(record["seq"]), "", _UNHOOK, "", "", "")
    numbers = (str(record["seq"]), str(record["vcpu"]), record["event"], str(record["mode"]))
    return (*numbers, f"{record['rip']:#018x}", _detail(record))


def _detail(record: Record) -> str:
    if record["event"] == _CR:
        return f"cr{record['cr']} {record['old']:#x} -> {record['new']:#x}"
    if record["event"] == _MSR:
        return f"{msr_name(record['msr'])} {record['old']:#x} -> {record['new']:#x}"
    if record["event"] == _DESCRIPTOR:
        register = _DESCRIPTORS.get(record["descriptor"], f"register {record['descriptor']}")
        return f"{register} {'write' if record['write'] else 'read'}"
    return " ".join(f"{name}={value:#x}" for name, value in record.items() if name not in _COMMON)
