# SPDX-License-Identifier: LGPL-2.1-or-later
"""What another host says, as it may be shown."""

from __future__ import annotations


def printable(text: str) -> str:
    """A text that can do nothing to a terminal: lines stay, other control characters do not."""
    lines = text.replace("\t", " ").splitlines()
    return "\n".join("".join(char if char.isprintable() else "?" for char in line) for line in lines).strip()
