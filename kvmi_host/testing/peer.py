# SPDX-License-Identifier: LGPL-2.1-or-later
"""A simulated kernel end of a session: what KVM does with the socket, in Python, for tests without KVM.

It follows the rules of the KVMI protocol, version 6, as the introspector sees them: framing, padding, refusals, one
event at a time per vCPU, replies checked before they are believed. It runs no guest: tests fire the events.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from struct import Struct
from types import TracebackType
from typing import NamedTuple, Self

from kvmi_host.protocol import Access, Action, Command, ErrorCode, EventId, Framer, MemoryType, ProtocolError, frame
from kvmi_host.protocol.framing import MAX_PAYLOAD
from kvmi_host.protocol.ids import ALWAYS_ALLOWED, CHANGES_THE_GUEST, KVMI_VERSION, VM_EVENTS
from kvmi_host.protocol.msrs import WATCHABLE
from kvmi_host.protocol.x86 import XSAVE_SIZE

PAGE = 4096
_VCPU_HEADER = 8
_REPLY_MINIMUM = _VCPU_HEADER + 2  # action and event
_REPLY_COMMON = _VCPU_HEADER + 8
_OWN_REPLY: dict[int, int] = {EventId.CR: 8, EventId.MSR: 8, EventId.PF: 272}
_CONTINUE_OR_CRASH = frozenset({Action.CONTINUE, Action.CRASH})
_ACCEPTED: dict[int, frozenset[Action]] = dict.fromkeys(
    (EventId.BREAKPOINT, EventId.PF, EventId.DESCRIPTOR), frozenset(Action)
)
_VCPU_COMMANDS = frozenset(
    {
        Command.GET_VCPU_INFO,
        Command.PAUSE_VCPU,
        Command.CONTROL_EVENTS,
        Command.CONTROL_CR,
        Command.CONTROL_MSR,
        Command.GET_REGISTERS,
        Command.SET_REGISTERS,
        Command.GET_CPUID,
        Command.GET_XSAVE,
        Command.INJECT_EXCEPTION,
    }
)
_NO_STATE = bytes(144 + 312)  # kvm_regs, kvm_sregs
_MAX_PAUSES = 1000


class Violation(Exception):
    """The introspector broke a rule for which the kernel ends the session."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A valid reply. ``own`` has the event's whole own data: what was not sent is zero."""

    action: int
    own: bytes


class Injected(NamedTuple):
    """An exception that a vCPU will take. ``error_code``: None if it comes without one."""

    vector: int
    error_code: int | None
    address: int


class _Waiting(NamedTuple):
    """An event that its vCPU waits for the reply to."""

    seq: int
    event: int
    own: bytes
    replies: SimpleQueue[Reply | None]


@dataclass(slots=True)
class _Vcpu:
    started: bool = True
    announced: bool = False
    events: set[int] = field(default_factory=set)
    registers: set[int] = field(default_factory=set)
    msrs: set[int] = field(default_factory=set)
    injected: Injected | None = None
    pauses: int = 0
    waiting: _Waiting | None = None


