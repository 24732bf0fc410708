# SPDX-License-Identifier: LGPL-2.1-or-later
"""A simulated kernel end of a session: what KVM does with the socket, in Python, for tests without KVM.

It follows the rules of the KVMI protocol, version 6, as the introspector sees them: framing, padding, refusals, one
event at a time per vCPU, replies checked before they are believed. It runs no guest: tests fire the events.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Collection, Iterable
from queue import Empty, SimpleQueue
from struct import Struct
from types import TracebackType
from typing import Self

from kvmi_host.protocol import Action, Command, ErrorCode, EventId, Framer, ProtocolError, frame
from kvmi_host.testing.vm_state import (
    COMMANDS,
    NO_STATE,
    VCPU_COMMANDS,
    Reply,
    Violation,
    VmState,
    Waiting,
    u16,
)

_VCPU_HEADER = 8
_REPLY_MINIMUM = _VCPU_HEADER + 2  # action and event
_REPLY_COMMON = _VCPU_HEADER + 8
_OWN_REPLY: dict[int, int] = {EventId.CR: 8, EventId.MSR: 8, EventId.PF: 272}
_CONTINUE_OR_CRASH = frozenset({Action.CONTINUE, Action.CRASH})
_ACCEPTED: dict[int, frozenset[Action]] = dict.fromkeys(
    (EventId.BREAKPOINT, EventId.PF, EventId.DESCRIPTOR), frozenset(Action)
)


class SimulatedKernel(VmState):
    """The kernel end of one session, served by a thread.

    :ivar carried_out: the commands that were, in order.
    :ivar stopped: vCPUs that their VMM has stopped: what they are to do themselves is not done, nor answered.
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
        super().__init__(vcpus, not_started, commands, events, observe, pages)
        self._sock = sock.dup()
        self.carried_out: list[int] = []
        self.stopped: set[int] = set()
        self.why: str | None = None
        self._observe = observe
        self._announce = announce
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
                self._vcpus[vcpu].waiting = Waiting(self._seq, event, own, replies)
            state = bytes([mode]) + bytes(7) + NO_STATE + bytes(9 * 8)
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

    def waiting_for(self, vcpu: int = 0) -> int | None:
        """The kind of the event that a vCPU waits for the reply to; None if it does not wait."""
        waiting = self._vcpus[vcpu].waiting
        return waiting.event if waiting else None

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
        if command not in COMMANDS:
            self._answer(command, seq, ErrorCode.EOPNOTSUPP)
            return
        if command not in self._commands:
            self._answer(command, seq, ErrorCode.EPERM)
            return
        self._answer_this = self._answers
        carry_out, least = COMMANDS[command]
        vcpu = None
        if command in VCPU_COMMANDS:
            index = self._vcpu_index(payload)
            if index >= len(self._vcpus):
                self._done(command, seq, ErrorCode.EINVAL)
                return
            vcpu, payload = self._vcpus[index], payload[_VCPU_HEADER:]
            if len(payload) >= least and not vcpu.started:
                self._done(command, seq, ErrorCode.EAGAIN)
                return
            if index in self.stopped and command != Command.PAUSE_VCPU:
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
        return u16(payload)

    def _go_on(self, index: int) -> None:
        """What a vCPU has to tell before it runs on, the pauses last."""
        vcpu = self._vcpus[index]
        if vcpu.waiting or not vcpu.started or index in self.stopped:
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


_ERROR = Struct("<i4x")
_EVENT = Struct("<HHB3x")
_PAGE_FAULT_REPLY = Struct("<8xIBBH")
_MAX_CONTEXT = 256


def _changes(waiting: Waiting, action: int, own: bytes) -> bool:
    """Whether a reply changes what the guest does: another value, its handling skipped, or its end."""
    if waiting.event in (EventId.CR, EventId.MSR) and own != waiting.own[16:24]:
        return True
    skips = action == Action.RETRY and waiting.event in (EventId.BREAKPOINT, EventId.DESCRIPTOR)
    return skips or action == Action.CRASH


def _page_fault_reply_is_valid(own: bytes) -> bool:
    size, singlestep, rep_complete, padding = _PAGE_FAULT_REPLY.unpack_from(own)
    return size <= _MAX_CONTEXT and singlestep <= 1 and rep_complete <= 1 and not padding


def next_reply(replies: SimpleQueue[Reply | None], timeout: float = 5.0) -> Reply | None:
    """The reply to an event that was fired; None if the session ended instead.

    :raise TimeoutError: there is none.
    """
    try:
        return replies.get(timeout=timeout)
    except Empty:
        raise TimeoutError("no reply to the event") from None
