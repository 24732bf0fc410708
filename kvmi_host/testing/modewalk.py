# SPDX-License-Identifier: LGPL-2.1-or-later
"""The contract of the modewalk guest: where its control block lies in guest memory, and what is in it.

The guest's README (``vm-images/guests/modewalk/README.md``) says what it does. Nothing here does I/O: a test reads and
writes the guest's physical memory in its own way, at the addresses and with the bytes that are made here::

    write(modewalk.want_address(vcpu), bytes([Station.LONG64]))
    record = Record.unpack(read(modewalk.record_address(vcpu), RECORD_SIZE))
    assert record.at is Station.LONG64
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Self

CONTROL_ADDRESS = 0x7000
MAGIC = 0x4B4C574D
"""``MWLK`` in memory."""
VERSION = 1
MAX_VCPUS = 16
RECORD_SIZE = 64

HYPERCALL = 34
"""The number of the KVMI hypercall: in RAX, or EAX."""
HYPERCALL_EVENT = 24
"""Its operation: in RDI at :attr:`Station.LONG64`, in EBX at the others."""

CR0_WP = 1 << 16
CR4_TSD = 1 << 2

DEFAULT_PACE = 20
HELD_LINE_ITERATIONS = 512
"""A held vCPU prints a serial line each time that its count of iterations is a multiple of this."""
LAP_LINE_LAPS = 4
"""The same for the laps of a vCPU that walks."""

_HEADER = Struct("<4I")
_RECORD = Struct("<4BI2Q2I2Q3I4x")


class Station(IntEnum):
    """The modes that the guest walks through, in its order."""

    REAL16 = 1
    """Real mode."""
    BIGREAL = 2
    """CR0.PE clear with CS.D set."""
    PROT16 = 3
    PROT32 = 4
    VM86 = 5
    """Virtual-8086 mode, CPL 3. Its CR writes are made by the monitor, in 32-bit protected mode."""
    LONG64 = 6
    COMPAT16 = 7
    COMPAT32 = 8

    @property
    def label(self) -> str:
        """The station's name in serial lines."""
        return self.name.lower()

    @property
    def mode(self) -> int:
        """The ``mode`` of KVMI events there: the operand size, in bytes, of the code that runs (2, 4 or 8)."""
        return _MODES[self]

    @property
    def cr_mode(self) -> int:
        """The same for the events of CR writes."""
        return Station.PROT32.mode if self is Station.VM86 else self.mode


_MODES = {
    Station.REAL16: 2,
    Station.BIGREAL: 4,
    Station.PROT16: 2,
    Station.PROT32: 4,
    Station.VM86: 2,
    Station.LONG64: 8,
    Station.COMPAT16: 2,
    Station.COMPAT32: 4,
}


class Actions(IntFlag):
    """What an iteration does, in this order. Each CR action is two writes: a bit is flipped and flipped back."""

    HYPERCALL = 1
    CR3 = 2
    """Second value of the pair, then the first."""
    CR4 = 4
    """TSD set, then clear."""
    CR0 = 8
    """WP set, then clear."""
    ALL = 15

    @property
    def cr_writes(self) -> int:
        """How many CR writes an iteration makes."""
        return 2 * (self & (Actions.CR3 | Actions.CR4 | Actions.CR0)).bit_count()


@dataclass(frozen=True)
class Header:
    """The first 16 bytes of the control block."""

    magic: int
    version: int
    online: int
    """How many vCPUs have come up."""
    state: int
    """0 while the guest boots, 1 when its vCPUs walk."""

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read a header from the bytes at :data:`CONTROL_ADDRESS`, of which the first 16 count."""
        return cls(*_HEADER.unpack_from(data))

    @property
    def ready(self) -> bool:
        """Whether this is a control block that this module knows, of a guest that has booted."""
        return (self.magic, self.version, self.state) == (MAGIC, VERSION, 1)


@dataclass(frozen=True)
class Record:
    """One vCPU's part of the control block. The host writes ``want``, ``actions`` and ``pace``, the guest the rest."""

    want: int
    """The station to stay at, 0 to walk."""
    at: Station | None
    """Where the vCPU is; None on the way and at home between two laps."""
    actions: Actions
    uses_vmmcall: bool
    """Whether its hypercall instruction is VMMCALL (AMD, Hygon), not VMCALL."""
    pace: int
    """Writes to port 0x80 between two iterations of a held vCPU."""
    iterations: int
    laps: int
    result: int
    """What the last hypercall left in EAX; :data:`HYPERCALL` if nothing answered it."""
    index: int
    cr3_pair: tuple[int, int]
    exception: int
    exception_eip: int
    """Of the exception that has halted the vCPU: its vector and place. Both 0 as long as there was none."""
    visited: int
    """Bit N is set once the vCPU has been to station N on a walk."""

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read a record from the :data:`RECORD_SIZE` bytes at :func:`record_address`."""
        want, at, actions, vmmcall, pace, iterations, laps, result, index, cr3_first, cr3_second, *rest = (
            _RECORD.unpack(data)
        )
        return cls(
            want,
            Station(at) if at else None,
            Actions(actions),
            bool(vmmcall),
            pace,
            iterations,
            laps,
            result,
            index,
            (cr3_first, cr3_second),
            *rest,
        )


def record_address(vcpu: int) -> int:
    """Guest-physical address of a vCPU's record.

    :param vcpu: the vCPU's index, 0 to 15.
    :raise ValueError: if the guest has no record for it.
    """
    if not 0 <= vcpu < MAX_VCPUS:
        raise ValueError(f"vCPU {vcpu}: modewalk has records for vCPUs 0 to {MAX_VCPUS - 1}")
    return CONTROL_ADDRESS + RECORD_SIZE * (vcpu + 1)


def want_address(vcpu: int) -> int:
    """Of the byte that chooses the station: a :class:`Station`, or 0 to walk."""
    return record_address(vcpu)


def at_address(vcpu: int) -> int:
    """Of the byte that tells the station, 0 on the way."""
    return record_address(vcpu) + 1


def actions_address(vcpu: int) -> int:
    """Of the byte that chooses the :class:`Actions`."""
    return record_address(vcpu) + 2


def pace_address(vcpu: int) -> int:
    """Of the u32 that sets the pace."""
    return record_address(vcpu) + 4


def iterations_address(vcpu: int) -> int:
    """Of the u64 that counts iterations."""
    return record_address(vcpu) + 8


def laps_address(vcpu: int) -> int:
    """Of the u64 that counts laps."""
    return record_address(vcpu) + 16


def vcpus_line(vcpus: int) -> str:
    """The serial line that says that the guest has booted."""
    return f"modewalk: {vcpus} vcpus"


def station_line(vcpu: int, station: Station) -> str:
    """The serial line of an arrival: the first one at each station on a walk, each one when the host wants it."""
    return f"modewalk: vcpu {vcpu} station {station.label}"


def held_line(vcpu: int, station: Station, iterations: int) -> str:
    """The serial line of a vCPU that is held at a station."""
    return f"modewalk: vcpu {vcpu} held {station.label} {iterations}"
