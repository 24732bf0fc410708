# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the emulated CPUs that the hardware suite runs on get wrong; ``docs/emulators.md`` has the story.

A rule that an emulator cannot show is not skipped there. Its test expects the opposite, so that it fails when the fault
has gone, and the rule can be shown::

    assert kinds(events) == unless(Fault.NO_XSETBV_EXIT, [EventId.XSETBV])
"""

from __future__ import annotations

from enum import Enum, auto
from functools import cache
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_CPUINFO = Path("/proc/cpuinfo")
_ACPI_TABLE = Path("/sys/firmware/acpi/tables/FACP")
_OEM_ID = slice(10, 16)  # of an ACPI table


class Emulator(Enum):
    """What stands in for a CPU with virtualization."""

    QEMU_TCG = auto()
    BOCHS = auto()


class Fault(Enum):
    """A fault: the emulator that has it, and what it is."""

    NO_XSETBV_EXIT = (
        Emulator.QEMU_TCG,
        "XSETBV never leaves the guest: its VMM does not learn of the new value, and takes it back at the next entry",
    )


def identify(cpuinfo: str, acpi_table: bytes) -> Emulator | None:
    """The emulator that a machine is, if it is one.

    :param cpuinfo: its /proc/cpuinfo.
    :param acpi_table: one of its ACPI tables; empty if it has none.
    """
    fields = dict(line.split(":", 1) for line in cpuinfo.splitlines() if ":" in line)
    facts = {name.strip(): value.strip() for name, value in fields.items()}
    if facts.get("model name", "").startswith("QEMU TCG"):
        return Emulator.QEMU_TCG
    # QEMU's firmware has this mark too, but says that there is a hypervisor; Bochs does not.
    if acpi_table[_OEM_ID] == b"BOCHS " and "hypervisor" not in facts.get("flags", "").split():
        return Emulator.BOCHS
    return None


@cache
def emulator() -> Emulator | None:
    """The emulator that this machine is, if it is one."""
    return identify(_CPUINFO.read_text(), _ACPI_TABLE.read_bytes() if _ACPI_TABLE.exists() else b"")


def unless(fault: Fault, rule: list[T]) -> list[T]:
    """What a test has to find: what the rule says, or nothing where this machine has the fault."""
    return [] if emulator() is fault.value[0] else rule
