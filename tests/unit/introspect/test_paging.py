# SPDX-License-Identifier: LGPL-2.1-or-later
"""Walks through page tables that the test lays out itself, in every format, and the addresses that lead nowhere."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmi_host.introspect.paging import NotMapped, PageTables, Translation, walk
from kvmi_host.protocol import SpecialRegisters, x86

PRESENT, WRITABLE, USER, LARGE, NO_EXECUTE = 1, 2, 4, 0x80, 1 << 63
PG, PSE, PAE, LA57, LMA = 1 << 31, 1 << 4, 1 << 5, 1 << 12, 1 << 10

FORMATS = {
    # name: cr0, cr4, efer; index bits of each level from the top; page sizes
    "32-bit": (PG, 0, 0, (10, 10), (12,)),
    "32-bit with large pages": (PG, PSE, 0, (10, 10), (12, 22)),
    "PAE": (PG, PAE, 0, (2, 9, 9), (12, 21)),
    "4-level": (PG, PAE, LMA, (9, 9, 9, 9), (12, 21, 30)),
    "5-level": (PG, PAE | LA57, LMA, (9, 9, 9, 9, 9), (12, 21, 30)),
}


def state(cr0: int = 0, cr4: int = 0, efer: int = 0, cr3: int = 0) -> SpecialRegisters:
    """Of a vCPU, all else zero."""
    return x86.unpack_sregs(bytes(x86.SREGS_SIZE))._replace(cr0=cr0, cr3=cr3, cr4=cr4, efer=efer)


@dataclass
class Memory:
    """Physical memory that holds page tables only: entries by their address."""

    entry_size: int = 8
    entries: dict[int, int] = field(default_factory=dict)
    free: int = 0x10_0000

    def table(self) -> int:
        """A table, empty."""
        self.free += 0x1000
        return self.free

    def look_up(self, tables: PageTables, gva: int) -> Translation:
        """Drive a walk, as a session would."""
        walking = walk(tables, gva)
        (request,) = next(walking)
        while True:
            gpa, size = struct.unpack("<QQ", request.payload)
            assert size == self.entry_size
            try:
                (request,) = walking.send([self.entries.get(gpa, 0).to_bytes(size, "little")])
            except StopIteration as end:
                result: Translation = end.value
                return result


def mapped(indices: tuple[int, ...], entry_size: int, last: int, flags: int = WRITABLE | USER) -> tuple[Memory, int]:
    """Tables with one way through them, which ends in the entry `last`; and where they begin."""
    memory = Memory(entry_size)
    root = table = memory.table()
    for index in indices[:-1]:
        below = memory.table()
        memory.entries[table + index * entry_size] = below | PRESENT | flags
        table = below
    memory.entries[table + indices[-1] * entry_size] = last
    return memory, root


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
def test_every_format_leads_where_its_tables_say(name: str, data: st.DataObject) -> None:
    cr0, cr4, efer, widths, shifts = FORMATS[name]
    shift = data.draw(st.sampled_from(shifts))
    bits = sum(widths) + 12
    linear = data.draw(st.integers(0, (1 << bits) - 1))
    gva = linear | (-1 << bits & (1 << 64) - 1 if bits > 32 and linear >> (bits - 1) else 0)
    entry_size = 4 if widths[0] == 10 else 8
    below, indices = bits, []
    for width in widths:
        below -= width
        indices.append(linear >> below & ((1 << width) - 1))
        if below == shift:
            break
    frame = data.draw(st.integers(0, (1 << (20 if entry_size == 4 else 40)) - 1)) << 12 & -1 << shift
    flags = data.draw(st.sampled_from([0, WRITABLE, USER, WRITABLE | USER]))
    memory, root = mapped(tuple(indices), entry_size, frame | PRESENT | flags | (LARGE if shift > 12 else 0))
    tables = PageTables.of(state(cr0, cr4, efer, root))
    found = memory.look_up(tables, gva)
    assert found == Translation(
        gpa=frame | linear & ((1 << shift) - 1),
        page_size=1 << shift,
        writable=bool(flags & WRITABLE),
        user=bool(flags & USER),
        executable=True,
    )


def test_without_paging_an_address_is_physical() -> None:
    tables = PageTables.of(state())
    with pytest.raises(StopIteration) as end:
        next(walk(tables, 0x1_2345_6789))
    assert end.value.value == Translation(0x2345_6789, 0, True, True, True)


def test_a_4_mib_page_may_lie_beyond_4_gib() -> None:
    last = 0x00C0_0000 | 0x5A << 13 | LARGE | PRESENT
    memory, root = mapped((1,), 4, last)
    found = memory.look_up(PageTables.of(state(PG, PSE, 0, root)), 0x0040_1234)
    assert found.gpa == 0x5A_00C0_1234


def test_what_is_forbidden_on_the_way_is_forbidden() -> None:
    memory, root = mapped((0, 0, 0, 0), 8, 0x5000 | PRESENT | WRITABLE | USER, flags=NO_EXECUTE)
    found = memory.look_up(PageTables.of(state(PG, PAE, LMA, root)), 0)
    assert (found.writable, found.user, found.executable) == (False, False, False)


@pytest.mark.parametrize("level", [4, 3, 2, 1])
def test_an_entry_that_is_not_present_is_named(level: int) -> None:
    memory, root = mapped((0,) * (5 - level), 8, 0)
    with pytest.raises(NotMapped, match=f"0x5000: its entry of level {level} ") as error:
        memory.look_up(PageTables.of(state(PG, PAE, LMA, root)), 0x5000)
    assert (error.value.gva, error.value.level) == (0x5000, level)


@pytest.mark.parametrize(("cr4", "gva"), [(PAE, 1 << 47), (PAE, 0x1234 << 48), (PAE | LA57, 1 << 56)])
def test_an_address_that_is_not_canonical_leads_nowhere(cr4: int, gva: int) -> None:
    with pytest.raises(NotMapped, match="not canonical"):
        next(walk(PageTables.of(state(PG, cr4, LMA)), gva))


def test_another_process_has_tables_of_the_same_format() -> None:
    assert PageTables.of(state(PG, PAE, LMA, 0x1000), cr3=0x2FFF).root == 0x2000
