# SPDX-License-Identifier: LGPL-2.1-or-later
"""A blocking session with the kernel end, over a connected stream socket. One thread a session.

Every wait has a deadline: commands take ``timeout`` seconds at most, :meth:`Session.next_event` what it is told. Events
that arrive while a command waits for its answer are kept, in order, for :meth:`Session.next_event`.
"""

from __future__ import annotations

import select
import socket
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from time import monotonic
from types import TracebackType
from typing import NoReturn, Self, TypeVar
from uuid import UUID

from kvmi_host.introspect.errors import SessionClosed, SessionTimeout
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
    Request,
    State,
    VcpuState,
    Version,
    command_name,
    messages,
)

T = TypeVar("T")

MAX_WAITING_EVENTS = 4097
"""One event per vCPU can wait for its reply, KVM has at most 4096 vCPUs, and UNHOOK waits for none: a peer that sends
more while it leaves a command unanswered is not a kernel."""

Tap = Callable[[bool, bytes], None]
"""Is told of everything that crosses the socket, in pieces of any size: whether this side sent it, and the bytes."""

_CHUNK = 65536
_NOT_ALLOWED = (ErrorCode.EPERM, ErrorCode.ENOENT, ErrorCode.EINVAL)  # forbidden, or a number the kernel lacks


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """Which VM is at the other end. ``start_time``: seconds since the epoch. None: the peer did not say."""

    uuid: UUID
    name: str | None = None
    start_time: int | None = None
    pid: int | None = None


