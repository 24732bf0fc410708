# SPDX-License-Identifier: LGPL-2.1-or-later
"""The agent's log: one JSON object a line on standard error, with at least ``time level logger message``.

What is logged while a VM is being served has its name as ``vm``, whoever logs it. What a caller gives as ``extra`` is
in the object, too.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Hashable
from contextvars import ContextVar
from datetime import UTC, datetime

VM: ContextVar[str] = ContextVar("vm")
"""Which VM the current task serves."""

_MOST_A_SECOND = 20
_OF_THE_RECORD_ITSELF = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def set_up() -> None:
    """Send what is logged anywhere in this process to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    handler.addFilter(Restraint())
    logging.basicConfig(handlers=[handler], force=True)
    logging.captureWarnings(True)


def set_level(level: str) -> None:
    """Log from that level on; ``asyncio`` from warnings on."""
    logging.getLogger().setLevel(level.upper())
    logging.getLogger("asyncio").setLevel(logging.WARNING)


class JsonLines(logging.Formatter):
    """A record as one line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if vm := VM.get(None):
            line["vm"] = vm
        line |= {key: value for key, value in record.__dict__.items() if key not in _OF_THE_RECORD_ITSELF}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class Restraint(logging.Filter):
    """Lets through so many warnings and errors a second from each line of code: a handler that raises at every event
    must not fill the disk. The next one that comes through says how many did not."""

    def __init__(self) -> None:
        super().__init__()
        self._second: dict[Hashable, int] = {}
        self._seen: dict[Hashable, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        place, second = (record.pathname, record.lineno), int(record.created)
        if self._second.get(place) != second:
            self._second[place] = second
            if (dropped := self._seen.get(place, 0) - _MOST_A_SECOND) > 0:
                record.not_logged_before = dropped
            self._seen[place] = 0
        self._seen[place] += 1
        return self._seen[place] <= _MOST_A_SECOND
