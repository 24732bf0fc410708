# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names of model specific registers, without the manuals' prefixes."""

from __future__ import annotations

NAMES = {
    "tsc": 0x10,
    "apic-base": 0x1B,
    "spec-ctrl": 0x48,
    "sysenter-cs": 0x174,
    "sysenter-esp": 0x175,
    "sysenter-eip": 0x176,
    "misc-enable": 0x1A0,
    "debugctl": 0x1D9,
    "pat": 0x277,
    "mtrr-def-type": 0x2FF,
    "efer": 0xC0000080,
    "star": 0xC0000081,
    "lstar": 0xC0000082,
    "cstar": 0xC0000083,
    "sfmask": 0xC0000084,
    "fs-base": 0xC0000100,
    "gs-base": 0xC0000101,
    "kernel-gs-base": 0xC0000102,
    "tsc-aux": 0xC0000103,
}
_BY_INDEX = {index: name for name, index in NAMES.items()}

WATCHABLE = (range(0x2000), range(0xC0000000, 0xC0002000))
"""Indices whose writes can be watched: those that the processors' MSR bitmaps have a bit for."""


def msr_index(name: str) -> int:
    """The MSR with this name, or this number.

    :raise ValueError: there is none, or its writes cannot be watched.
    """
    index = NAMES.get(name.lower().replace("_", "-"))
    if index is None:
        try:
            index = int(name, 0)
        except ValueError:
            raise ValueError(f"no MSR is called {name!r}; there are {', '.join(NAMES)}, and numbers") from None
    if not any(index in watchable for watchable in WATCHABLE):
        raise ValueError(f"MSR {index:#x} cannot be watched: those from 0 to 0x1fff and 0xc0000000 to 0xc0001fff can")
    return index


def msr_name(index: int) -> str:
    """The name that people read: ``lstar``; ``0x1234`` for one that is not in the table."""
    return _BY_INDEX.get(index, hex(index))
