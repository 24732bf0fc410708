# SPDX-License-Identifier: LGPL-2.1-or-later
"""Single keys from the terminal, without waiting for them."""

from __future__ import annotations

import os
import select
import sys
import termios
import tty
from typing import Any

_CONTROL_CHARACTERS = 6  # their place in what tcgetattr returns
_MOST_KEYS = 64


class Keyboard:
    """Standard input, if it is a terminal, one key at a time and without echo, until :meth:`close`."""

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno() if sys.stdin and sys.stdin.isatty() else -1
        self._before: list[Any] = []
        if self._fd >= 0:
            self._before = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd, termios.TCSADRAIN)
            # No Ctrl-Z: a program that is stopped answers no events, and the guest would stand still with it.
            settings = termios.tcgetattr(self._fd)
            settings[_CONTROL_CHARACTERS][termios.VSUSP] = os.fpathconf(self._fd, "PC_VDISABLE").to_bytes()
            termios.tcsetattr(self._fd, termios.TCSADRAIN, settings)

    def pressed(self) -> str:
        """The keys that were pressed since, if any."""
        if self._fd < 0 or not select.select([self._fd], [], [], 0)[0]:
            return ""
        try:
            keys = os.read(self._fd, _MOST_KEYS)
        except OSError:
            keys = b""
        if not keys:  # the terminal is gone
            self.close()
        return keys.decode("ascii", "replace")

    def close(self) -> None:
        """Set the terminal as it was. May be called again."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                termios.tcsetattr(fd, termios.TCSADRAIN, self._before)
            except termios.error:  # it is gone
                return
