# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's memory without a session: QEMU has it in a file that is mapped here."""

from __future__ import annotations

import mmap
from pathlib import Path


class SharedMemory:
    """Guest memory that is a file, read and written as a session does it."""

    waiting = 0

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)

    def read_physical(self, gpa: int, size: int) -> bytes:
        """`size` bytes at physical address `gpa`."""
        return self._memory[gpa : gpa + size]

    def write_physical(self, gpa: int, data: bytes) -> None:
        """Write `data` at physical address `gpa`."""
        self._memory[gpa : gpa + len(data)] = data

    def next_event(self, _timeout: float) -> None:
        """There are no events here."""
        return
