# SPDX-License-Identifier: LGPL-2.1-or-later
"""The x86 state that KVMI carries. Layouts are those of the KVM API, ``<linux/kvm.h>`` and ``<asm/kvm.h>``."""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import NamedTuple


class MemoryType(IntEnum):
    """Memory types, as MTRRs encode them."""

    UNCACHEABLE = 0
    WRITE_COMBINING = 1
    WRITE_THROUGH = 4
    WRITE_PROTECTED = 5
    WRITE_BACK = 6


class Registers(NamedTuple):
    """``struct kvm_regs``: 18 times u64, 144 bytes."""

    rax: int
    rbx: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    rsp: int
    rbp: int
    r8: int
    r9: int
    r10: int
    r11: int
    r12: int
    r13: int
    r14: int
    r15: int
    rip: int
    rflags: int


class Segment(NamedTuple):
    """``struct kvm_segment``, 24 bytes. The flag fields are 0 or 1, ``type`` is 4 bits and ``dpl`` 2."""

    base: int
    limit: int
    selector: int
    type: int
    present: int
    dpl: int
    db: int
    s: int
    l: int  # noqa: E741 - the name that the KVM API and the processor manuals give it
    g: int
    avl: int
    unusable: int


class DescriptorTable(NamedTuple):
    """``struct kvm_dtable``, 16 bytes: where the GDT or IDT lies and its last valid byte."""

    base: int
    limit: int


class SpecialRegisters(NamedTuple):
    """``struct kvm_sregs``, 312 bytes. ``interrupt_bitmap`` is four times u64."""

    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: DescriptorTable
    idt: DescriptorTable
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int
    interrupt_bitmap: tuple[int, int, int, int]


class Msrs(NamedTuple):
    """The nine MSRs that every event carries, 72 bytes. ``shadow_gs`` is MSR_KERNEL_GS_BASE."""

    sysenter_cs: int
    sysenter_esp: int
    sysenter_eip: int
    efer: int
    star: int
    lstar: int
    cstar: int
    pat: int
    shadow_gs: int


REGISTERS = Struct("<18Q")
SEGMENT = Struct("<QIH9Bx")
TABLE = Struct("<QH6x")
CONTROL = Struct("<7Q4Q")
MSRS = Struct("<9Q")

XSAVE_SIZE = 4096
"""``struct kvm_xsave``."""

SREGS_SIZE = 8 * SEGMENT.size + 2 * TABLE.size + CONTROL.size


def unpack_registers(data: bytes, offset: int = 0) -> Registers:
    """The ``kvm_regs`` at `offset`, which must have its 144 bytes there."""
    return Registers._make(REGISTERS.unpack_from(data, offset))


def unpack_sregs(data: bytes, offset: int = 0) -> SpecialRegisters:
    """The ``kvm_sregs`` at `offset`, which must have its 312 bytes there."""
    tables_at = offset + 8 * SEGMENT.size
    control_at = tables_at + 2 * TABLE.size
    segments = [Segment._make(SEGMENT.unpack_from(data, at)) for at in range(offset, tables_at, SEGMENT.size)]
    tables = [DescriptorTable._make(TABLE.unpack_from(data, at)) for at in range(tables_at, control_at, TABLE.size)]
    control = CONTROL.unpack_from(data, control_at)
    return SpecialRegisters._make((*segments, *tables, *control[:7], control[7:]))


def unpack_msrs(data: bytes, offset: int = 0) -> Msrs:
    """The nine MSR values at `offset`, which must have their 72 bytes there."""
    return Msrs._make(MSRS.unpack_from(data, offset))


# EFER.LMA, CR0.PE, CS.L, CS.D/B -> operand size in bytes; None: the bit does not matter.
_MODES: tuple[tuple[int, int | None, int | None, int | None, int], ...] = (
    (1, None, 1, None, 8),
    (1, None, 0, 0, 2),
    (1, None, 0, 1, 4),
    (0, 1, None, 0, 2),
    (0, 1, None, 1, 4),
    (0, 0, None, 0, 2),
    (0, 0, None, 1, 4),  # "big real mode"
)

_EFER_LMA = 1 << 10
_CR0_PE = 1


def operand_size(sregs: SpecialRegisters) -> int:
    """The mode that the kernel reports for a vCPU in this state: 2, 4 or 8, its operand size in bytes."""
    state = (bool(sregs.efer & _EFER_LMA), bool(sregs.cr0 & _CR0_PE), sregs.cs.l, sregs.cs.db)
    for *bits, size in _MODES:
        if all(want is None or want == have for want, have in zip(bits, state, strict=True)):
            return size
    raise ValueError(f"CS.L and CS.D/B are one bit each, not {sregs.cs.l} and {sregs.cs.db}")
