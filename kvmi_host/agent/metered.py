# SPDX-License-Identifier: LGPL-2.1-or-later
"""A session that measures how long a vCPU waits for this process: from an event's arrival until it is answered.

One in so many events is timed: what is done for each of them, guests wait for.
"""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import Any

from kvmi_host.agent.metrics import Histogram
from kvmi_host.introspect.async_session import AsyncSession
from kvmi_host.protocol import Action, Event

EVERY = 16
"""Of so many receptions, the last event of one is timed; the first one is."""


class MeteredSession(AsyncSession):
    """Set :attr:`handling` before events are taken."""

    handling: Histogram

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The transport is there."""
        super().connection_made(transport)
        self._until_timed = 1
        self._timed = 0
        self._arrived = 0.0

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes came."""
        self._until_timed -= 1
        if self._until_timed:
            super().buffer_updated(nbytes)
            return
        before, now = len(self._events), perf_counter()
        super().buffer_updated(nbytes)
        if len(self._events) > before:
            self._until_timed = EVERY
            self._timed, self._arrived = self._events[-1].seq, now
            # In the place of the class's, which is compiled, until that event is answered.
            self.reply = self._timed_reply  # type: ignore[method-assign]
        else:  # these were answers: the next reception, then
            self._until_timed = 1

    def _timed_reply(self, event: Event, action: int = Action.CONTINUE, **more: Any) -> None:
        super().reply(event, action, **more)
        if event.seq == self._timed:
            self.handling.observe(perf_counter() - self._arrived)
            del self.reply
