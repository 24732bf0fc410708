# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a kernel says of itself in its log."""

from __future__ import annotations

import re

TROUBLE = re.compile(
    r"WARNING:|\bBUG\b|\bOops\b|Kernel panic|soft lockup|hard LOCKUP|detected.*stall|hung task|blocked for more than"
    r"|general protection|Call Trace:|KASAN|UBSAN|unable to handle|INFO: task .* blocked|lockdep"
    r"|possible (recursive|circular) locking|refcount_t:|list_(add|del) corruption|use-after-free"
    r"|scheduling while atomic|memory leak|leaked|unreferenced object|detector disabled|ODEBUG|non-static key"
)
"""What a kernel only says when something is wrong with it."""
