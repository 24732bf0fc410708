# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events: what a vCPU tells before it waits for the reply, and the reply.

An event's body is ``struct kvmi_event`` (544 bytes; a newer kernel may send more, its first field says how much) and
then the event's own data. What says how to read it is decoded at once, the rest when it is read::

    offset  0 u16 size     8 u8 mode          160 kvm_sregs
            2 u16 vcpu    16 kvm_regs         472 u64 msrs[9]
            4 u8  event                       544 (or size) own data
"""

from __future__ import annotations

from collections.abc import Mapping
from struct import Struct
from typing import ClassVar, NamedTuple, Self

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
_HEAD = Struct("<HHB3xB")  # size, vcpu, event, mode
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


def own_sizes(layouts: Mapping[int, Layout]) -> tuple[int, ...]:
    """How long an event's own data is at least, by its kind, which is a byte."""
    return tuple(layouts[kind].struct.size if kind in layouts else 0 for kind in range(256))


_KINDS = tuple(EventId(kind) if kind in set(EventId) else kind for kind in range(256))
_new_tuple = tuple.__new__


class _Fields(NamedTuple):
    seq: int
    vcpu: int
    event: int
    mode: int
    body: bytes


class Event(_Fields):
    """One event. Immutable; a tuple, because nothing is made and read faster.

    A dialect that lays out events otherwise has a subclass, with tables of its own in place of these.

    :ivar seq: the event's number in the session: counts from 1 over all vCPUs, wraps at 2**32.
    :ivar vcpu: index of the vCPU that waits; meaningless for the VM's own event UNHOOK.
    :ivar event: the kind: an :class:`EventId`, or the bare number of a kind that is newer than this library.
    :ivar mode: operand size of the vCPU in bytes: 2, 4 or 8.
    :ivar body: the message's payload, from which the other fields are decoded when they are read.
    """

    __slots__ = ()
    layouts: ClassVar[Mapping[int, Layout]] = OWN
    common: ClassVar[tuple[tuple[int, str], ...]] = COMMON_FIELDS
    own_sizes: ClassVar[tuple[int, ...]] = own_sizes(OWN)

    def __new__(cls, seq: int, body: bytes) -> Self:
        """
        :param body: the message's payload: ``kvmi_event`` and the event's own data.
        :raise ProtocolError: the body ends before a field that this kind of event has.
        """
        length = len(body)
        if length < EVENT_SIZE:
            raise _too_short(cls, seq, body)
        size, vcpu, kind, mode = _HEAD.unpack_from(body)
        if size < EVENT_SIZE or length - size < cls.own_sizes[kind]:
            raise _too_short(cls, seq, body)
        return _new_tuple(cls, (seq, vcpu, _KINDS[kind], mode, body))

    def __reduce__(self) -> tuple[type[Event], tuple[int, bytes]]:
        return type(self), (self.seq, self.body)

    @property
    def rip(self) -> int:
        """Instruction pointer."""
        rip: int = _RIP.unpack_from(self.body)[0]
        return rip

    @property
    def cr3(self) -> int:
        """Root of the page tables. In a CR3 event: before the write."""
        cr3: int = _CR3.unpack_from(self.body)[0]
        return cr3

    @property
    def registers(self) -> Registers:
        """General registers at the time of the event."""
        return unpack_registers(self.body, _REGS_AT)

    @property
    def sregs(self) -> SpecialRegisters:
        """Segments, descriptor tables and control registers at the time of the event."""
        return unpack_sregs(self.body, _SREGS_AT)

    @property
    def msrs(self) -> Msrs:
        """The nine MSRs that an event carries."""
        return unpack_msrs(self.body, _MSRS_AT)

    @property
    def data(self) -> OwnData | None:
        """What this kind of event tells besides the vCPU's state; None for kinds that tell nothing more."""
        layout = self.layouts.get(self.body[4])
        if layout is None:
            return None
        return layout.type._make(layout.struct.unpack_from(self.body, _SIZE.unpack_from(self.body)[0]))

    def __repr__(self) -> str:
        return f"<Event {self.seq} {event_name(self.event)} vcpu={self.vcpu} mode={self.mode} rip={self.rip:#x}>"


def _too_short(kind: type[Event], seq: int, body: bytes) -> ProtocolError:
    """Names the first field that is missing in a body that :class:`Event` did not take."""
    size: int = _SIZE.unpack_from(body)[0] if len(body) >= _SIZE.size else len(body)
    known = min(len(body), size)
    if known < EVENT_SIZE:
        missing = next(name for end, name in kind.common if end > known)
        return ProtocolError(f"event {seq}: {known} bytes of kvmi_event, too few for its field {missing!r}")
    layout = kind.layouts.get(body[4])
    fields = zip(layout.ends, layout.type._fields, strict=True) if layout else ()
    missing = next((name for end, name in fields if end > len(body) - size), "size")
    return ProtocolError(f"event {seq} ({event_name(body[4])}): ends before its field {missing!r}")


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


class Reply(NamedTuple):
    """The answer to an event, as :func:`encode_reply` takes it, that was not sent yet."""

    event: Event
    action: int = Action.CONTINUE
    new_val: int | None = None
    page_fault: PageFaultReply | None = None


_REPLY = Struct("<H6xBB6x")
_VALUE_REPLY = Struct("<H6xBB6xQ")
_HAVE_NEW_VALUE = frozenset({EventId.CR, EventId.MSR})
_NEW_VALUE_AT = 16  # in the own data of either
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
    _, vcpu, kind, _, body = event
    if kind in _HAVE_NEW_VALUE:
        if new_val is not None:
            return _VALUE_REPLY.pack(vcpu, action, kind, new_val)
        new_at = _SIZE.unpack_from(body)[0] + _NEW_VALUE_AT
        return _REPLY.pack(vcpu, action, kind) + body[new_at : new_at + 8]
    if kind == EventId.UNHOOK:
        raise ValueError("UNHOOK has no reply")
    reply = _REPLY.pack(vcpu, action, kind)
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
