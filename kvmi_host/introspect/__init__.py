# SPDX-License-Identifier: LGPL-2.1-or-later
"""The introspector: VMs with their vCPUs, memory and events, over a session with the kernel; and how to come by one.

======================================================  ===========================================================
``vm``, ``async_vm``, ``interests``, ``handlers``       what programs use, blocking and for asyncio
``watch``, ``breakpoints``, ``holding``, ``memory``,    how it is done, written once: as ``plans``, which do no I/O
``paging``, ``facts``
``session``, ``async_session``, ``batch``,              commands, events and replies over a socket
``roundtrip``
``listener``, ``async_listener``, ``greeting``          VMs that announce themselves
======================================================  ===========================================================

The twins for asyncio are not imported here: asyncio loads much that a blocking session never needs.
"""

from kvmi_host.introspect.errors import SessionClosed, SessionError, SessionTimeout
from kvmi_host.introspect.facts import Facts
from kvmi_host.introspect.interests import (
    BREAKPOINTS,
    CR0,
    CR3,
    CR4,
    CREATE_VCPU,
    DESCRIPTORS,
    HYPERCALL,
    PAUSE,
    SINGLESTEP,
    TRAPS,
    XSETBV,
    Breakpoint,
    ControlRegister,
    Interest,
    Kind,
    Msr,
    PageWatch,
)
from kvmi_host.introspect.ledger import SeqLedger
from kvmi_host.introspect.listener import Listener
from kvmi_host.introspect.paging import NotMapped, PageTables, Translation
from kvmi_host.introspect.session import PeerInfo, Session, Tap
from kvmi_host.introspect.vm import Memory, Vcpu, Vm
from kvmi_host.introspect.watch import WatchedEvent

__all__ = [
    "BREAKPOINTS",
    "CR0",
    "CR3",
    "CR4",
    "CREATE_VCPU",
    "DESCRIPTORS",
    "HYPERCALL",
    "PAUSE",
    "SINGLESTEP",
    "TRAPS",
    "XSETBV",
    "Breakpoint",
    "ControlRegister",
    "Facts",
    "Interest",
    "Kind",
    "Listener",
    "Memory",
    "Msr",
    "NotMapped",
    "PageTables",
    "PageWatch",
    "PeerInfo",
    "SeqLedger",
    "Session",
    "SessionClosed",
    "SessionError",
    "SessionTimeout",
    "Tap",
    "Translation",
    "Vcpu",
    "Vm",
    "WatchedEvent",
]
