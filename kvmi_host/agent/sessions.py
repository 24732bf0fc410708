# SPDX-License-Identifier: LGPL-2.1-or-later
"""The sessions of all VMs that are attached now."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Collection
from uuid import UUID

from kvmi_host.agent.attendant import Attendant
from kvmi_host.agent.config import Config
from kvmi_host.agent.metered import MeteredSession
from kvmi_host.agent.metrics import Metrics
from kvmi_host.introspect import PeerInfo

COMMAND_SECONDS = 3.0
"""The deadline of a command. ``kvmi-host detach`` insists after 5 s."""

CLEAN_UP_SECONDS = 3.0
"""What a session has to undo what it did, before it is cut. QEMU waits 10 s for the answer to its handshake, and a
session that is in its VM's way is ended within this time."""

_CUT_SECONDS = 1.0
_NO_UUID = UUID(int=0)

_log = logging.getLogger(__name__)


class Sessions:
    """One task a VM. A VM that announces itself again gets the place of its session before."""

    def __init__(self, config: Config, metrics: Metrics) -> None:
        self._config = config
        self._metrics = metrics
        self._running: dict[Attendant, asyncio.Task[None]] = {}
        self._turn = 0

    def __len__(self) -> int:
        return len(self._running)

    def admit(self, sock: socket.socket, peer: PeerInfo) -> None:
        """Serve a VM, on its socket."""
        before = self._of(peer)
        rule = self._config.rule_for(peer)
        attendant = Attendant(peer, rule.handlers if rule else {}, self._metrics)

        async def open_session() -> MeteredSession:
            try:
                await self._end(before)  # who came between make_room and now
                return await MeteredSession.open(sock, peer=peer, timeout=COMMAND_SECONDS)
            except BaseException:
                sock.close()
                raise

        async def attend() -> None:
            try:
                await attendant.run(await open_session())
            finally:
                del self._running[attendant]

        self._running[attendant] = asyncio.create_task(attend())

    async def make_room(self, peer: PeerInfo) -> None:
        """End the session that this VM has from before, so that the kernel can have another one."""
        if before := self._of(peer):
            _log.warning("%s announces itself again: its session from before is ended", peer.name or peer.uuid)
            await self._end(before)

    def configure(self, config: Config) -> None:
        """Give each VM the handlers that another configuration has for it. No session ends."""
        self._config = config
        for attendant in self._running:
            rule = config.rule_for(attendant.peer)
            attendant.change(rule.handlers if rule else {})

    async def measure(self) -> None:
        """Measure the round trip to one VM, each time another one."""
        if running := list(self._running):
            self._turn = (self._turn + 1) % len(running)
            await running[self._turn].measure()

    async def close(self) -> None:
        """End all of them, side by side."""
        await self._end(list(self._running))

    def _of(self, peer: PeerInfo) -> list[Attendant]:
        # A VMM that was not told its VM's UUID says zero: that says nothing.
        return [other for other in self._running if other.peer.uuid == peer.uuid != _NO_UUID]

    async def _end(self, attendants: Collection[Attendant]) -> None:
        tasks = {self._running[attendant]: attendant for attendant in attendants if attendant in self._running}
        if not tasks:
            return
        for attendant in tasks.values():
            attendant.leave()
        _, late = await asyncio.wait(tasks, timeout=CLEAN_UP_SECONDS)
        for task in late:
            peer = tasks[task].peer
            _log.warning("%s: its session is cut: it was not done in %g s", peer.name or peer.uuid, CLEAN_UP_SECONDS)
            tasks[task].cut()
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=_CUT_SECONDS)
