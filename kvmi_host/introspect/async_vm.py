# SPDX-License-Identifier: LGPL-2.1-or-later
"""The asyncio twin of :mod:`kvmi_host.introspect.vm`. The names are the same; whatever asks the kernel is awaited::

    async with await kvmi_host.aio.attach("webserver") as vm:
        async with vm.paused():
            print((await (await vm.vcpus)[0].registers).rip, await vm.memory[0x1000:0x1010])
        async for event in vm.events(CR3, Msr("lstar")):
            print(event.vcpu, event.mode, event.data)

One task at a time takes events, pauses vCPUs or steps; others may ask meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from inspect import isawaitable
from time import monotonic
from types import TracebackType
from typing import Self

from kvmi_host.introspect import memory as ranges
from kvmi_host.introspect.async_session import AsyncSession
from kvmi_host.introspect.errors import SessionError
from kvmi_host.introspect.facts import Facts, facts_of
from kvmi_host.introspect.handlers import Handlers
from kvmi_host.introspect.holding import Hold
from kvmi_host.introspect.interests import Interest
from kvmi_host.introspect.paging import Translation
from kvmi_host.introspect.plans import quietly, run_async
from kvmi_host.introspect.session import PeerInfo
from kvmi_host.introspect.watch import Watch, WatchedEvent, watched
from kvmi_host.protocol import (
    Cpuid,
    Event,
    ProtocolError,
    Registers,
    Request,
    SpecialRegisters,
    VcpuState,
    messages,
    msr_index,
)

AsyncHandler = Callable[[WatchedEvent], Awaitable[None] | None]

_log = logging.getLogger(__name__)


class AsyncMemory:
    """As :class:`~kvmi_host.introspect.vm.Memory`: ``await memory[0x1000:0x1010]``."""

    def __init__(self, session: AsyncSession, locate: ranges.Locate) -> None:
        self._session = session
        self._locate = locate

    async def read(self, address: int, size: int) -> bytes:
        return await run_async(self._session, ranges.read(self._locate, address, size))

    async def write(self, address: int, data: bytes) -> None:
        await run_async(self._session, ranges.write(self._locate, address, data))

    def __getitem__(self, key: slice) -> Awaitable[bytes]:
        return self.read(*ranges.span(key))


class AsyncVcpu:
    """As :class:`~kvmi_host.introspect.vm.Vcpu`."""

    def __init__(self, session: AsyncSession, hold: Hold, index: int) -> None:
        self.index = index
        self._session = session
        self._hold = hold

    async def state(self, msrs: Iterable[int | str] = ()) -> VcpuState:
        indices = [msr_index(msr) if isinstance(msr, str) else msr for msr in msrs]
        return await self._session.ask(messages.get_registers(self.index, indices))

    @property
    async def registers(self) -> Registers:
        return (await self.state()).registers

    async def set_registers(self, registers: Registers) -> None:
        await self._session.ask(messages.set_registers(self.index, registers))

    @property
    async def sregs(self) -> SpecialRegisters:
        return (await self.state()).sregs

    @property
    async def mode(self) -> int:
        return (await self.state()).mode

    async def msr(self, msr: int | str) -> int:
        (value,) = (await self.state([msr])).msrs.values()
        return value

    @property
    def memory(self) -> AsyncMemory:
        return AsyncMemory(self._session, ranges.virtual(lambda: ranges.tables_of(self.index)))

    async def translate(self, gva: int) -> Translation:
        return await run_async(self._session, ranges.translate(self.index, gva))

    async def cpuid(self, function: int, index: int = 0) -> Cpuid:
        return await self._session.ask(messages.cpuid(self.index, function, index))

    async def xsave(self) -> bytes:
        return await self._session.ask(messages.xsave(self.index))

    async def inject(self, vector: int, error_code: int | None = None, address: int = 0) -> None:
        await self._session.ask(messages.inject_exception(self.index, vector, error_code, address))

    async def step(self) -> Event:
        return await run_async(self._session, self._hold.step(self.index))


class AsyncVm:
    """As :class:`~kvmi_host.introspect.vm.Vm`."""

    def __init__(self, session: AsyncSession, *, leave: Callable[[], None] | None = None) -> None:
        self.session = session
        self._leave = leave
        self.memory = AsyncMemory(session, ranges.physical)
        self.handlers: Handlers[AsyncHandler] = Handlers()
        self.unhooked = False
        self._hold = Hold()
        self._facts: Facts | None = None
        self._watch: Watch | None = None
        self._waiting: WatchedEvent | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        leave, self._leave = self._leave, None
        try:
            if not self.session.closed:
                await self._unwatch()
        finally:
            self.session.close()
            await self.session.wait_closed()
            if leave:
                await asyncio.to_thread(leave)

    @property
    def peer(self) -> PeerInfo | None:
        return self.session.peer

    @property
    async def facts(self) -> Facts:
        if self._facts is None:
            self._facts = await run_async(self.session, facts_of(self.peer))
        return self._facts

    @property
    async def vcpus(self) -> Sequence[AsyncVcpu]:
        count = await self.session.ask(messages.guest_info())
        return [AsyncVcpu(self.session, self._hold, index) for index in range(count)]

    def process_memory(self, cr3: int) -> AsyncMemory:
        return AsyncMemory(self.session, ranges.virtual(lambda: ranges.tables_of(0, cr3)))

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        try:
            await run_async(self.session, self._hold.pause(() if self._waiting is None else (self._waiting.vcpu,)))
            yield
        finally:
            if not self.session.closed:
                await run_async(self.session, self._hold.resume())

    async def batch(self, *requests: Request[None]) -> None:
        await run_async(self.session, quietly(*requests))

    # -- events

    async def events(self, *interests: Interest, duration: float | None = None) -> AsyncGenerator[WatchedEvent, None]:
        """As :meth:`Vm.events`. Where the loop is left before its end, wrap it in :func:`contextlib.aclosing`, or what
        it switched on stays so until the VM's block is left."""
        if self._watch is not None:
            raise ValueError("one thing at a time: these events are asked for within the loop over others")
        deadline = None if duration is None else monotonic() + duration
        session = self.session
        self._watch = watch = Watch(self._hold, interests)
        try:
            await run_async(session, watch.begin())
            plain = watch.plain
            while True:
                event = await session.next_event() if deadline is None and watch.undisturbed else None
                needs_plan = False
                if event is None or event.event not in plain:
                    needs_plan = True
                    event = await self._next(watch, event, deadline)
                    if event is None:
                        return
                self._waiting = event = watched(event)
                yield event
                self._waiting = None
                if needs_plan or event.answer:
                    await run_async(session, watch.answer(event))
                else:
                    session.reply(event)
        finally:
            await self._unwatch()

    async def _next(self, watch: Watch, event: Event | None, deadline: float | None) -> Event | None:
        if event is not None and await run_async(self.session, watch.sort(event)):
            return event
        left = None if deadline is None else max(0.0, deadline - monotonic())
        return await run_async(self.session, watch.next(left))

    async def _unwatch(self) -> None:
        watch, self._watch = self._watch, None
        waiting, self._waiting = self._waiting, None
        if watch is None or self.session.closed:
            return
        try:
            await run_async(self.session, watch.end(waiting))
        except (SessionError, ProtocolError) as error:
            _log.info("the session ended before everything was undone: %s", error)
        finally:
            self.unhooked = watch.unhooked

    def stop(self) -> None:
        """As :meth:`Vm.stop`, and from any task: where no event is being handled, at once."""
        if self._watch is not None:
            self._watch.stopped = True
            self.session.wake()

    def on(self, *interests: Interest) -> Callable[[AsyncHandler], AsyncHandler]:
        """As :meth:`Vm.on`. The function may be a coroutine function; the vCPU waits as long as it takes."""
        return self.handlers.add(interests)

    async def run(self, duration: float | None = None) -> None:
        async with aclosing(self.events(*self.handlers.interests, duration=duration)) as events:
            async for event in events:
                for handler in self.handlers.of(event):
                    try:
                        outcome = handler(event)
                        if isawaitable(outcome):
                            await outcome
                    except Exception:
                        self.handlers.failed(handler, event)
