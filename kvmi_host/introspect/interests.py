# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an introspector can be interested in: values that say which events to watch.

The kernel filters as far as it can: by control register, MSR and page. What is left is told apart here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvmi_host.protocol import (
    Access,
    BreakpointHit,
    CrWrite,
    Event,
    EventId,
    MsrWrite,
    PageFault,
    Request,
    event_name,
    messages,
    msr_index,
)
from kvmi_host.protocol.messages import PAGE_SIZE


class Interest(Protocol):
    """Something to watch."""

    @property
    def event(self) -> int:
        """The kind of its events."""

    def switch(self, vcpu: int, enable: bool) -> Sequence[Request[None]]:
        """What a vCPU has to be told besides that events of the kind are wanted."""

    def matches(self, event: Event) -> bool:
        """Whether an event of the kind is one of these."""


@dataclass(frozen=True, slots=True)
class Kind:
    """All events of one kind.

    :ivar event: an :class:`EventId`; PAUSE_VCPU: each vCPU is paused once, when it is first watched.
    """

    event: int

    def switch(self, vcpu: int, enable: bool) -> Sequence[Request[None]]:
        if self.event == EventId.PAUSE_VCPU and enable:
            return [messages.pause_vcpu(vcpu)]
        return ()

    def matches(self, event: Event) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class ControlRegister:
    """Writes that change control register 0, 3 or 4."""

    number: int

    @property
    def event(self) -> int:
        return EventId.CR

    def switch(self, vcpu: int, enable: bool) -> Sequence[Request[None]]:
        return [messages.control_cr(vcpu, self.number, enable)]

    def matches(self, event: Event) -> bool:
        data = event.data
        return isinstance(data, CrWrite) and data.cr == self.number


@dataclass(frozen=True, slots=True)
class Msr:
    """Writes that change an MSR: ``Msr("lstar")``, ``Msr(0xC0000082)``.

    :ivar register: its index; made from its name where that is given.
    """

    register: int | str

    def __post_init__(self) -> None:
        """
        :raise ValueError: there is no such MSR, or its writes cannot be watched.
        """
        object.__setattr__(self, "register", msr_index(str(self.register)))

    @property
    def event(self) -> int:
        return EventId.MSR

    def switch(self, vcpu: int, enable: bool) -> Sequence[Request[None]]:
        assert isinstance(self.register, int)
        return [messages.control_msr(vcpu, self.register, enable)]

    def matches(self, event: Event) -> bool:
        data = event.data
        return isinstance(data, MsrWrite) and data.msr == self.register


@dataclass(frozen=True, slots=True)
class Breakpoint:
    """An instruction that the guest is about to execute. It is executed once the event is answered.

    :ivar address: linear, as vCPU 0 sees it when the watching begins.
    :ivar physical: the address is a physical one.
    :ivar cr3: the address is of this process: the root of its page tables.
    """

    address: int
    physical: bool = False
    cr3: int | None = None

    @property
    def event(self) -> int:
        return EventId.BREAKPOINT

    def switch(self, vcpu: int, enable: bool) -> Sequence[Request[None]]:
        return ()

    def matches(self, event: Event) -> bool:
        if self.physical:
            data = event.data
            return isinstance(data, BreakpointHit) and data.gpa == self.address
        # The lowest bits of CR3 are flags, or a process-context identifier.
        same_process = self.cr3 is None or event.cr3 // PAGE_SIZE == self.cr3 // PAGE_SIZE
        return event.rip == self.address and same_process


@dataclass(frozen=True, slots=True)
class PageWatch:
    """Accesses to the page at a physical address. They are made once the event is answered.

    :ivar gpa: an address in the page.
    :ivar access: which accesses. CPUs cannot forbid reads alone: those that are not asked for go on by themselves.
    """

    gpa: int
    access: Access = Access.W

    @property
    def event(self) -> int:
        return EventId.PF

    @property
    def allowed(self) -> Access:
        """What the guest may go on to do without an event."""
        return Access.NONE if self.access & Access.R else Access.ALL & ~self.access

    def switch(self, vcpu: int, enable: bool) -> Sequence[Request[None]]:
        return ()

    def matches(self, event: Event) -> bool:
        data = event.data
        if not isinstance(data, PageFault):
            return False
        return data.gpa // PAGE_SIZE == self.gpa // PAGE_SIZE and bool(data.access & self.access)


CR0 = ControlRegister(0)
CR3 = ControlRegister(3)
CR4 = ControlRegister(4)
XSETBV = Kind(EventId.XSETBV)
BREAKPOINTS = Kind(EventId.BREAKPOINT)
"""Every breakpoint, those of the guest's own debuggers too: they have it once the event is answered."""
HYPERCALL = Kind(EventId.HYPERCALL)
TRAPS = Kind(EventId.TRAP)
DESCRIPTORS = Kind(EventId.DESCRIPTOR)
CREATE_VCPU = Kind(EventId.CREATE_VCPU)
PAUSE = Kind(EventId.PAUSE_VCPU)
SINGLESTEP = Kind(EventId.SINGLESTEP)
"""Every instruction."""

_CONTROL_REGISTERS = {"cr0": (CR0,), "cr3": (CR3,), "cr4": (CR4,), "cr": (CR0, CR3, CR4)}
_KINDS = {event_name(number): Kind(number) for number in EventId} | {"pause": PAUSE}

NAMES = (*_CONTROL_REGISTERS, *(name for name in _KINDS if name != event_name(EventId.MSR)))
"""What :func:`parse` takes, but for what has more after a colon."""


def parse(name: str) -> Sequence[Interest]:
    """What a name stands for: an event's (``hypercall``), ``cr3``, ``cr`` (all three), ``msr:lstar``,
    ``msr:0xc0000082``, ``breakpoint:0xffffffff81000000``, ``page:0x1000`` (writes), ``page:0x1000:rwx``, ``pause``.

    :raise ValueError: nothing, and why.
    """
    word, _, rest = name.lower().replace("_", "-").partition(":")
    if rest:
        if word == "msr":
            return (Msr(rest),)
        if word == "breakpoint":
            return (Breakpoint(_number(rest, name)),)
        if word == "page":
            gpa, _, access = rest.partition(":")
            return (PageWatch(_number(gpa, name), _access(access or "w", name)),)
    elif word in _CONTROL_REGISTERS:
        return _CONTROL_REGISTERS[word]
    elif word == event_name(EventId.MSR):
        raise ValueError("which MSR? As in msr:lstar, msr:0xc0000082")
    elif word in _KINDS:
        return (_KINDS[word],)
    known = ", ".join([*_CONTROL_REGISTERS, "msr:NAME", "breakpoint:ADDRESS", "page:ADDRESS[:rwx]", *_KINDS])
    raise ValueError(f"no event is called {name!r}; there are {known}")


def _number(text: str, name: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise ValueError(f"{name!r}: {text!r} is no address") from None


def _access(text: str, name: str) -> Access:
    if not text or set(text) - set("rwx"):
        raise ValueError(f"{name!r}: {text!r} is no access: one or more of r, w and x")
    return Access(sum(Access[letter.upper()] for letter in set(text)))
