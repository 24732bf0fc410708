# SPDX-License-Identifier: LGPL-2.1-or-later
"""The introspector's seat in the speed benchmark, taken by ours: what client.c does, with the package's sessions.

seat.py events FD          read seq, vcpu, event and mode of each event, answer it CONTINUE
seat.py registers FD       ... and rip and cr3
seat.py loop FD            as "events", in a VM's loop over CR3
seat.py asyncio FD...      as "events", for any number of sessions on one thread
seat.py awaited FD...      ... with a task for each that awaits its events
seat.py memory FD BYTES    read guest memory; prints as JSON what a chunk took in microseconds
seat.py idle COUNT         prints as JSON how many bytes Python takes for a session that waits for events, of so many
"""

import asyncio
import gc
import json
import socket
import sys
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from time import perf_counter

from kvmi_host.introspect import CR3, Session, SessionClosed, Vm
from kvmi_host.introspect.async_session import AsyncSession
from kvmi_host.protocol import Event

CHUNK = 1 << 20
PAGE = 4096


def events(session: Session) -> None:
    while True:
        event = session.next_event()
        _ = event.seq
        _ = event.vcpu
        _ = event.event
        _ = event.mode
        session.reply(event)


def registers(session: Session) -> None:
    while True:
        event = session.next_event()
        _ = event.seq
        _ = event.vcpu
        _ = event.event
        _ = event.mode
        _ = event.rip
        _ = event.cr3
        session.reply(event)


def loop(session: Session) -> None:
    for event in Vm(session).events(CR3):
        _ = event.seq
        _ = event.vcpu
        _ = event.event
        _ = event.mode


def on_event(session: AsyncSession, event: Event) -> None:
    _ = event.seq
    _ = event.vcpu
    _ = event.event
    _ = event.mode
    session.reply(event)


async def with_handler(fd: int) -> None:
    async with await AsyncSession.open(socket.socket(fileno=fd), on_event=on_event) as session:
        await session.wait_closed()


async def awaited(fd: int) -> None:
    async with await AsyncSession.open(socket.socket(fileno=fd)) as session:
        with suppress(SessionClosed):
            while True:
                on_event(session, await session.next_event())


async def on_one_thread(one: Callable[[int], Awaitable[None]], descriptors: list[int]) -> None:
    await asyncio.gather(*(one(fd) for fd in descriptors))


def memory(session: Session, size: int) -> None:
    chunk = bytearray(CHUNK)
    times = []
    for gpa in range(0, size, CHUNK):
        began = perf_counter()
        session.read_pages(gpa, chunk)
        times.append(perf_counter() - began)
        if int.from_bytes(chunk[-8:], "little") != gpa + CHUNK - PAGE:
            sys.exit(f"not the memory at {gpa:#x}")
    sys.stdout.write(json.dumps({"chunk_us": sorted(times)[len(times) // 10] * 1e6}))


async def idle(count: int) -> None:
    async def blocking() -> Session:
        session = Session(socket.socket(fileno=ends.pop()))
        session.next_event(0)
        return session

    async def on_the_loop() -> AsyncSession:
        session = await AsyncSession.open(socket.socket(fileno=ends.pop()), on_event=on_event)
        await asyncio.sleep(0)
        return session

    async def size_of_one(make: Callable[[], Awaitable[object]]) -> int:
        first = await make()
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        kept = [await make() for _ in range(count)]
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
        del first, kept
        return grown // count

    ends = [one.detach() for one, _ in pairs(2 * count + 2)]
    tracemalloc.start()
    sizes = {"blocking_bytes": await size_of_one(blocking), "asyncio_bytes": await size_of_one(on_the_loop)}
    sys.stdout.write(json.dumps(sizes))


def pairs(count: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Connections whose other ends stay open."""
    for _ in range(count):
        one, other = socket.socketpair()
        other.detach()
        yield one, other


def main(what: str, *arguments: str) -> None:
    numbers = [int(argument) for argument in arguments]
    if what in ("asyncio", "awaited"):
        asyncio.run(on_one_thread(with_handler if what == "asyncio" else awaited, numbers))
    elif what == "idle":
        asyncio.run(idle(*numbers))
    else:
        run = {"events": events, "registers": registers, "loop": loop, "memory": memory}[what]
        with Session(socket.socket(fileno=numbers[0])) as session, suppress(SessionClosed):
            run(session, *numbers[1:])


main(*sys.argv[1:])
