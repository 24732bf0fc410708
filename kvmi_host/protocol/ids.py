# SPDX-License-Identifier: LGPL-2.1-or-later
"""The numbers of the protocol, dialect v6: commands, events, actions, error codes."""

from __future__ import annotations

from enum import IntEnum, IntFlag

KVMI_VERSION = 1
"""What GET_VERSION answers and KVM_CHECK_EXTENSION returns."""


class Command(IntEnum):
    """Message ids. Ids 0 and 1 carry events and replies and are no commands one can send."""

    EVENT_REPLY = 0
    EVENT = 1
    GET_VERSION = 2
    CHECK_COMMAND = 3
    CHECK_EVENT = 4
    GET_GUEST_INFO = 5
    GET_VCPU_INFO = 6
    PAUSE_VCPU = 7
    CONTROL_VM_EVENTS = 8
    CONTROL_EVENTS = 9
    CONTROL_CR = 10
    CONTROL_MSR = 11
    CONTROL_VE = 12
    GET_REGISTERS = 13
    SET_REGISTERS = 14
    GET_CPUID = 15
    GET_XSAVE = 16
    READ_PHYSICAL = 17
    WRITE_PHYSICAL = 18
    INJECT_EXCEPTION = 19
    GET_PAGE_ACCESS = 20
    SET_PAGE_ACCESS = 21
    GET_MAP_TOKEN = 22
    GET_MTRR_TYPE = 23
    CONTROL_SPP = 24
    GET_PAGE_WRITE_BITMAP = 25
    SET_PAGE_WRITE_BITMAP = 26
    CONTROL_CMD_RESPONSE = 27
    GET_MAX_GFN = 29


class EventId(IntEnum):
    """Kinds of events, ``kvmi_event.event``."""

    UNHOOK = 0
    CR = 1
    MSR = 2
    XSETBV = 3
    BREAKPOINT = 4
    HYPERCALL = 5
    PF = 6
    TRAP = 7
    DESCRIPTOR = 8
    CREATE_VCPU = 9
    PAUSE_VCPU = 10
    SINGLESTEP = 11


class Action(IntEnum):
    """What the vCPU does after an event, ``kvmi_event_reply.action``."""

    CONTINUE = 0
    RETRY = 1
    CRASH = 2


class Access(IntFlag):
    """What the guest may do with a page, or has tried to do."""

    NONE = 0
    R = 1
    W = 2
    X = 4
    ALL = 7
    """What every page begins with."""


class Descriptor(IntEnum):
    """Registers of descriptor tables, ``kvmi_event_descriptor.descriptor``."""

    IDTR = 1
    GDTR = 2
    LDTR = 3
    TR = 4


class ErrorCode(IntEnum):
    """Codes of ``kvmi_error_code.err``, with the sign they have on the wire."""

    EPERM = -1
    ENOENT = -2
    EAGAIN = -11
    ENOMEM = -12
    EFAULT = -14
    EBUSY = -16
    EINVAL = -22
    EOPNOTSUPP = -95


VM_EVENTS = frozenset({EventId.UNHOOK, EventId.CREATE_VCPU})
"""Switched for the whole VM with CONTROL_VM_EVENTS; the others per vCPU, with CONTROL_EVENTS."""

ALWAYS_ALLOWED = frozenset({Command.GET_VERSION, Command.CHECK_COMMAND, Command.CHECK_EVENT})
"""What a session may do before anything was allowed."""

CHANGES_THE_GUEST = frozenset(
    {Command.SET_REGISTERS, Command.WRITE_PHYSICAL, Command.INJECT_EXCEPTION, Command.SET_PAGE_ACCESS}
)
"""Commands that a session hooked with the OBSERVE flag cannot be allowed."""

_COMMANDS = {int(c): c.name.lower().replace("_", "-") for c in Command}
_EVENTS = {int(e): e.name.lower().replace("_", "-") for e in EventId}
_EVENTS[13] = "cpuid"  # dialect v7's; no EventId, which are v6's


def command_name(command: int) -> str:
    """The name people type and read: ``get-registers``; ``command-61`` for an id that is not in the table."""
    return _COMMANDS.get(command, f"command-{command}")


def event_name(event: int) -> str:
    """The name people type and read: ``create-vcpu``; ``event-14`` for an id that is not in the table."""
    return _EVENTS.get(event, f"event-{event}")
