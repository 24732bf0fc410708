# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a kernel that checks itself says only when it is asked: whether memory is lost, and whether it still checks.

Kernels without these checks have nothing to say.
"""

from __future__ import annotations

import re
from pathlib import Path
from time import sleep

KMEMLEAK = Path("/sys/kernel/debug/kmemleak")
_AGE = 5.0
"""Seconds for which kmemleak takes nothing for lost (``MSECS_MIN_AGE`` in ``mm/kmemleak.c``)."""
LOCKDEP = Path("/proc/lockdep_stats")


def lost_memory() -> str:
    """The memory that nothing points to any more, as kmemleak reports it, since the last time it was asked.

    :raise OSError: it has given up, for want of memory.
    """
    if not KMEMLEAK.exists():
        return ""
    # What one scan misses may have been on its way from one place to another.
    for _ in range(2):
        sleep(_AGE)
        KMEMLEAK.write_text("scan")
    report = KMEMLEAK.read_text()
    KMEMLEAK.write_text("clear")
    return report


def locks_are_checked() -> bool:
    """Whether lockdep looks at locks: it stops at the first thing that is wrong. True where there is none."""
    if not LOCKDEP.exists():
        return True
    return re.search(r"^\s*debug_locks:\s+1$", LOCKDEP.read_text(), re.MULTILINE) is not None