class SimulatedKernel:
    """The kernel end of one session, served by a thread.

    :ivar memory: the guest's physical memory.
    :ivar carried_out: the commands that were, in order.
    :ivar why: what ended the session, once it has.
    """

    def __init__(
        self,
        sock: socket.socket,
        vcpus: int = 1,
        *,
        not_started: Collection[int] = (),
        commands: Iterable[int] | None = None,
        events: Iterable[int] | None = None,
        observe: bool = False,
        announce: bool = False,
        pages: int = 4,
    ) -> None:
        """
        :param sock: the kernel's end of a connected stream socket. A duplicate is kept, as the kernel does.
        :param not_started: vCPUs that the guest has not started: their commands are answered -EAGAIN.
        :param commands: allowed besides the three that always are; None allows all.
        :param events: allowed; None allows all.
        :param observe: hooked with the OBSERVE flag.
        :param announce: vCPUs send CREATE_VCPU when it is enabled, as they do from then on when they first run; else
            tests fire it.
        """
        self._sock = sock.dup()
        self.memory = bytearray(pages * PAGE)
        self.carried_out: list[int] = []
        self.why: str | None = None
        known = frozenset(_COMMANDS)
        forbidden = CHANGES_THE_GUEST if observe else frozenset()
        self._commands: frozenset[int] = (
            known if commands is None else known & frozenset(commands)
        ) - forbidden | ALWAYS_ALLOWED
        self._events: frozenset[int] = frozenset(EventId if events is None else events)
        self._observe = observe
        self._announce = announce
        self._vcpus = [_Vcpu(started=index not in not_started) for index in range(vcpus)]
        self._vm_events: set[int] = set()
        self._access: dict[int, int] = {}
        self._answers = True
        self._answer_this = True
        self._seq = 0
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        self._ended = threading.Event()
        threading.Thread(target=self._serve, name="kvmi-recv", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.end("the test is over")
        self._sock.close()

    # -- what a test does in the guest's place

    def fire(self, event: int, vcpu: int = 0, own: bytes = b"", *, mode: int = 8) -> SimpleQueue[Reply | None]:
        """Send an event, enabled or not; the queue gets its reply, or None if the session ends instead."""
        replies: SimpleQueue[Reply | None] = SimpleQueue()
        with self._lock:
            self._seq = (self._seq + 1) & 0xFFFFFFFF
            if event != EventId.UNHOOK:
                self._vcpus[vcpu].waiting = _Waiting(self._seq, event, own, replies)
            state = bytes([mode]) + bytes(7) + _NO_STATE + bytes(9 * 8)
            body = _EVENT.pack(8 + len(state), vcpu, event) + state + own
            self._send(frame(Command.EVENT, self._seq, body))
        return replies

    def await_running(self, vcpu: int = 0, timeout: float = 5.0) -> None:
        """Wait until a vCPU does not wait for a reply.

        :raise TimeoutError: it goes on waiting.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._vcpus[vcpu].waiting is None, timeout):
                raise TimeoutError(f"vCPU {vcpu} waits for the reply to its event")

    def page_access(self, gpa: int) -> int:
        """What the guest may do with a page."""
        return self._access.get(gpa // PAGE, Access.ALL)

    def waiting_for(self, vcpu: int = 0) -> int | None:
        """The kind of the event that a vCPU waits for the reply to; None if it does not wait."""
        waiting = self._vcpus[vcpu].waiting
        return waiting.event if waiting else None

    def enabled(self, event: int, vcpu: int = 0) -> bool:
        """Whether the introspector has switched an event on."""
        return event in (self._vm_events if event in VM_EVENTS else self._vcpus[vcpu].events)

    def await_enabled(self, event: int, vcpu: int = 0, enabled: bool = True, timeout: float = 5.0) -> None:
        """Wait until the introspector has switched an event on, or off.

        :raise TimeoutError: it has not.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.enabled(event, vcpu) == enabled, timeout):
                raise TimeoutError(f"event {event} on vCPU {vcpu} is not switched {'on' if enabled else 'off'}")

    def await_carried_out(self, command: int, timeout: float = 5.0) -> None:
        """Wait until the introspector has sent a command that was carried out.

        :raise TimeoutError: it has not.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: command in self.carried_out, timeout):
                raise TimeoutError(f"command {command} was not sent")

    def watched_registers(self, vcpu: int = 0) -> frozenset[int]:
        """The control registers whose writes the introspector watches."""
        return frozenset(self._vcpus[vcpu].registers)

    def access_to(self, gpa: int) -> Access:
        """What the guest may do with the page at a physical address."""
        return Access(self._access.get(gpa // PAGE, Access.ALL))

    def watched_msrs(self, vcpu: int = 0) -> frozenset[int]:
        """The MSRs whose writes the introspector watches."""
        return frozenset(self._vcpus[vcpu].msrs)

    def take_exception(self, vcpu: int = 0) -> Injected | None:
        """The guest takes the exception that the introspector asked for."""
        injected, self._vcpus[vcpu].injected = self._vcpus[vcpu].injected, None
        return injected

    def allow_all(self) -> None:
        """Who made the connection allows everything, which it does a moment after the session has begun."""
        self._commands = frozenset(_COMMANDS)
        self._events = frozenset(EventId)

    def start_vcpu(self, vcpu: int) -> None:
        """The guest starts a vCPU."""
        self._vcpus[vcpu].started = True

    def send_raw(self, data: bytes) -> None:
        """Say anything."""
        self._send(data)

    def end(self, why: str) -> None:
        """End the session, as the kernel does when it is unhooked or the VM dies."""
        self.why = self.why or why
        with contextlib.suppress(OSError):  # it may have ended before
            self._sock.shutdown(socket.SHUT_RDWR)
        for vcpu in self._vcpus:
            if vcpu.waiting:
                vcpu.waiting.replies.put(None)
                vcpu.waiting = None
        self._ended.set()

    def wait_ended(self, timeout: float = 5.0) -> str:
        """Wait for the end of the session; why it ended.

        :raise TimeoutError: it goes on.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError("the session has not ended")
        return self.why or ""

    # -- the receiving thread

    def _serve(self) -> None:
        framer = Framer()
        try:
            while data := self._sock.recv(65536):
                framer.feed(data)
                while (message := framer.next_frame()) is not None:
                    self._message(message.id, message.seq, message.payload)
            self.end("the introspector closed")
        except (Violation, ProtocolError, OSError) as error:
            self.end(str(error))

    def _message(self, command: int, seq: int, payload: bytes) -> None:
        if command == Command.EVENT_REPLY:
            self._reply(seq, payload)
            return
        if command not in _COMMANDS:
            self._answer(command, seq, ErrorCode.EOPNOTSUPP)
            return
        if command not in self._commands:
            self._answer(command, seq, ErrorCode.EPERM)
            return
        self._answer_this = self._answers
        carry_out, least = _COMMANDS[command]
        vcpu = None
        if command in _VCPU_COMMANDS:
            index = self._vcpu_index(payload)
            if index >= len(self._vcpus):
                self._done(command, seq, ErrorCode.EINVAL)
                return
            vcpu, payload = self._vcpus[index], payload[_VCPU_HEADER:]
            if len(payload) >= least and not vcpu.started:
                self._done(command, seq, ErrorCode.EAGAIN)
                return
        self.carried_out.append(command)
        outcome = carry_out(self, vcpu or self._vcpus[0], payload) if len(payload) >= least else ErrorCode.EINVAL
        if isinstance(outcome, bytes):
            self._done(command, seq, 0, outcome)
        else:
            self._done(command, seq, outcome)
        with self._changed:
            self._changed.notify_all()
        for index in range(len(self._vcpus)):
            self._go_on(index)

    def _reply(self, seq: int, payload: bytes) -> None:
        if len(payload) < _REPLY_MINIMUM:
            raise Violation(f"event reply of {len(payload)} bytes")
        index = self._vcpu_index(payload)
        waiting = self._vcpus[index].waiting if index < len(self._vcpus) else None
        if waiting is None or waiting.seq != seq:
            raise Violation(f"event reply with seq {seq}, which nobody waits for")
        action = payload[_VCPU_HEADER]
        if any(payload[_REPLY_MINIMUM:_REPLY_COMMON]):
            raise Violation("event reply with padding that is not zero")
        size = _OWN_REPLY.get(waiting.event, 0)
        own = payload[_REPLY_COMMON:]
        if len(own) > size:
            raise Violation(f"event reply with {len(own)} bytes of own data, {size} expected")
        own = own.ljust(size, b"\0")
        if waiting.event == EventId.PF and not _page_fault_reply_is_valid(own):
            raise Violation("a reply to a page fault with a field that is out of range")
        if self._observe and _changes(waiting, action, own):
            raise Violation("event reply that changes the guest, in a session that observes")
        if action not in _ACCEPTED.get(waiting.event, _CONTINUE_OR_CRASH):
            action = Action.CONTINUE
        self._vcpus[index].waiting = None
        waiting.replies.put(Reply(action, own))
        with self._changed:
            self._changed.notify_all()
        self._go_on(index)

    def _vcpu_index(self, payload: bytes) -> int:
        if len(payload) < _VCPU_HEADER:
            raise Violation(f"vCPU header of {len(payload)} bytes")
        if any(payload[2:_VCPU_HEADER]):
            raise Violation("vCPU header with padding that is not zero")
        return _u16(payload)

    def _go_on(self, index: int) -> None:
        """What a vCPU has to tell before it runs on, the pauses last."""
        vcpu = self._vcpus[index]
        if vcpu.waiting or not vcpu.started:
            return
        if self._announce and not vcpu.announced and EventId.CREATE_VCPU in self._vm_events:
            vcpu.announced = True
            self.fire(EventId.CREATE_VCPU, index)
        elif vcpu.pauses:
            vcpu.pauses -= 1
            self.fire(EventId.PAUSE_VCPU, index)

    def _done(self, command: int, seq: int, error: int, data: bytes = b"") -> None:
        """The answer of a command that was carried out, unless answers are off."""
        if self._answer_this:
            self._answer(command, seq, error, data)
        elif data:
            raise Violation(f"command {command} has data to answer, and answers are off")

    def _answer(self, command: int, seq: int, error: int, data: bytes = b"") -> None:
        with self._lock:
            self._send(frame(command, seq, _ERROR.pack(error) + data))

    def _send(self, data: bytes) -> None:
        try:
            self._sock.sendall(data)
        except OSError as error:
            self.end(str(error))

    # -- the commands; each gives its answer's data, or an error code

    def _get_version(self, _vcpu: _Vcpu, _payload: bytes) -> bytes | int:
        return _U32.pack(KVMI_VERSION) + bytes(4)

    def _check_command(self, _vcpu: _Vcpu, payload: bytes) -> bytes | int:
        return _check(payload, self._commands)

    def _check_event(self, _vcpu: _Vcpu, payload: bytes) -> bytes | int:
        return _check(payload, self._events)

    def _guest_info(self, _vcpu: _Vcpu, _payload: bytes) -> bytes | int:
        return _U32.pack(len(self._vcpus)) + bytes(12)

    def _vcpu_info(self, _vcpu: _Vcpu, _payload: bytes) -> bytes | int:
        return _U64.pack(2_000_000_000)

    def _pause(self, vcpu: _Vcpu, payload: bytes) -> bytes | int:
        if payload[0] > 1 or any(payload[1:8]):
            return ErrorCode.EINVAL
        if EventId.PAUSE_VCPU not in self._events:
            return ErrorCode.EPERM
        if vcpu.pauses >= _MAX_PAUSES:
            return ErrorCode.EBUSY
        vcpu.pauses += 1
        return 0

    def _control_vm_events(self, _vcpu: _Vcpu, payload: bytes) -> bytes | int:
        return self._switch(self._vm_events, payload, VM_EVENTS)

    def _control_events(self, vcpu: _Vcpu, payload: bytes) -> bytes | int:
        return self._switch(vcpu.events, payload, frozenset(EventId) - VM_EVENTS)

    def _switch(self, enabled: set[int], payload: bytes, kinds: frozenset[EventId]) -> int:
        event, enable, *padding = _EVENT_SWITCH.unpack_from(payload)
        if event not in kinds or enable > 1 or any(padding):
            return ErrorCode.EINVAL
        if event == EventId.PAUSE_VCPU and not enable:
            return ErrorCode.EINVAL
        if event not in self._events:
            return ErrorCode.EPERM
        (enabled.add if enable else enabled.discard)(event)
        return 0

    def _control_cr(self, vcpu: _Vcpu, payload: bytes) -> bytes | int:
        enable, *padding, register = _REGISTER_SWITCH.unpack_from(payload)
        if register not in (0, 3, 4) or enable > 1 or any(padding):
            return ErrorCode.EINVAL
        (vcpu.registers.add if enable else vcpu.registers.discard)(register)
        return 0

    def _control_msr(self, vcpu: _Vcpu, payload: bytes) -> bytes | int:
        enable, *padding, msr = _REGISTER_SWITCH.unpack_from(payload)
        if not any(msr in watchable for watchable in WATCHABLE) or enable > 1 or any(padding):
            return ErrorCode.EINVAL
        (vcpu.msrs.add if enable else vcpu.msrs.discard)(msr)
        return 0

    def _cpuid(self, _vcpu: _Vcpu, payload: bytes) -> bytes | int:
        function, index = _CPUID.unpack_from(payload)
        return _CPUID_ANSWER.pack(function, index, 0, 0) if function <= _HIGHEST_CPUID else ErrorCode.ENOENT

    def _xsave(self, _vcpu: _Vcpu, _payload: bytes) -> bytes | int:
        return bytes(XSAVE_SIZE)

    def _inject(self, vcpu: _Vcpu, payload: bytes) -> bytes | int:
        vector, has_error, padding, error_code, address = _EXCEPTION.unpack_from(payload)
        if vector > _HIGHEST_EXCEPTION or vector == _NMI or has_error != (vector in _WITH_ERROR_CODE) or padding:
            return ErrorCode.EINVAL
        if vcpu.injected:
            return ErrorCode.EBUSY
        vcpu.injected = Injected(vector, error_code if has_error else None, address)
        return 0

    def _get_page_access(self, _vcpu: _Vcpu, payload: bytes) -> bytes | int:
        gpas = self._pages(payload, _U64)
        if gpas is None:
            return ErrorCode.EINVAL
        return bytes(self._access.get(gpa // PAGE, Access.ALL) for (gpa,) in gpas)

    def _set_page_access(self, _vcpu: _Vcpu, payload: bytes) -> bytes | int:
        entries = self._pages(payload, _PAGE_ACCESS)
        if entries is None or any(access not in _ACCESS or any(padding) for _, access, *padding in entries):
            return ErrorCode.EINVAL
        for gpa, access, *_ in entries:
            self._access[gpa // PAGE] = access
        return 0

    def _pages(self, payload: bytes, entry: Struct) -> list[tuple[int, ...]] | None:
        """The entries of a command about pages, each with its address first; None if they are not as they have to."""
        view, count, padding = _PAGES.unpack_from(payload)
        entries = payload[_PAGES.size :][: count * entry.size]
        if view or padding or len(entries) < count * entry.size:
            return None
        unpacked = list(entry.iter_unpack(entries))
        return unpacked if all(gpa < len(self.memory) for gpa, *_ in unpacked) else None

    def _mtrr_type(self, _vcpu: _Vcpu, payload: bytes) -> bytes | int:
        if _U64.unpack_from(payload)[0] >> _ADDRESS_BITS:
            return ErrorCode.EINVAL
        return bytes([MemoryType.WRITE_BACK]) + bytes(7)

    def _get_registers(self, _vcpu: _Vcpu, payload: bytes) -> bytes | int:
        count = _u16(payload)
        if any(payload[2:8]) or len(payload) < 8 + 4 * count:
            return ErrorCode.EINVAL
        indices = [int.from_bytes(payload[8 + 4 * i : 12 + 4 * i], "little") for i in range(count)]
        if not all(any(index in there for there in WATCHABLE) for index in indices):
            return ErrorCode.EINVAL
        entries = b"".join(_MSR.pack(index, index + 1) for index in indices)
        answer = _U32.pack(8) + bytes(4) + _NO_STATE + _U32.pack(count) + bytes(4) + entries
        return answer if len(answer) <= MAX_PAYLOAD - _ERROR.size else ErrorCode.EINVAL

    def _set_registers(self, _vcpu: _Vcpu, _payload: bytes) -> bytes | int:
        return 0

    def _read_physical(self, _vcpu: _Vcpu, payload: bytes) -> bytes | int:
        gpa, size = self._range(payload)
        return bytes(self.memory[gpa : gpa + size]) if gpa < len(self.memory) else ErrorCode.EINVAL

    def _write_physical(self, _vcpu: _Vcpu, payload: bytes) -> bytes | int:
        gpa, size = self._range(payload)
        if len(payload) < 16 + size:
            raise Violation(f"a write of {size} bytes with {len(payload) - 16}")
        if gpa >= len(self.memory):
            return ErrorCode.EINVAL
        self.memory[gpa : gpa + size] = payload[16 : 16 + size]
        return 0

    def _range(self, payload: bytes) -> tuple[int, int]:
        gpa, size = _RANGE.unpack_from(payload)
        if not 1 <= size <= PAGE or gpa % PAGE + size > PAGE:
            raise Violation(f"{size} bytes at {gpa:#x} leave the page")
        return gpa, size

    def _control_cmd_response(self, _vcpu: _Vcpu, payload: bytes) -> bytes | int:
        enable, now, *padding = payload[:8]
        if enable > 1 or now > 1 or any(padding):
            return ErrorCode.EINVAL
        self._answers = bool(enable)
        if now:
            self._answer_this = bool(enable)
        return 0

    def _max_gfn(self, _vcpu: _Vcpu, _payload: bytes) -> bytes | int:
        return _U64.pack(len(self.memory) // PAGE - 1)


_ERROR = Struct("<i4x")
_U32 = Struct("<I")
_U64 = Struct("<Q")
_EVENT = Struct("<HHB3x")
_CHECKED = Struct("<HHI")
_EVENT_SWITCH = Struct("<HBBI")
_REGISTER_SWITCH = Struct("<BBHI")
_RANGE = Struct("<QQ")
_MSR = Struct("<I4xQ")
_CPUID = Struct("<II")
_CPUID_ANSWER = Struct("<4I")
_EXCEPTION = Struct("<BBHIQ")
_PAGES = Struct("<HHI")
_PAGE_ACCESS = Struct("<QBBHI")
_PAGE_FAULT_REPLY = Struct("<8xIBBH")
_MAX_CONTEXT = 256
_HIGHEST_CPUID = 0x10
_HIGHEST_EXCEPTION = 31
_NMI = 2
_WITH_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17})
_ADDRESS_BITS = 52  # the most that x86 has
_ACCESS = frozenset(access for access in range(Access.ALL + 1) if access & Access.R or access in (0, Access.X))
"""What page tables can say: who may write may read."""

# How each is carried out, and the least payload that it takes, without the vCPU header.
_COMMANDS: dict[int, tuple[Callable[[SimulatedKernel, _Vcpu, bytes], bytes | int], int]] = {
    Command.GET_VERSION: (SimulatedKernel._get_version, 0),
    Command.CHECK_COMMAND: (SimulatedKernel._check_command, 8),
    Command.CHECK_EVENT: (SimulatedKernel._check_event, 8),
    Command.GET_GUEST_INFO: (SimulatedKernel._guest_info, 0),
    Command.GET_VCPU_INFO: (SimulatedKernel._vcpu_info, 0),
    Command.PAUSE_VCPU: (SimulatedKernel._pause, 8),
    Command.CONTROL_VM_EVENTS: (SimulatedKernel._control_vm_events, 8),
    Command.CONTROL_EVENTS: (SimulatedKernel._control_events, 8),
    Command.CONTROL_CR: (SimulatedKernel._control_cr, 8),
    Command.CONTROL_MSR: (SimulatedKernel._control_msr, 8),
    Command.GET_REGISTERS: (SimulatedKernel._get_registers, 8),
    Command.SET_REGISTERS: (SimulatedKernel._set_registers, 144),
    Command.GET_CPUID: (SimulatedKernel._cpuid, 8),
    Command.GET_XSAVE: (SimulatedKernel._xsave, 0),
    Command.READ_PHYSICAL: (SimulatedKernel._read_physical, 16),
    Command.WRITE_PHYSICAL: (SimulatedKernel._write_physical, 16),
    Command.INJECT_EXCEPTION: (SimulatedKernel._inject, 16),
    Command.GET_PAGE_ACCESS: (SimulatedKernel._get_page_access, 8),
    Command.SET_PAGE_ACCESS: (SimulatedKernel._set_page_access, 8),
    Command.GET_MTRR_TYPE: (SimulatedKernel._mtrr_type, 8),
    Command.CONTROL_CMD_RESPONSE: (SimulatedKernel._control_cmd_response, 8),
    Command.GET_MAX_GFN: (SimulatedKernel._max_gfn, 0),
}


def _changes(waiting: _Waiting, action: int, own: bytes) -> bool:
    """Whether a reply changes what the guest does: another value, its handling skipped, or its end."""
    if waiting.event in (EventId.CR, EventId.MSR) and own != waiting.own[16:24]:
        return True
    skips = action == Action.RETRY and waiting.event in (EventId.BREAKPOINT, EventId.DESCRIPTOR)
    return skips or action == Action.CRASH


def _page_fault_reply_is_valid(own: bytes) -> bool:
    size, singlestep, rep_complete, padding = _PAGE_FAULT_REPLY.unpack_from(own)
    return size <= _MAX_CONTEXT and singlestep <= 1 and rep_complete <= 1 and not padding


def _check(payload: bytes, allowed: frozenset[int]) -> int:
    number, *padding = _CHECKED.unpack_from(payload)
    if any(padding):
        return ErrorCode.EINVAL
    return 0 if number in allowed else ErrorCode.EPERM


def _u16(payload: bytes) -> int:
    return int.from_bytes(payload[:2], "little")


def next_reply(replies: SimpleQueue[Reply | None], timeout: float = 5.0) -> Reply | None:
    """The reply to an event that was fired; None if the session ended instead.

    :raise TimeoutError: there is none.
    """
    try:
        return replies.get(timeout=timeout)
    except Empty:
        raise TimeoutError("no reply to the event") from None
