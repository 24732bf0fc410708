# SPDX-License-Identifier: LGPL-2.1-or-later
"""A VM as an introspector sees it: its vCPUs, its memory, its events. Blocking; :mod:`kvmi_host.introspect.async_vm` is
its twin for asyncio.

::

    with kvmi_host.attach("webserver", allow="full") as vm:
        with vm.paused():
            print(vm.vcpus[0].registers.rip, vm.memory[0x1000:0x1010])
        for event in vm.events(CR3, Msr("lstar"), Breakpoint(0xFFFFFFFF81000000)):
            print(event.vcpu, event.mode, event.data)

Leaving the block, on Ctrl-C too, undoes what it did: breakpoints are taken out, events switched off, pages released,
vCPUs let go.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from time import monotonic
from types import TracebackType
from typing import Any, Self

from kvmi_host.introspect import memory as ranges
from kvmi_host.introspect.errors import SessionError
from kvmi_host.introspect.facts import Facts, facts_of
from kvmi_host.introspect.handlers import Handlers
from kvmi_host.introspect.holding import Hold
from kvmi_host.introspect.interests import Interest
from kvmi_host.introspect.paging import Translation
from kvmi_host.introspect.plans import quietly, run
from kvmi_host.introspect.session import PeerInfo, Session
from kvmi_host.introspect.watch import Watch, WatchedEvent, watched
from kvmi_host.protocol import (
    Cpuid,
    Event,
    ProtocolError,
    Registers,
    Request,
    SpecialRegisters,
    VcpuState,
    msr_index,
)
from kvmi_host.protocol.messages import PAGE_SIZE

Handler = Callable[[WatchedEvent], None]

_log = logging.getLogger(__name__)


class Memory:
    """Guest memory: ``memory[0x1000:0x1010]`` is bytes, ``memory[0x1000]`` one of them; both can be assigned to."""

    def __init__(self, session: Session, locate: ranges.Locate) -> None:
        self._session = session
        self._locate = locate

    def read(self, address: int, size: int) -> bytes:
        """The bytes of a range of any size.

        :raise NotMapped: a linear address leads nowhere.
        :raise CommandError: there is no memory.
        """
        if self._locate is ranges.physical and size > PAGE_SIZE:
            return self._read_pages(address, size)
        return run(self._session, ranges.read(self._locate, address, size))

    def write(self, address: int, data: bytes) -> None:
        """Write a range of any size.

        :raise NotMapped: a linear address leads nowhere.
        :raise CommandError: there is no memory, or the session may not change the guest.
        """
        run(self._session, ranges.write(self._locate, address, data))

    def _read_pages(self, address: int, size: int) -> bytes:
        """The same, by whole pages, which are received where they belong."""
        before = address % PAGE_SIZE
        pages = bytearray(-(-(before + size) // PAGE_SIZE) * PAGE_SIZE)
        self._session.read_pages(address - before, pages)
        return bytes(memoryview(pages)[before : before + size])

    def __getitem__(self, key: slice) -> bytes:
        return self.read(*ranges.span(key))

    def __setitem__(self, key: slice, data: bytes) -> None:
        address, size = ranges.span(key)
        if len(data) != size:
            raise ValueError(f"{len(data)} bytes for a range of {size}: memory does not grow")
        self.write(address, data)


class Vcpu:
    """One vCPU. What is read of one that runs is what it was at some moment; see :meth:`Vm.paused`."""

    def __init__(self, session: Session, hold: Hold, index: int) -> None:
        self.index = index
        self._session = session
        self._hold = hold

    def state(self, msrs: Iterable[int | str] = ()) -> VcpuState:
        """Mode, registers, and the MSRs with these names or indices, of one moment."""
        indices = [msr_index(msr) if isinstance(msr, str) else msr for msr in msrs]
        return self._session.get_registers(self.index, indices)

    @property
    def registers(self) -> Registers:
        """The general registers."""
        return self.state().registers

    def set_registers(self, registers: Registers) -> None:
        """Set the general registers when the vCPU's event is answered: within :meth:`Vm.paused`, or while an event of
        this vCPU is handled. At any other time the kernel drops them."""
        self._session.set_registers(self.index, registers)

    @property
    def sregs(self) -> SpecialRegisters:
        """Segments, descriptor tables, control registers."""
        return self.state().sregs

    @property
    def mode(self) -> int:
        """Operand size in bytes: 2, 4 or 8."""
        return self.state().mode

    def msr(self, msr: int | str) -> int:
        """An MSR, by name or index."""
        (value,) = self.state([msr]).msrs.values()
        return value

    @property
    def memory(self) -> Memory:
        """Memory by linear addresses, through the page tables that the vCPU uses at each access."""
        return Memory(self._session, ranges.virtual(lambda: ranges.tables_of(self.index)))

    def translate(self, gva: int) -> Translation:
        """Where a linear address leads, and what may be done there.

        :raise NotMapped: nowhere.
        """
        return run(self._session, ranges.translate(self.index, gva))

    def cpuid(self, function: int, index: int = 0) -> Cpuid:
        """What the guest's CPUID instruction gives for EAX = `function` and ECX = `index`."""
        return self._session.cpuid(self.index, function, index)

    def xsave(self) -> bytes:
        """x87, SSE, AVX and further state, in the standard format of the XSAVE instruction."""
        return self._session.xsave(self.index)

    def inject(self, vector: int, error_code: int | None = None, address: int = 0) -> None:
        """Have it take an exception before it goes on; see :meth:`Session.inject_exception`."""
        self._session.inject_exception(self.index, vector, error_code, address)

    def step(self) -> Event:
        """Execute one instruction, or take one interrupt. Within :meth:`Vm.paused`.

        :return: the event that the vCPU waits with now, most often SINGLESTEP.
        :raise ValueError: it is not paused.
        """
        return run(self._session, self._hold.step(self.index))


