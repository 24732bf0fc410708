# SPDX-License-Identifier: LGPL-2.1-or-later
"""A blocking session with the kernel end, over a connected stream socket. One thread a session.

Every wait has a deadline: commands take ``timeout`` seconds at most, :meth:`Session.next_event` what it is told. Events
that arrive while a command waits for its answer are kept, in order, for :meth:`Session.next_event`.
"""

from __future__ import annotations

import select
import socket
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from types import TracebackType
from typing import NoReturn, Self, TypeVar
from uuid import UUID

from kvmi_host.introspect.batch import Batch
from kvmi_host.introspect.errors import SessionClosed, SessionTimeout
from kvmi_host.introspect.roundtrip import RoundTrip, receive_pages
from kvmi_host.protocol import (
    Access,
    Action,
    CommandError,
    Connection,
    Cpuid,
    ErrorCode,
    Event,
    MemoryType,
    PageFaultReply,
    ProtocolError,
    Registers,
    Reply,
    Request,
    VcpuState,
    Version,
    command_name,
    messages,
)
from kvmi_host.protocol.dialects import V6
from kvmi_host.protocol.messages import PAGE_SIZE
from kvmi_host.protocol.pages import MOST_PAGES, PageReads

T = TypeVar("T")

MAX_WAITING_EVENTS = 4097
"""One event per vCPU can wait for its reply, KVM has at most 4096 vCPUs, and UNHOOK waits for none: a peer that sends
more while it leaves a command unanswered is not a kernel."""

Tap = Callable[[bool, bytes], None]
"""Is told of everything that crosses the socket, in pieces of any size: whether this side sent it, and the bytes."""

_CHUNK = 65536
_FOREVER = 2_000_000.0
"""Seconds, which poll can still count in milliseconds: no wait is longer."""
_SEND = socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT
_NOT_ALLOWED = (ErrorCode.EPERM, ErrorCode.ENOENT, ErrorCode.EINVAL)  # forbidden, or a number the kernel lacks


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """Which VM is at the other end, as far as we were told.

    :ivar start_time: seconds since the epoch.
    :ivar method: how it was attached to.
    :ivar policy: what it was attached with: a profile, a policy file's path, or ``list``.
    """

    uuid: UUID
    name: str | None = None
    start_time: int | None = None
    pid: int | None = None
    method: str = "socket"
    policy: str = "unknown"


