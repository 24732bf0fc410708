# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events: what a vCPU tells before it waits for the reply, and the reply.

An event's body is ``struct kvmi_event`` (544 bytes; a newer kernel may send more, its first field says how much) and
then the event's own data. Nothing is decoded until it is read::

    offset  0 u16 size     8 u8 mode          160 kvm_sregs
            2 u16 vcpu    16 kvm_regs         472 u64 msrs[9]
            4 u8  event                       544 (or size) own data
"""

from __future__ import annotations

from collections.abc import Mapping
from struct import Struct
from typing import ClassVar, NamedTuple

from kvmi_host.protocol.errors import ProtocolError
from kvmi_host.protocol.ids import Action, EventId, event_name
from kvmi_host.protocol.x86 import (
    Msrs,
    Registers,
    SpecialRegisters,
    unpack_msrs,
    unpack_registers,
    unpack_sregs,
)

EVENT_SIZE = 544
_REGS_AT, _SREGS_AT, _MSRS_AT = 16, 160, 472
_SIZE = Struct("<H")
_VCPU = Struct("<2xH")
_RIP = Struct(f"<{_REGS_AT + 16 * 8}xQ")
_CR3 = Struct(f"<{_SREGS_AT + 224 + 2 * 8}xQ")
COMMON_FIELDS = ((2, "size"), (4, "vcpu"), (5, "event"), (9, "mode"), (160, "regs"), (472, "sregs"), (544, "msrs"))
"""Where each field of the common part ends, to name what a short event lacks."""


class CrWrite(NamedTuple):
    """A control register (0, 3 or 4) is about to change from ``old`` to ``new``."""

    cr: int
    old: int
    new: int


class MsrWrite(NamedTuple):
    """A model specific register is about to change from ``old`` to ``new``."""

    msr: int
    old: int
    new: int


class BreakpointHit(NamedTuple):
    """An INT3 of ``insn_len`` bytes was executed; ``gpa`` is where the instruction lies in guest memory."""

    gpa: int
    insn_len: int


class PageFault(NamedTuple):
    """The guest touched a watched page; ``access`` is what of :class:`~kvmi_host.protocol.ids.Access` it tried."""

    gva: int
    gpa: int
    access: int
    view: int


class Trap(NamedTuple):
    """An exception that was asked for is about to be delivered, or another one in its place.

    ``type`` is VMX's: 3 for a hardware exception, 6 for a software exception (#BP and #OF).
    """

    vector: int
    type: int
    error_code: int
    cr2: int


class TrapV7(NamedTuple):
    """The same as dialect v7 tells it: without the type."""

    vector: int
    error_code: int
    cr2: int


class SingleStep(NamedTuple):
    """An instruction was stepped over, in dialect v7. ``failed``: 1 if it could not be."""

    failed: int


class DescriptorAccess(NamedTuple):
    """A register of a descriptor table (see :class:`~kvmi_host.protocol.ids.Descriptor`) is about to be read (``write``
    0) or written (1)."""

    descriptor: int
    write: int


OwnData = CrWrite | MsrWrite | BreakpointHit | PageFault | Trap | TrapV7 | SingleStep | DescriptorAccess


class Layout(NamedTuple):
    """How an event's own data is read, and where each of its fields ends."""

    struct: Struct
    type: type[OwnData]
    ends: tuple[int, ...]


OWN: Mapping[int, Layout] = {
    EventId.CR: Layout(Struct("<H6xQQ"), CrWrite, (2, 16, 24)),
    EventId.MSR: Layout(Struct("<I4xQQ"), MsrWrite, (4, 16, 24)),
    EventId.BREAKPOINT: Layout(Struct("<QB"), BreakpointHit, (8, 9)),
    EventId.PF: Layout(Struct("<QQBxH"), PageFault, (8, 16, 17, 20)),
    EventId.TRAP: Layout(Struct("<III4xQ"), Trap, (4, 8, 12, 24)),
    EventId.DESCRIPTOR: Layout(Struct("<BB"), DescriptorAccess, (1, 2)),
}
_KINDS = {int(e): e for e in EventId}


