# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest's page tables: from a linear address to a physical one, as the CPU would find it.

Formats (Intel SDM, volume 3, chapter 4; AMD APM, volume 2, chapter 5)::

    format     levels  entry    taken when
    none       0       -        CR0.PG = 0
    32-bit     2       4 bytes  CR4.PAE = 0; 4 MiB pages if CR4.PSE
    PAE        3       8 bytes  CR4.PAE = 1, EFER.LMA = 0
    4-level    4       8 bytes  EFER.LMA = 1
    5-level    5       8 bytes  EFER.LMA = 1, CR4.LA57 = 1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kvmi_host.introspect.plans import Plan, ask
from kvmi_host.protocol import KvmiError, SpecialRegisters, messages

_CR0_PG = 1 << 31
_CR4_PSE, _CR4_PAE, _CR4_LA57 = 1 << 4, 1 << 5, 1 << 12
_EFER_LMA = 1 << 10

_PRESENT, _WRITABLE, _USER, _LARGE = 1 << 0, 1 << 1, 1 << 2, 1 << 7
_NO_EXECUTE = 1 << 63
_FRAME = 0x000F_FFFF_FFFF_F000
_LINEAR_32 = 0xFFFF_FFFF


class Translation(NamedTuple):
    """Where a linear address leads.

    :ivar gpa: the physical address.
    :ivar page_size: of the page that it is in, in bytes; 0 without paging.
    :ivar writable: whether all entries on the way say so; likewise ``user`` and ``executable``.
    """

    gpa: int
    page_size: int
    writable: bool
    user: bool
    executable: bool


class NotMapped(KvmiError):
    """A linear address leads nowhere.

    :ivar gva: the address.
    :ivar level: of the entry that is not present, 1 for the last one; 0: the address is not canonical.
    """

    def __init__(self, gva: int, level: int) -> None:
        where = f"its entry of level {level} is not present" if level else "it is not canonical"
        super().__init__(f"the guest's page tables have nothing at {gva:#x}: {where}")
        self.gva = gva
        self.level = level


@dataclass(frozen=True, slots=True)
class PageTables:
    """One set of page tables: where it begins, and its format.

    :ivar root: physical address of the first table.
    :ivar levels: 0 without paging.
    :ivar entry_size: in bytes.
    :ivar large: of the levels that may map a page by themselves, besides 1.
    """

    root: int
    levels: int
    entry_size: int
    large: frozenset[int]

    @classmethod
    def of(cls, sregs: SpecialRegisters, cr3: int | None = None) -> PageTables:
        """Those that a vCPU in this state uses.

        :param cr3: the root of others of the same format: another process's.
        """
        root = sregs.cr3 if cr3 is None else cr3
        if not sregs.cr0 & _CR0_PG:
            return cls(0, 0, 0, frozenset())
        if sregs.efer & _EFER_LMA:
            levels = 5 if sregs.cr4 & _CR4_LA57 else 4
            return cls(root & _FRAME, levels, 8, frozenset({2, 3}))
        if sregs.cr4 & _CR4_PAE:
            return cls(root & 0xFFFF_FFE0, 3, 8, frozenset({2}))
        return cls(root & 0xFFFF_F000, 2, 4, frozenset({2} if sregs.cr4 & _CR4_PSE else ()))

    @property
    def index_bits(self) -> int:
        """How many bits of an address choose an entry of a table."""
        return 9 if self.entry_size == 8 else 10

    @property
    def linear_bits(self) -> int:
        """How many bits of an address are looked at."""
        return 12 + self.levels * self.index_bits if self.levels > 3 else 32


def walk(tables: PageTables, gva: int) -> Plan[Translation]:
    """Look an address up.

    :raise NotMapped: it leads nowhere.
    """
    if not tables.levels:
        return Translation(gva & _LINEAR_32, 0, True, True, True)
    bits = tables.linear_bits
    if bits > 32 and (gva >> (bits - 1)) not in (0, (1 << (65 - bits)) - 1):
        raise NotMapped(gva, 0)
    table, index_bits = tables.root, tables.index_bits
    allowed, executable = _WRITABLE | _USER, True
    linear = gva & ((1 << bits) - 1)
    for level in range(tables.levels, 0, -1):
        shift = 12 + (level - 1) * index_bits
        at = table + (linear >> shift & ((1 << index_bits) - 1)) * tables.entry_size
        entry = int.from_bytes((yield from ask(messages.read_physical(at, tables.entry_size))), "little")
        if not entry & _PRESENT:
            raise NotMapped(gva, level)
        # The first entries of PAE say nothing but where the next table is.
        if not (tables.levels == 3 and level == 3):
            allowed &= entry
            executable &= not entry & _NO_EXECUTE
        if level == 1 or (level in tables.large and entry & _LARGE):
            size = 1 << shift
            frame = _frame(tables, entry, level) & -size
            return Translation(
                frame + linear % size, size, bool(allowed & _WRITABLE), bool(allowed & _USER), executable
            )
        table = entry & _FRAME
    raise AssertionError("level 1 returns")


def _frame(tables: PageTables, entry: int, level: int) -> int:
    frame = entry & _FRAME
    if tables.entry_size == 4 and level == 2:
        # PSE-36: bits 13 to 20 are the address's 32 to 39.
        frame |= (entry >> 13 & 0xFF) << 32
    return frame