class Session(RoundTrip):
    """Commands and events of one VM.

    Every command may raise :class:`~kvmi_host.protocol.CommandError` (refused; the session goes on),
    :class:`~kvmi_host.protocol.ProtocolError`, :class:`SessionTimeout` and :class:`SessionClosed`.

    :ivar peer: what is known of the VM; None if nothing is.
    :ivar timeout: the deadline of a command in seconds.
    """

    def __init__(
        self, sock: socket.socket, *, peer: PeerInfo | None = None, timeout: float = 10.0, tap: Tap | None = None
    ) -> None:
        """
        :param sock: a connected stream socket with KVM at its other end. The session owns it from now on.
        :param tap: what it raises, it raises out of the method that was called.
        """
        sock.setblocking(True)
        self._tap = tap
        self.peer = peer
        self.timeout = timeout
        self._sock = sock
        self._fd = -1 if tap else sock.fileno()
        self._due = 0
        self._direct = False
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._connection = Connection()
        self._events: deque[Event] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection: the kernel ends the session, and the VM goes on. May be called again."""
        self._fd = -1
        self._sock.close()

    @property
    def closed(self) -> bool:
        """Whether this side closed the connection."""
        return self._sock.fileno() < 0

    def fileno(self) -> int:
        """The socket's descriptor, for poll and its like. Look at :attr:`waiting` first: events may be here already."""
        return self._sock.fileno()

    @property
    def waiting(self) -> int:
        """How many events were received and not taken with :meth:`next_event`."""
        return len(self._events)

    # -- commands

    def get_version(self) -> Version:
        """The interface's version (1) and dialect (``v6``)."""
        return self.ask(messages.get_version())

    def check_command(self, command: int) -> bool:
        """Whether the kernel has `command` and this session may send it."""
        return self._allowed(messages.check_command(command))

    def check_event(self, event: int) -> bool:
        """Whether the kernel has `event` and this session may enable it."""
        return self._allowed(messages.check_event(event))

    def guest_info(self) -> int:
        """How many vCPUs the VM has."""
        return self.ask(messages.guest_info())

    def vcpu_info(self, vcpu: int) -> int:
        """The vCPU's TSC frequency in Hz; 0 if the host does not know it."""
        return self.ask(messages.vcpu_info(vcpu))

    def pause_vcpu(self, vcpu: int, wait: bool = False) -> None:
        """Ask for one PAUSE_VCPU event. `wait`: return once the vCPU has left the guest."""
        self.ask(messages.pause_vcpu(vcpu, wait))

    def control_vm_events(self, event: int, enable: bool) -> None:
        """Switch UNHOOK or CREATE_VCPU events.

        :raise ValueError: it is an event of vCPUs.
        """
        self.ask(messages.control_vm_events(event, enable))

    def control_events(self, vcpu: int, event: int, enable: bool) -> None:
        """Switch an event of one vCPU."""
        self.ask(messages.control_events(vcpu, event, enable))

    def control_cr(self, vcpu: int, cr: int, enable: bool) -> None:
        """Watch writes to control register 0, 3 or 4 of one vCPU. The CR event must be enabled as well."""
        self.ask(messages.control_cr(vcpu, cr, enable))

    def control_msr(self, vcpu: int, msr: int, enable: bool) -> None:
        """Watch writes to an MSR of one vCPU. The MSR event must be enabled as well."""
        self.ask(messages.control_msr(vcpu, msr, enable))

    def control_cmd_response(self, enable: bool, now: bool = True) -> None:
        """Switch the answers to commands, from this one on (`now`) or from the next.

        While they are off, commands return at once, and one whose answer would hold data makes the kernel end the
        session.
        """
        self.ask(messages.control_cmd_response(enable, now))

    def get_registers(self, vcpu: int, msrs: Iterable[int] = ()) -> VcpuState:
        """A vCPU's mode and registers, and the MSRs with these indices."""
        return self.ask(messages.get_registers(vcpu, msrs))

    def set_registers(self, vcpu: int, registers: Registers) -> None:
        """Set a vCPU's general registers. Takes effect when its pending event is replied to."""
        self.ask(messages.set_registers(vcpu, registers))

    def cpuid(self, vcpu: int, function: int, index: int = 0) -> Cpuid:
        """What the guest's CPUID instruction gives for EAX = `function` and ECX = `index`."""
        return self.ask(messages.cpuid(vcpu, function, index))

    def xsave(self, vcpu: int) -> bytes:
        """A vCPU's x87, SSE, AVX and further state, in the standard format of the XSAVE instruction."""
        return self.ask(messages.xsave(vcpu))

    def inject_exception(self, vcpu: int, vector: int, error_code: int | None = None, address: int = 0) -> None:
        """Have a vCPU take an exception before it goes on.

        :param error_code: None: the exception comes without one.
        :param address: for a page fault (14): what goes to CR2.
        """
        self.ask(messages.inject_exception(vcpu, vector, error_code, address))

    def page_access(self, *gpas: int) -> tuple[Access, ...]:
        """What the guest may do with the pages at these physical addresses.

        :raise ValueError: more than a message holds.
        """
        return self.ask(messages.page_access(gpas))

    def set_page_access(self, access: Mapping[int, int]) -> None:
        """Say what the guest may do with pages, by physical address; what it may not becomes a PF event.

        :raise ValueError: more than a message holds.
        """
        self.ask(messages.set_page_access(access))

    def mtrr_type(self, gpa: int) -> MemoryType:
        """The memory type that the guest's MTRRs give a physical address."""
        return self.ask(messages.mtrr_type(gpa))

    def read_physical(self, gpa: int, size: int) -> bytes:
        """`size` bytes of guest memory at physical address `gpa`, within one 4096-byte page."""
        return self.ask(messages.read_physical(gpa, size))

    def read_pages(self, gpa: int, buffer: bytearray | memoryview) -> None:
        """Fill `buffer` with guest memory from physical address `gpa` on. Both are whole pages of 4096 bytes.

        Many times as fast as a command for each. The deadline is that of each answer after the one before it, and at
        most doubled.

        :raise CommandError: the first refusal, when all answers to up to 1024 pages' commands were taken: the pages
            that were refused are zero, and what comes after these 1024 was not read.
        :raise ValueError: not whole pages.
        """
        view = memoryview(buffer).cast("B")
        if gpa % PAGE_SIZE or len(view) % PAGE_SIZE:
            raise ValueError(f"{len(view)} bytes at {gpa:#x} are not whole pages of {PAGE_SIZE}")
        for start in range(0, len(view), MOST_PAGES * PAGE_SIZE):
            run = view[start : start + MOST_PAGES * PAGE_SIZE]
            if self._tap:
                pages = range(gpa + start, gpa + start + len(run), PAGE_SIZE)
                run[:] = b"".join(self.ask_all([messages.read_physical(page, PAGE_SIZE) for page in pages]))
            else:
                self._read_run(PageReads(self._connection, gpa + start, run))

    def write_physical(self, gpa: int, data: bytes) -> None:
        """Write guest memory at physical address `gpa`, within one 4096-byte page."""
        self.ask(messages.write_physical(gpa, data))

    def max_gfn(self) -> int:
        """The guest's highest frame number (physical address / 4096)."""
        return self.ask(messages.max_gfn())

    def request(self, command: int, payload: bytes = b"", vcpu: int | None = None) -> bytes:
        """Any command, by its number.

        :param payload: what follows the header, or the vCPU header where `vcpu` is given.
        :return: what follows the error code of the answer; empty when the answers are switched off.
        """
        return self.ask(messages.raw(command, payload, vcpu))

    def ask(self, request: Request[T]) -> T:
        """Send any command of :mod:`kvmi_host.protocol.messages`, and wait for its answer."""
        deadline = monotonic() + self.timeout
        seq, answered, data = self._connection.command(request)
        self.send_raw(data)
        if not answered:
            return request.decode(b"")
        while True:
            while (message := self._connection.next_message()) is not None:
                if isinstance(message, Event):
                    self._keep(message)
                elif message.seq == seq:
                    self._settle()
                    return request.decode(message.result())
                # Any other answer is of a command that its caller has given up waiting for.
            if not self._receive(deadline):
                raise SessionTimeout(f"{command_name(request.command)}: no answer in {self.timeout} s")

    def ask_all(self, requests: Sequence[Request[T] | Reply]) -> list[T]:
        """Send many commands, and replies among them, without waiting for the answers in between.

        :return: what each command gave, in their order; None for a reply.

        The deadline is that of each answer after the one before it.

        :raise CommandError: the first refusal, when all answers were taken.
        """
        batch = Batch(self._connection, requests)
        unsent = memoryview(batch.piece())
        deadline = monotonic() + self.timeout
        while unsent or batch.unanswered:
            # The kernel does not read on while its answers are not taken, so both directions are waited for.
            ready = self._wait(select.POLLIN | (select.POLLOUT if unsent else 0), deadline)
            if not ready:
                raise SessionTimeout(f"{batch.unanswered} of {len(requests)} commands: no answer in {self.timeout} s")
            if ready & select.POLLOUT:
                unsent = unsent[self._send(unsent) :] or memoryview(batch.piece())
            if ready & ~select.POLLOUT and self._receive(0.0):
                deadline = monotonic() + self.timeout
                while (message := self._connection.next_message()) is not None:
                    if isinstance(message, Event):
                        self._keep(message)
                    else:
                        batch.take(message)
        self._settle()
        return batch.results()

    # -- events: next_event and reply are RoundTrip's

    def send_raw(self, data: bytes) -> None:
        """Send bytes as they are: for tests of the other end, and for messages made elsewhere.

        :raise SessionTimeout: the peer does not read. What was sent may end in the middle of a message: close.
        """
        sent = self._send(data)
        if sent == len(data):
            return
        deadline = monotonic() + self.timeout
        left = memoryview(data)[sent:]
        while left:
            if not self._wait(select.POLLOUT, deadline):
                raise SessionTimeout(f"the peer has not read for {self.timeout} s")
            left = left[self._send(left) :]

    # -- the two directions

    def _allowed(self, request: Request[None]) -> bool:
        try:
            self.ask(request)
        except CommandError as error:
            if error.code in _NOT_ALLOWED:
                return False
            raise
        return True

    def _read_run(self, reads: PageReads) -> None:
        unsent = reads.commands
        deadline = monotonic() + self.timeout
        self._take_over()
        try:
            while unsent or reads.unanswered:
                ready = self._wait(select.POLLIN | (select.POLLOUT if unsent else 0), deadline)
                if not ready:
                    raise SessionTimeout(f"{reads.unanswered} pages: no answer in {self.timeout} s")
                if ready & select.POLLOUT:
                    unsent = unsent[self._send(unsent) :]
                if ready & ~select.POLLOUT:
                    deadline = monotonic() + self.timeout
                    self._receive_pages(reads, 0 if unsent else self.timeout)
        finally:
            if reads.unanswered:
                reads.leave()
        self._settle()
        reads.result()

    def _receive_pages(self, reads: PageReads, patience: float) -> None:
        if not reads.laid_out and not reads.resume():
            self._receive(0.0)
        else:
            try:
                size = receive_pages(self._sock.fileno(), reads, int(min(patience, _FOREVER) * 1000))
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._lost(error)
            reads.received(size)
            if not size:
                reads.leave()
                self._connection.receive_data(b"")
                raise SessionClosed("the session has ended")
        while not reads.laid_out and (message := self._connection.next_message()) is not None:
            if isinstance(message, Event):
                self._keep(message)
            else:
                reads.take(message)

    def _keep(self, event: Event) -> None:
        if len(self._events) >= MAX_WAITING_EVENTS:
            self.close()
            raise ProtocolError(f"the peer sent {MAX_WAITING_EVENTS} events without waiting for a reply")
        self._events.append(event)

    def _next_event(self, timeout: float, received: bytes = b"") -> Event | None:
        deadline = monotonic() + timeout
        if received:
            self._feed(received)
        if self._events:
            return self._events.popleft()
        while True:
            while (message := self._connection.next_message()) is not None:
                if isinstance(message, Event):
                    self._settle()
                    return message
            if not self._receive(deadline):
                self._settle()
                return None

    def _reply(
        self,
        event: Event,
        action: int = Action.CONTINUE,
        *,
        new_val: int | None = None,
        page_fault: PageFaultReply | None = None,
    ) -> None:
        self.send_raw(self._connection.reply(event, action, new_val, page_fault))

    def _receive(self, deadline: float) -> bool:
        """Feed the connection once; False when the deadline passed before there was anything."""
        left = deadline - monotonic()
        if not self._readable.poll(min(left, _FOREVER) * 1000 if left > 0 else 0):
            return False
        try:
            data = self._sock.recv(_CHUNK, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError as error:
            self._lost(error)
        if self._tap:
            self._tap(False, data)
        self._feed(data)
        if not data:
            raise SessionClosed("the session has ended")
        return True

    def _feed(self, data: bytes) -> None:
        self._take_over()
        self._connection.receive_data(data)

    def _take_over(self) -> None:
        """What comes next is received here, not by the compiled round trip."""
        if self._direct:
            self._direct = False
            self._connection.due = self._due

    def _settle(self) -> None:
        """What comes next may be received by the compiled round trip, if nothing that came before is left."""
        connection = self._connection
        if connection.due is not None:
            self._due = connection.due
            nothing_left = not self._events and not connection.pending
            self._direct = nothing_left and connection.dialect is V6 and self._tap is None

    def _send(self, data: bytes | memoryview) -> int:
        """Send what the socket takes now; how many bytes that was."""
        try:
            sent = self._sock.send(data, _SEND)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._lost(error)
        if self._tap:
            self._tap(True, bytes(data[:sent]))
        return sent

    def _wait(self, events: int, deadline: float) -> int:
        """Wait for poll's `events`: those that are there, 0 when the deadline passed before there was any."""
        if self.closed:
            raise SessionClosed("the session has ended")
        poll = select.poll()
        poll.register(self._sock, events)
        left = min(max(0.0, deadline - monotonic()), _FOREVER)
        ready = poll.poll(left * 1000)
        return ready[0][1] if ready else 0

    def _lost(self, error: OSError) -> NoReturn:
        if self.closed:
            raise SessionClosed("the session has ended") from None
        raise SessionClosed(f"the connection is lost: {error.strerror}") from error