class Event:
    """One event. Immutable; fields are decoded from its bytes when they are read.

    A dialect that lays out events otherwise has a subclass, with tables of its own in place of these two.

    :ivar seq: the event's number in the session: counts from 1 over all vCPUs, wraps at 2**32.
    """

    __slots__ = ("_body", "_layout", "seq")
    layouts: ClassVar[Mapping[int, Layout]] = OWN
    common: ClassVar[tuple[tuple[int, str], ...]] = COMMON_FIELDS

    def __init__(self, seq: int, body: bytes) -> None:
        """
        :param body: the message's payload: ``kvmi_event`` and the event's own data.
        :raise ProtocolError: the body ends before a field that this kind of event has.
        """
        if len(body) < EVENT_SIZE or _SIZE.unpack_from(body)[0] < EVENT_SIZE:
            known = min(len(body), _SIZE.unpack_from(body)[0]) if len(body) >= 2 else len(body)
            missing = next(name for end, name in self.common if end > known)
            raise ProtocolError(f"event {seq}: {known} bytes of kvmi_event, too few for its field {missing!r}")
        layout = self.layouts.get(body[4])
        own = len(body) - _SIZE.unpack_from(body)[0]
        if own < (layout.struct.size if layout else 0):
            fields = zip(layout.ends, layout.type._fields, strict=True) if layout else ()
            missing = next((name for end, name in fields if end > own), "size")
            raise ProtocolError(f"event {seq} ({event_name(body[4])}): ends before its field {missing!r}")
        self.seq = seq
        self._body = body
        self._layout = layout

    @property
    def vcpu(self) -> int:
        """Index of the vCPU that waits; meaningless for the VM's own event UNHOOK."""
        vcpu: int = _VCPU.unpack_from(self._body)[0]
        return vcpu

    @property
    def event(self) -> int:
        """The kind: an :class:`EventId`, or the bare number of a kind that is newer than this library."""
        kind = self._body[4]
        return _KINDS.get(kind, kind)

    @property
    def mode(self) -> int:
        """Operand size of the vCPU in bytes: 2, 4 or 8."""
        return self._body[8]

    @property
    def rip(self) -> int:
        """Instruction pointer."""
        rip: int = _RIP.unpack_from(self._body)[0]
        return rip

    @property
    def cr3(self) -> int:
        """Root of the page tables. In a CR3 event: before the write."""
        cr3: int = _CR3.unpack_from(self._body)[0]
        return cr3

    @property
    def registers(self) -> Registers:
        """General registers at the time of the event."""
        return unpack_registers(self._body, _REGS_AT)

    @property
    def sregs(self) -> SpecialRegisters:
        """Segments, descriptor tables and control registers at the time of the event."""
        return unpack_sregs(self._body, _SREGS_AT)

    @property
    def msrs(self) -> Msrs:
        """The nine MSRs that an event carries."""
        return unpack_msrs(self._body, _MSRS_AT)

    @property
    def data(self) -> OwnData | None:
        """What this kind of event tells besides the vCPU's state; None for kinds that tell nothing more."""
        layout = self._layout
        if layout is None:
            return None
        return layout.type._make(layout.struct.unpack_from(self._body, _SIZE.unpack_from(self._body)[0]))

    def __repr__(self) -> str:
        return f"<Event {self.seq} {event_name(self.event)} vcpu={self.vcpu} mode={self.mode} rip={self.rip:#x}>"


class PageFaultReply(NamedTuple):
    """A reply's own data for a page fault; all zero by default.

    :ivar ctx_addr: guest-virtual address of `ctx_data`, what the emulated instruction shall read there; 256 bytes at
        most.
    :ivar singlestep: let the instruction make its access, and watch the page again afterwards.
    :ivar rep_complete: do not come back before a repeated string instruction is through.
    """

    ctx_addr: int = 0
    ctx_data: bytes = b""
    singlestep: bool = False
    rep_complete: bool = False


_REPLY = Struct("<H6xBB6x")
_NEW_VALUE = Struct("<Q")
_PAGE_FAULT_REPLY = Struct("<QIBB2x256s")
_MAX_CONTEXT = 256


def encode_reply(
    event: Event,
    action: int = Action.CONTINUE,
    new_val: int | None = None,
    page_fault: PageFaultReply | None = None,
) -> bytes:
    """The payload of the reply to `event`: ``kvmi_vcpu_hdr``, ``kvmi_event_reply``, and its own data.

    :param new_val: for CR and MSR, what to write instead of the guest's value; by default the guest's own, because
        the kernel takes a missing value for zero.
    :param page_fault: for PF.
    :raise ValueError: the event has no reply (UNHOOK), own data is given for a kind that takes none, or there is too
        much of it.
    """
    kind = event.event
    if kind == EventId.UNHOOK:
        raise ValueError("UNHOOK has no reply")
    reply = _REPLY.pack(event.vcpu, action, kind)
    data = event.data
    if isinstance(data, CrWrite | MsrWrite):
        return reply + _NEW_VALUE.pack(data.new if new_val is None else new_val)
    if new_val is not None:
        raise ValueError(f"a {event_name(kind)} event takes no new value")
    if page_fault is None:
        return reply
    if kind != EventId.PF:
        raise ValueError(f"a {event_name(kind)} event is no page fault")
    size = len(page_fault.ctx_data)
    if size > _MAX_CONTEXT:
        raise ValueError(f"{size} bytes of context are more than the {_MAX_CONTEXT} that a reply holds")
    address, context, singlestep, rep_complete = page_fault
    return reply + _PAGE_FAULT_REPLY.pack(address, size, singlestep, rep_complete, context)
