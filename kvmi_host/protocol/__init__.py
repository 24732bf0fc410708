# SPDX-License-Identifier: LGPL-2.1-or-later
"""The KVMI protocol, dialects v6 and v7, without I/O: bytes in, objects out.

:class:`Connection` is the introspector's end of a session; :class:`Framer` and :func:`frame` are the bytes under it;
:mod:`kvmi_host.protocol.messages` has one function per command; :mod:`kvmi_host.protocol.handshake` what comes before.
"""

from kvmi_host.protocol.connection import Answer, Connection, State
from kvmi_host.protocol.dialects import Dialect, EventV7, Features, Version
from kvmi_host.protocol.errors import CommandError, HandshakeError, KvmiError, ProtocolError, UnsupportedDialect
from kvmi_host.protocol.events import (
    BreakpointHit,
    CrWrite,
    DescriptorAccess,
    Event,
    MsrWrite,
    OwnData,
    PageFault,
    PageFaultReply,
    Reply,
    SingleStep,
    Trap,
    TrapV7,
)
from kvmi_host.protocol.framing import MAX_PAYLOAD, Frame, Framer, frame
from kvmi_host.protocol.handshake import Hello
from kvmi_host.protocol.ids import (
    Access,
    Action,
    Command,
    Descriptor,
    ErrorCode,
    EventId,
    command_name,
    event_name,
)
from kvmi_host.protocol.messages import Cpuid, Request, VcpuState
from kvmi_host.protocol.msrs import msr_index, msr_name
from kvmi_host.protocol.x86 import DescriptorTable, MemoryType, Msrs, Registers, Segment, SpecialRegisters, operand_size

__all__ = [
    "MAX_PAYLOAD",
    "Access",
    "Action",
    "Answer",
    "BreakpointHit",
    "Command",
    "CommandError",
    "Connection",
    "Cpuid",
    "CrWrite",
    "Descriptor",
    "DescriptorAccess",
    "DescriptorTable",
    "Dialect",
    "ErrorCode",
    "Event",
    "EventId",
    "EventV7",
    "Features",
    "Frame",
    "Framer",
    "HandshakeError",
    "Hello",
    "KvmiError",
    "MemoryType",
    "MsrWrite",
    "Msrs",
    "OwnData",
    "PageFault",
    "PageFaultReply",
    "ProtocolError",
    "Registers",
    "Reply",
    "Request",
    "Segment",
    "SingleStep",
    "SpecialRegisters",
    "State",
    "Trap",
    "TrapV7",
    "UnsupportedDialect",
    "VcpuState",
    "Version",
    "command_name",
    "event_name",
    "frame",
    "msr_index",
    "msr_name",
    "operand_size",
]
