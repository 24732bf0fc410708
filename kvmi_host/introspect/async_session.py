# SPDX-License-Identifier: LGPL-2.1-or-later
"""A session with the kernel end for asyncio: many on one thread, commands of one from several tasks at once.

Deadlines and errors are those of the blocking :class:`~kvmi_host.introspect.Session`. Events go one of two ways: to
`on_event`, which is called as they are received and is the faster, or to :meth:`AsyncSession.next_event`::

    async with await AsyncSession.open(sock) as session:
        vcpus = await session.ask(messages.guest_info())
        await session.ask_all([messages.control_events(vcpu, EventId.HYPERCALL, True) for vcpu in range(vcpus)])
        while event := await session.next_event():
            session.reply(event)
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

from kvmi_host.introspect.batch import Batch
from kvmi_host.introspect.errors import SessionClosed, SessionTimeout
from kvmi_host.introspect.roundtrip import Replying, event_in
from kvmi_host.introspect.session import MAX_WAITING_EVENTS, PeerInfo
from kvmi_host.protocol import (
    Action,
    Answer,
    Connection,
    Event,
    KvmiError,
    PageFaultReply,
    ProtocolError,
    Reply,
    Request,
)
from kvmi_host.protocol.dialects import V6

T = TypeVar("T")

Handler = Callable[["AsyncSession", Event], None]

_CHUNK = 65536
_buffers = threading.local()
_MAX_UNREAD = 4 << 20
"""Bytes that may wait for a peer which does not read: more than the replies to MAX_WAITING_EVENTS page faults. Commands
wait long before."""


class AsyncSession(Replying, asyncio.BufferedProtocol):
    """Commands and events of one VM. Made by :meth:`open`, for the event loop that runs then.

    :ivar peer: what is known of the VM; None if nothing is.
    :ivar timeout: the deadline of a command in seconds.
    """

    _transport: asyncio.Transport

    def __init__(self, sock: socket.socket, peer: PeerInfo | None, timeout: float, on_event: Handler | None) -> None:
        """Use :meth:`open`."""
        self._sock = sock
        self._fd = -1
        self._direct = True
        self.peer = peer
        self.timeout = timeout
        self._on_event = on_event
        self._loop = asyncio.get_running_loop()
        self._connection = Connection()
        self._buffer = _buffer()
        self._events: deque[Event] = deque()
        self._taker: asyncio.Future[bool] | None = None
        self._deadline = 0.0  # of the taker, in the loop's time
        self._alarm: asyncio.TimerHandle | None = None
        self._batches: dict[Batch[Any], asyncio.Future[bool]] = {}
        self._writable = asyncio.Event()
        self._writable.set()
        self._error: KvmiError | None = None
        self._lost: asyncio.Future[None] = self._loop.create_future()

    @classmethod
    async def open(
        cls,
        sock: socket.socket,
        *,
        peer: PeerInfo | None = None,
        timeout: float = 10.0,
        on_event: Handler | None = None,
    ) -> Self:
        """
        :param sock: a connected stream socket with KVM at its other end. The session owns it from now on.
        :param on_event: called with this session and each event, in order, as soon as it is received;
            :meth:`next_event` gets none then. It may call :meth:`reply`, at once or later, and must not block. If it
            raises, the session is closed, the guest goes on, and the loop's exception handler is told.
        """

        loop = asyncio.get_running_loop()
        return (await loop.create_connection(lambda: cls(sock, peer, timeout, on_event), sock=sock))[1]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()
        await self.wait_closed()

    def close(self) -> None:
        """Close the connection: the kernel ends the session, and the VM goes on. May be called again."""
        if self._error is None:
            self._end(SessionClosed("the session has ended"))

    async def wait_closed(self) -> None:
        """Return when the connection is closed, by whichever end. What is used after it says why."""
        await asyncio.shield(self._lost)

    @property
    def closed(self) -> bool:
        """Whether the session is over, whichever end closed it."""
        return self._error is not None

    @property
    def waiting(self) -> int:
        """How many events were received and not taken with :meth:`next_event`."""
        return len(self._events)

    # -- commands

    async def ask(self, request: Request[T]) -> T:
        """Send any command of :mod:`kvmi_host.protocol.messages`, and wait for its answer.

        :raise CommandError: the kernel refused; the session goes on.
        """
        return (await self.ask_all((request,)))[0]

    async def ask_all(self, requests: Sequence[Request[T] | Reply]) -> list[T]:
        """Send many commands, and replies among them, without waiting for the answers in between.

        :return: what each command gave, in their order; None for a reply.

        The deadline is that of each answer after the one before it, and at most doubled.

        :raise CommandError: the first refusal, when all answers were taken.
        """
        batch = Batch(self._connection, requests)
        self._batches[batch] = self._loop.create_future()
        try:
            while piece := await self._next_piece(batch):
                self._transport.write(piece)
            while left := batch.unanswered:
                done = await self._wait(self._batches[batch], self.timeout)
                if self._error and batch.unanswered:
                    self._fail(self._error)
                if batch.unanswered == left:
                    raise SessionTimeout(f"{left} of {len(requests)} commands: no answer in {self.timeout} s")
                if not done:
                    self._batches[batch] = self._loop.create_future()
        finally:
            del self._batches[batch]
        return batch.results()

    # -- events; reply() is Replying's

    async def next_event(self, timeout: float | None = None) -> Event | None:
        """The next event, or None when `timeout` seconds have passed without one.

        :param timeout: None is the session's own timeout; 0 only looks.
        :raise SessionClosed: the peer is gone and every event it sent was taken.
        :raise ValueError: another task waits for it, or events go to `on_event`.
        """
        if self._on_event or self._taker:
            raise ValueError("events go to on_event" if self._on_event else "another task waits for the next event")
        if not self._events and self._error is None:
            self._taker = self._loop.create_future()
            self._deadline = self._loop.time() + (self.timeout if timeout is None else timeout)
            if self._alarm is None or self._deadline < self._alarm.when():
                self._set_alarm()
            try:
                await self._taker
            finally:
                self._taker = None
        if self._events:
            return self._events.popleft()
        if self._error:
            self._fail(self._error)
        return None

    def wake(self) -> None:
        """Have :meth:`next_event` return None now, if a task waits in it and there is no event."""
        if self._taker:
            _set(self._taker, False)

    def send_raw(self, data: bytes) -> None:
        """Send bytes as they are: for messages made elsewhere. Does not wait.

        :raise SessionClosed: the peer is gone, or it does not read.
        """
        if self._error:
            self._fail(self._error)
        self._transport.write(data)
        if self._fd < 0 and self._transport.get_write_buffer_size() > _MAX_UNREAD:
            self._end(SessionClosed(f"the peer does not read: {_MAX_UNREAD} bytes wait for it"))

    # -- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The transport is there."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(0)
        self.resume_writing()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where to receive."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes came."""
        try:
            if self._direct and (event := event_in(self._buffer, nbytes)) is not None:
                self._connection.count(event.seq)
                self._deliver(event)
                return
            self._connection.receive_data(bytes(self._buffer[:nbytes]))
            while self._error is None and (message := self._connection.next_message()) is not None:
                if isinstance(message, Event):
                    self._deliver(message)
                else:
                    self._take(message)
            self._direct = not self._connection.pending and self._connection.dialect is V6
        except ProtocolError as error:
            self._end(error)
        except BaseException:
            self._end(SessionClosed("the session has ended: its on_event raised"))
            raise

    def eof_received(self) -> None:
        """The peer closed."""
        try:
            self._connection.receive_data(b"")
        except ProtocolError as error:
            self._end(error)
        else:
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        """The transport is closed."""
        if isinstance(error, OSError) and self._error is None:
            self._end(SessionClosed(f"the connection is lost: {error.strerror}"))
        self.close()
        self._lost.set_result(None)

    def pause_writing(self) -> None:
        """Not all that was written went out: what comes next has to wait behind it."""
        self._fd = -1
        self._writable.clear()

    def resume_writing(self) -> None:
        """All went out."""
        self._fd = -1 if self._error else self._sock.fileno()
        self._writable.set()

    # -- below

    def _take(self, answer: Answer) -> None:
        # Answers come nearly always in the order of the commands: the first batch is the one.
        for batch, done in self._batches.items():
            if batch.take(answer):
                if not batch.unanswered:
                    _set(done, True)
                return
        # Any other answer is of a command that its caller has given up waiting for.

    def _reply(
        self,
        event: Event,
        action: int = Action.CONTINUE,
        *,
        new_val: int | None = None,
        page_fault: PageFaultReply | None = None,
    ) -> None:
        self.send_raw(self._connection.reply(event, action, new_val, page_fault))

    def _deliver(self, event: Event) -> None:
        if self._on_event:
            self._on_event(self, event)
            return
        if len(self._events) >= MAX_WAITING_EVENTS:
            raise ProtocolError(f"the peer sent {MAX_WAITING_EVENTS} events without waiting for a reply")
        self._events.append(event)
        if self._taker:
            _set(self._taker, True)

    async def _next_piece(self, batch: Batch[T]) -> bytes:
        """The bytes of the next commands, when all that was written before went out; empty if there are none left."""
        if not self._writable.is_set():
            try:
                async with asyncio.timeout(self.timeout):
                    await self._writable.wait()
            except TimeoutError:
                raise SessionTimeout(f"the peer has not read for {self.timeout} s") from None
        if self._error:
            self._fail(self._error)
        return batch.piece()

    async def _wait(self, future: asyncio.Future[bool], seconds: float) -> bool:
        """Wait for `future`; False when so many seconds have passed first."""
        expiry = self._loop.call_later(seconds, _set, future, False)
        try:
            return await future
        finally:
            expiry.cancel()

    def _set_alarm(self) -> None:
        # One for many waits: it is put off when it rings too early, which costs less than one for each.
        if self._alarm:
            self._alarm.cancel()
        self._alarm = self._loop.call_at(self._deadline, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        if self._taker:
            if self._loop.time() < self._deadline:
                self._set_alarm()
            else:
                _set(self._taker, False)

    def _end(self, error: KvmiError) -> None:
        """The session is over because of `error`; whoever waits is told."""
        if self._error:
            return
        self._error = error
        self._fd = -1
        self._transport.close()
        if self._transport.get_write_buffer_size():  # what is left is sent if the peer reads
            self._loop.call_later(self.timeout, self._transport.abort)
        self._writable.set()
        if self._alarm:
            self._alarm.cancel()
        for waiting in (*self._batches.values(), *((self._taker,) if self._taker else ())):
            _set(waiting, True)

    def _fail(self, error: KvmiError) -> NoReturn:
        raise error.with_traceback(None)


def _buffer() -> memoryview:
    """Where every session of this thread receives: what came is taken out before another one may receive."""
    try:
        buffer: memoryview = _buffers.buffer
    except AttributeError:
        buffer = _buffers.buffer = memoryview(bytearray(_CHUNK))
    return buffer


def _set(future: asyncio.Future[bool], result: bool) -> None:
    if not future.done():
        future.set_result(result)
