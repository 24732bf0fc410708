# SPDX-License-Identifier: LGPL-2.1-or-later
"""Introspection of KVM guests: the host side of KVMI, in Python.

:func:`attach` is where most programs begin::

    with kvmi_host.attach("webserver") as vm:
        for event in vm.events(kvmi_host.CR3):
            print(event.vcpu, event.mode, event.data)

The folders are the parts: :mod:`kvmi_host.protocol` is the wire, without I/O; :mod:`kvmi_host.introspect` is VMs, and
sessions over a socket; :mod:`kvmi_host.attach` gives a running VM's session to an introspector;
:mod:`kvmi_host.recording` keeps what was said; :mod:`kvmi_host.agent` is the daemon; :mod:`kvmi_host.provision` makes
guests through libvirt; :mod:`kvmi_host.cli` is the ``kvmi-host`` command. :mod:`kvmi_host.aio` attaches for asyncio.
"""

from kvmi_host.attach import attach
from kvmi_host.introspect import (
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
    Msr,
    PageWatch,
    Vm,
    WatchedEvent,
)
from kvmi_host.protocol import Access, Action, KvmiError

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
    "Access",
    "Action",
    "Breakpoint",
    "KvmiError",
    "Msr",
    "PageWatch",
    "Vm",
    "WatchedEvent",
    "attach",
]

__version__ = "0.1.0"
