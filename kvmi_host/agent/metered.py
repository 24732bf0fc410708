# SPDX-License-Identifier: LGPL-2.1-or-later
"""A session whose events are counted, and timed from their arrival until they are answered: as long as the guest's vCPU
waits for this process."""

from __future__ import annotations

import asyncio
from collections import deque
from time import perf_counter

from kvmi_host.agent.metrics import Histogram, VmCounts
from kvmi_host.introspect.async_session import AsyncSession
from kvmi_host.protocol import Action, Event, PageFaultReply


class MeteredSession(AsyncSession):
    """Set :attr:`counts` and :attr:`handling` before events are taken."""

    counts: VmCounts
    handling: Histogram

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The transport is there."""
        super().connection_made(transport)
        self._arrivals: deque[float] = deque()  # of the events that wait to be taken
        self._taken: dict[int, float] = {}  # arrivals of those that are not answered, by vCPU: each waits with one

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes came."""
        before = self.waiting
        super().buffer_updated(nbytes)
        if came := self.waiting - before:
            now = perf_counter()
            for _ in range(came):
                self._arrivals.append(now)

    async def next_event(self, timeout: float | None = None) -> Event | None:
        """As the others' one."""
        event = await super().next_event(timeout)
        if event is not None:
            self._taken[event.vcpu] = self._arrivals.popleft()
            self.counts.events[event.event] += 1
        return event

    def reply(
        self,
        event: Event,
        action: int = Action.CONTINUE,
        *,
        new_val: int | None = None,
        page_fault: PageFaultReply | None = None,
    ) -> None:
        """As the others' one."""
        super().reply(event, action, new_val=new_val, page_fault=page_fault)
        if arrival := self._taken.pop(event.vcpu, None):
            self.handling.observe(perf_counter() - arrival)