class Vm:
    """A VM that is being introspected.

    :ivar session: for what this class has no word for. Events are taken from one of the two only.
    :ivar memory: physical memory.
    :ivar handlers: what :meth:`run` calls.
    :ivar unhooked: whether the host has asked for the session's end.
    """

    def __init__(self, session: Session, *, leave: Callable[[], None] | None = None) -> None:
        """
        :param leave: called once, when the session is closed: what else attaching has left to be undone.
        """
        self.session = session
        self._leave = leave
        self.memory = Memory(session, ranges.physical)
        self.handlers: Handlers[Handler] = Handlers()
        self.unhooked = False
        self._hold = Hold()
        self._watch: Watch | None = None
        self._waiting: WatchedEvent | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Undo what was done, and end the session; the VM goes on. May be called again."""
        leave, self._leave = self._leave, None
        try:
            if not self.session.closed:
                self._unwatch()
        finally:
            self.session.close()
            if leave:
                leave()

    @property
    def peer(self) -> PeerInfo | None:
        """Which VM it is, as far as that is known."""
        return self.session.peer

    @cached_property
    def facts(self) -> Facts:
        """What the kernel says of the session."""
        return run(self.session, facts_of(self.peer))

    @property
    def vcpus(self) -> Sequence[Vcpu]:
        """The vCPUs that the VM has now."""
        return [Vcpu(self.session, self._hold, index) for index in range(self.session.guest_info())]

    def process_memory(self, cr3: int) -> Memory:
        """Memory by linear addresses of a process: through the page tables with this root, whoever runs."""
        return Memory(self.session, ranges.virtual(lambda: ranges.tables_of(0, cr3)))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """All vCPUs that the guest has started wait, while the block runs.

        :raise SessionTimeout: one does not; the others are let go.
        """
        try:
            run(self.session, self._hold.pause(() if self._waiting is None else (self._waiting.vcpu,)))
            yield
        finally:
            if not self.session.closed:
                run(self.session, self._hold.resume())

    def batch(self, *requests: Request[None]) -> None:
        """Send commands of :mod:`kvmi_host.protocol.messages` in one write, and have the kernel answer none of them.

        :raise CommandError: one is not allowed, or not there. Other refusals are not heard of.
        """
        run(self.session, quietly(*requests))

    # -- events

    def events(self, *interests: Interest, duration: float | None = None) -> Generator[WatchedEvent, None, None]:
        """Watch from now on, and give each event to the loop. It is answered when the loop comes back for the next one:
        CONTINUE, unless :meth:`WatchedEvent.reply` said otherwise.

        The loop ends when the host asks for the session (``kvmi-host detach``, or the VM is to be saved, migrated or
        reset), or after `duration` seconds. Close the session soon when the host has asked: it waits for that.

        :raise SessionClosed: the VM or its session has ended.
        :raise CommandError: the session may not watch that, or the kernel does not have it.
        :raise NotMapped: there is no instruction where a breakpoint is to be.
        :raise ValueError: something is being watched already.
        """
        if self._watch is not None:
            raise ValueError("one thing at a time: these events are asked for within the loop over others")
        loop = self._loop(interests, None if duration is None else monotonic() + duration)
        next(loop)
        return loop

    def _loop(self, interests: Sequence[Interest], deadline: float | None) -> Generator[Any, None, None]:
        """The first thing that it gives says that everything is switched on; the others are events."""
        session = self.session
        self._watch = watch = Watch(self._hold, interests)
        try:
            run(session, watch.begin())
            yield watch
            next_event, reply, plain = session.next_event, session.reply, watch.plain
            while True:
                event = next_event() if deadline is None and watch.undisturbed else None
                # Most events need no sorting: no plan is made for them.
                needs_plan = False
                if event is None or event.event not in plain:
                    needs_plan = True
                    event = self._next(watch, event, deadline)
                    if event is None:
                        return
                self._waiting = event = watched(event)
                yield event
                self._waiting = None
                if needs_plan or event.answer:
                    run(session, watch.answer(event))
                else:
                    reply(event)
        finally:
            self._unwatch()

    def _next(self, watch: Watch, event: Event | None, deadline: float | None) -> Event | None:
        """The next event for the loop: `event`, if that is one."""
        if event is not None and run(self.session, watch.sort(event)):
            return event
        return run(self.session, watch.next(None if deadline is None else max(0.0, deadline - monotonic())))

    def _unwatch(self) -> None:
        watch, self._watch = self._watch, None
        waiting, self._waiting = self._waiting, None
        if watch is None or self.session.closed:
            return
        try:
            run(self.session, watch.end(waiting))
        except (SessionError, ProtocolError) as error:
            # The kernel lets go of the vCPUs when a session ends, and forgets about its pages.
            _log.info("the session ended before everything was undone: %s", error)
        finally:
            self.unhooked = watch.unhooked

    def stop(self) -> None:
        """End :meth:`events` or :meth:`run` when the event that is being handled is answered. For handlers."""
        if self._watch is not None:
            self._watch.stopped = True

    def on(self, *interests: Interest) -> Callable[[Handler], Handler]:
        """Have a function called with each of these events; see :meth:`run`. To be used as a decorator."""
        return self.handlers.add(interests)

    def run(self, duration: float | None = None) -> None:
        """Watch what there are handlers for, and call them.

        A handler that raises is reported in the log; the guest goes on, and so does the session. It ends as
        :meth:`events` does.
        """
        with closing(self.events(*self.handlers.interests, duration=duration)) as events:
            for event in events:
                for handler in self.handlers.of(event):
                    try:
                        handler(event)
                    except Exception:
                        self.handlers.failed(handler, event)