class Session:
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
        sock.setblocking(False)
        self._tap = tap
        self.peer = peer
        self.timeout = timeout
        self._sock = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
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
        return self._ask(messages.get_version())

    def check_command(self, command: int) -> bool:
        """Whether the kernel has `command` and this session may send it."""
        return self._allowed(messages.check_command(command))

    def check_event(self, event: int) -> bool:
        """Whether the kernel has `event` and this session may enable it."""
        return self._allowed(messages.check_event(event))

    def guest_info(self) -> int:
        """How many vCPUs the VM has."""
        return self._ask(messages.guest_info())

    def vcpu_info(self, vcpu: int) -> int:
        """The vCPU's TSC frequency in Hz; 0 if the host does not know it."""
        return self._ask(messages.vcpu_info(vcpu))

    def pause_vcpu(self, vcpu: int, wait: bool = False) -> None:
        """Ask for one PAUSE_VCPU event. `wait`: return once the vCPU has left the guest."""
        self._ask(messages.pause_vcpu(vcpu, wait))

    def control_vm_events(self, event: int, enable: bool) -> None:
        """Switch UNHOOK or CREATE_VCPU events.

        :raise ValueError: it is an event of vCPUs.
        """
        self._ask(messages.control_vm_events(event, enable))

    def control_events(self, vcpu: int, event: int, enable: bool) -> None:
        """Switch an event of one vCPU."""
        self._ask(messages.control_events(vcpu, event, enable))

    def control_cr(self, vcpu: int, cr: int, enable: bool) -> None:
        """Watch writes to control register 0, 3 or 4 of one vCPU. The CR event must be enabled as well."""
        self._ask(messages.control_cr(vcpu, cr, enable))

    def control_msr(self, vcpu: int, msr: int, enable: bool) -> None:
        """Watch writes to an MSR of one vCPU. The MSR event must be enabled as well."""
        self._ask(messages.control_msr(vcpu, msr, enable))

    def control_cmd_response(self, enable: bool, now: bool = True) -> None:
        """Switch the answers to commands, from this one on (`now`) or from the next.

        While they are off, commands return at once, and one whose answer would hold data makes the kernel end the
        session.
        """
        self._ask(messages.control_cmd_response(enable, now))

    def get_registers(self, vcpu: int, msrs: Iterable[int] = ()) -> VcpuState:
        """A vCPU's mode and registers, and the MSRs with these indices."""
        return self._ask(messages.get_registers(vcpu, msrs))

    def set_registers(self, vcpu: int, registers: Registers) -> None:
        """Set a vCPU's general registers. Takes effect when its pending event is replied to."""
        self._ask(messages.set_registers(vcpu, registers))

    def cpuid(self, vcpu: int, function: int, index: int = 0) -> Cpuid:
        """What the guest's CPUID instruction gives for EAX = `function` and ECX = `index`."""
        return self._ask(messages.cpuid(vcpu, function, index))

    def xsave(self, vcpu: int) -> bytes:
        """A vCPU's x87, SSE, AVX and further state, in the standard format of the XSAVE instruction."""
        return self._ask(messages.xsave(vcpu))

    def inject_exception(self, vcpu: int, vector: int, error_code: int | None = None, address: int = 0) -> None:
        """Have a vCPU take an exception before it goes on.

        :param error_code: None: the exception comes without one.
        :param address: for a page fault (14): what goes to CR2.
        """
        self._ask(messages.inject_exception(vcpu, vector, error_code, address))

    def page_access(self, *gpas: int) -> tuple[Access, ...]:
        """What the guest may do with the pages at these physical addresses.

        :raise ValueError: more than a message holds.
        """
        return self._ask(messages.page_access(gpas))

    def set_page_access(self, access: Mapping[int, int]) -> None:
        """Say what the guest may do with pages, by physical address; what it may not becomes a PF event.

        :raise ValueError: more than a message holds.
        """
        self._ask(messages.set_page_access(access))

    def mtrr_type(self, gpa: int) -> MemoryType:
        """The memory type that the guest's MTRRs give a physical address."""
        return self._ask(messages.mtrr_type(gpa))

    def read_physical(self, gpa: int, size: int) -> bytes:
        """`size` bytes of guest memory at physical address `gpa`, within one 4096-byte page."""
        return self._ask(messages.read_physical(gpa, size))

    def write_physical(self, gpa: int, data: bytes) -> None:
        """Write guest memory at physical address `gpa`, within one 4096-byte page."""
        self._ask(messages.write_physical(gpa, data))

    def max_gfn(self) -> int:
        """The guest's highest frame number (physical address / 4096)."""
        return self._ask(messages.max_gfn())

    def request(self, command: int, payload: bytes = b"", vcpu: int | None = None) -> bytes:
        """Any command, by its number.

        :param payload: what follows the header, or the vCPU header where `vcpu` is given.
        :return: what follows the error code of the answer; empty when the answers are switched off.
        """
        return self._ask(messages.raw(command, payload, vcpu))

    # -- events

    def next_event(self, timeout: float | None = None) -> Event | None:
        """The next event, or None when `timeout` seconds have passed without one.

        :param timeout: None is the session's own timeout; 0 only looks.
        :raise SessionClosed: the peer is gone and every event it sent was taken.
        """
        if self._events:
            return self._events.popleft()
        deadline = monotonic() + (self.timeout if timeout is None else timeout)
        while True:
            while (message := self._connection.next_message()) is not None:
                if isinstance(message, Event):
                    return message
            if not self._receive(deadline):
                return None

    def reply(
        self,
        event: Event,
        action: int = Action.CONTINUE,
        *,
        new_val: int | None = None,
        page_fault: PageFaultReply | None = None,
    ) -> None:
        """Answer an event, and let its vCPU go on.

        :param new_val: for CR and MSR: the value to write instead of the guest's own.
        :param page_fault: for PF: how the access is made.
        :raise ValueError: the event has no reply, or takes no such data.
        """
        self.send_raw(self._connection.reply(event, action, new_val, page_fault))

    def send_raw(self, data: bytes) -> None:
        """Send bytes as they are: for tests of the other end, and for messages made elsewhere.

        :raise SessionTimeout: the peer does not read. What was sent may end in the middle of a message: close.
        """
        deadline = monotonic() + self.timeout
        view = memoryview(data)
        while view:
            try:
                view = view[self._sock.send(view, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                left = deadline - monotonic()
                if left <= 0 or not select.select([], [self._sock], [], left)[1]:
                    raise SessionTimeout(f"the peer has not read for {self.timeout} s") from None
            except OSError as error:
                self._lost(error)
        if self._tap:
            self._tap(True, data)

    # -- the two directions

    def _allowed(self, request: Request[None]) -> bool:
        try:
            self._ask(request)
        except CommandError as error:
            if error.code in _NOT_ALLOWED:
                return False
            raise
        return True

    def _ask(self, request: Request[T]) -> T:
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
                    return request.decode(message.result())
                # Any other answer is of a command that its caller has given up waiting for.
            if not self._receive(deadline):
                raise SessionTimeout(f"{command_name(request.command)}: no answer in {self.timeout} s")

    def _keep(self, event: Event) -> None:
        if len(self._events) >= MAX_WAITING_EVENTS:
            self.close()
            raise ProtocolError(f"the peer sent {MAX_WAITING_EVENTS} events without waiting for a reply")
        self._events.append(event)

    def _receive(self, deadline: float) -> bool:
        """Feed the connection once; False when the deadline passed before there was anything."""
        if self._connection.state is State.ENDED or self.closed:
            raise SessionClosed("the session has ended")
        left = max(0.0, deadline - monotonic())
        if not self._poll.poll(left * 1000):
            return False
        try:
            data = self._sock.recv(_CHUNK)
        except BlockingIOError:
            return True
        except OSError as error:
            self._lost(error)
        if self._tap:
            self._tap(False, data)
        self._connection.receive_data(data)
        return True

    def _lost(self, error: OSError) -> NoReturn:
        raise SessionClosed(f"the connection is lost: {error.strerror}") from error
