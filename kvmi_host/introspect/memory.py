# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest's memory, in ranges of any length: of physical addresses, or of linear ones through its page tables.

A command reads or writes within one page. Where a range lies is found first (:data:`Locate`); then its pieces are read
or written, many commands in one go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from kvmi_host.introspect.paging import PageTables, Translation, walk
from kvmi_host.introspect.plans import Plan, ask, ask_all
from kvmi_host.protocol import messages
from kvmi_host.protocol.messages import PAGE_SIZE

_WINDOW = 256 * PAGE_SIZE
"""How much of a range is asked for in one go."""


class Piece(NamedTuple):
    """A part of a range that lies within one page of physical memory."""

    gpa: int
    size: int


Locate = Callable[[int, int], Plan[list[Piece]]]
"""From an address and a size to where that lies."""


def physical(address: int, size: int) -> Plan[list[Piece]]:
    """Physical addresses lie where they say."""
    return list(_split(address, size))
    yield ()  # a plan of no steps


def virtual(tables: Callable[[], Plan[PageTables]]) -> Locate:
    """Linear addresses lie where page tables say.

    :param tables: the plan to find out which.
    """

    def locate(address: int, size: int) -> Plan[list[Piece]]:
        root = yield from tables()
        pieces: list[Piece] = []
        at, end = address, address + size
        while at < end:
            there = yield from walk(root, at)
            length = min(end - at, _left_in_page(there))
            pieces += _split(there.gpa, length)
            at += length
        return pieces

    return locate


def tables_of(vcpu: int, cr3: int | None = None) -> Plan[PageTables]:
    """The page tables that a vCPU uses.

    :param cr3: the root of others of the same format: another process's.
    """
    state = yield from ask(messages.get_registers(vcpu))
    return PageTables.of(state.sregs, cr3)


def translate(vcpu: int, gva: int) -> Plan[Translation]:
    """Where a linear address leads a vCPU.

    :raise NotMapped: nowhere.
    """
    return (yield from walk((yield from tables_of(vcpu)), gva))


def read(locate: Locate, address: int, size: int) -> Plan[bytes]:
    """The bytes of a range.

    :raise ValueError: the size is negative.
    :raise NotMapped: a linear address leads nowhere.
    :raise CommandError: there is no memory.
    """
    parts: list[bytes] = []
    for at, length in _windows(address, size):
        pieces = yield from locate(at, length)
        parts += yield from ask_all([messages.read_physical(*piece) for piece in pieces])
    return b"".join(parts)


def write(locate: Locate, address: int, data: bytes) -> Plan[None]:
    """Write a range.

    :raise NotMapped: a linear address leads nowhere.
    :raise CommandError: there is no memory, or the session may not change the guest.
    """
    for at, length in _windows(address, len(data)):
        pieces = yield from locate(at, length)
        done = at - address
        requests = []
        for gpa, size in pieces:
            requests.append(messages.write_physical(gpa, data[done : done + size]))
            done += size
        yield from ask_all(requests)


def span(key: int | slice) -> tuple[int, int]:
    """The address and size that an index or a slice of a memory stands for.

    :raise ValueError: the slice is not one of whole, rising addresses.
    """
    if not isinstance(key, slice):
        return key, 1
    if key.start is None or key.stop is None or key.step not in (None, 1) or key.stop < key.start:
        raise ValueError(
            "memory is sliced as in memory[0x1000:0x1010]: with a beginning, an end behind it, and no step"
        )
    return key.start, key.stop - key.start


def _windows(address: int, size: int) -> Iterator[tuple[int, int]]:
    if size < 0:
        raise ValueError(f"a range of {size} bytes")
    for at in range(address, address + size, _WINDOW):
        yield at, min(_WINDOW, address + size - at)


def _split(address: int, size: int) -> Iterator[Piece]:
    end = address + size
    while address < end:
        piece = Piece(address, min(end - address, PAGE_SIZE - address % PAGE_SIZE))
        yield piece
        address += piece.size


def _left_in_page(there: Translation) -> int:
    size = there.page_size or PAGE_SIZE
    return size - there.gpa % size
