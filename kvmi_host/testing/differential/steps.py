# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is done in an exchange, step by step, and what comes of each."""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable
from enum import Enum
from itertools import pairwise
from time import monotonic
from typing import NamedTuple, Protocol

from kvmi_host.protocol import Command, CrWrite, Event, EventId, Framer, MsrWrite, command_name, event_name, frame
from kvmi_host.protocol.framing import Frame

VCPU = struct.Struct("<HHI")
_VCPU_OF = struct.Struct("<2xH")
_EVENT = struct.Struct("<H2xB")
_COMMON = struct.Struct("<BBHI")
_ERROR = struct.Struct("<i4x")
_NEW_VALUE = struct.Struct("<Q")
_PAGE_FAULT = bytes(272)
"""A reply's own data that has the access emulated."""
_BARRIER = 0xFFFF
"""No command. Its refusal comes even while answers are off, and after those of all before it that one thread gives."""
_POLL = 0.01
_COMPARED = frozenset({Command.GET_VERSION, Command.GET_GUEST_INFO, Command.GET_PAGE_ACCESS})
"""What is answered with the same bytes by either side."""


class Deed(Enum):
    """What a guest does; the event that it makes where that is on."""

    HYPERCALL = EventId.HYPERCALL
    BREAKPOINT = EventId.BREAKPOINT
    CR3 = EventId.CR
    LSTAR = EventId.MSR
    IDT = EventId.DESCRIPTOR
    WRITE = EventId.PF


class Ask(NamedTuple):
    """Send a command. ``pieces``: where to cut the message, for the writes in which it goes out."""

    command: int
    payload: bytes = b""
    pieces: tuple[int, ...] = ()


class Reply(NamedTuple):
    """Reply to the event that a vCPU waits with: as it should be, or with one of these instead.

    :ivar seq: added to its number.
    :ivar to: the vCPU in the reply.
    :ivar common: how many bytes of ``kvmi_event_reply`` there are.
    :ivar own: the own data; None: what changes nothing, or none after a common part that is short.
    :ivar cut: how many bytes of the own data there are.
    """

    vcpu: int
    action: int = 0
    seq: int = 0
    to: int | None = None
    header_padding: tuple[int, int] = (0, 0)
    padding: tuple[int, int] = (0, 0)
    common: int = 8
    own: bytes | None = None
    cut: int | None = None


class Act(NamedTuple):
    """The guest does something, on a vCPU that does not wait."""

    vcpu: int
    deed: Deed


class Raw(NamedTuple):
    """Send bytes that are no message."""

    data: bytes


Step = Ask | Reply | Act | Raw


class Seen(NamedTuple):
    """What came of a step.

    :ivar answer: ``answer SIZE``, ``error CODE``, ``silent``, or ``ended`` if the session did.
    :ivar events: by vCPU, what it waits with since.
    :ivar numbers: those of these events.
    """

    answer: str
    events: tuple[tuple[int, str], ...] = ()
    numbers: tuple[int, ...] = ()


class Guest(Protocol):
    """What a step needs of a guest."""

    def act(self, vcpu: int, deed: Deed) -> None:
        """Have a vCPU do something."""

    def at_rest(self, vcpu: int) -> bool:
        """Whether a vCPU is through with what it did."""

    def go_on(self) -> None:
        """Replies were given: the guest does what comes of them."""


class Nothing(AssertionError):
    """What has to come has not, in time."""


class Driver:
    """One end of a session, and its guest.

    :ivar waiting: the event that each vCPU waits with.
    :ivar ended: whether the session has.
    """

    def __init__(self, sock: socket.socket, guest: Guest, deadline: float) -> None:
        """
        :param sock: of a session whose other end is the kernel.
        :param deadline: seconds that anything may take.
        """
        sock.setblocking(False)
        self.waiting: dict[int, Event] = {}
        self.ended = False
        self._sock = sock
        self._guest = guest
        self._deadline = deadline
        self._framer = Framer()
        self._seq = 0
        self._came: list[Frame] = []
        self._barriers: list[int] = []

    def carry_out(self, step: Step, expected: Seen | None = None) -> Seen:
        """Do a step.

        :param expected: what has to come of it, to be waited for; None: what there is at once is all.
        :raise Nothing: it has not come.
        """
        self._came, self._barriers = [], []
        asked = self._do(step, expected)
        self._barrier()
        self._guest.go_on()
        self._barrier()
        if expected:
            self._read_until(lambda: self._has_come(expected, asked))
            self._barrier()
        return self._seen(asked)

    # -- the steps

    def _do(self, step: Step, expected: Seen | None) -> int | None:
        """The number of the message whose answer is awaited; None if none is."""
        if isinstance(step, Ask):
            return self._ask(step.command, step.payload, step.pieces)
        if isinstance(step, Reply):
            self._send(self._encode(step))
        elif isinstance(step, Raw):
            self._send(step.data)
        else:
            self._act(step, expected)
        return None

    def _act(self, step: Act, expected: Seen | None) -> None:
        # What was asked of the vCPU before has been done when it answers.
        asked = self._ask(Command.GET_VCPU_INFO, VCPU.pack(step.vcpu, 0, 0))
        self._read_until(lambda: self._answer_to(asked) is not None)
        self._read_until(lambda: self._guest.at_rest(step.vcpu))
        self._came = []
        self._guest.act(step.vcpu, step.deed)
        if expected and not expected.events:
            self._read_until(lambda: self._guest.at_rest(step.vcpu) or bool(self._new_events()))

    def _encode(self, reply: Reply) -> bytes:
        event = self.waiting.get(reply.vcpu)
        data = event.data if event else None
        own = reply.own or b""
        if reply.own is None and reply.common == _COMMON.size:
            own = _NEW_VALUE.pack(data.new) if isinstance(data, CrWrite | MsrWrite) else b""
            if event and event.event == EventId.PF:
                own = _PAGE_FAULT
        body = VCPU.pack(reply.vcpu if reply.to is None else reply.to, *reply.header_padding)
        body += _COMMON.pack(reply.action, event.event if event else 0, *reply.padding)[: reply.common]
        seq = ((event.seq if event else 0) + reply.seq) & 0xFFFFFFFF
        self.waiting.pop(reply.vcpu, None)
        return frame(Command.EVENT_REPLY, seq, body + own[: reply.cut])

    # -- the socket

    def _ask(self, command: int, payload: bytes = b"", pieces: tuple[int, ...] = ()) -> int:
        self._seq += 1
        data = frame(command, self._seq, payload)
        cuts = sorted({0, *(cut for cut in pieces if cut < len(data)), len(data)})
        for start, end in pairwise(cuts):
            self._send(data[start:end])
        return self._seq

    def _barrier(self) -> None:
        if not self.ended:
            asked = self._ask(_BARRIER)
            self._barriers.append(asked)
            self._read_until(lambda: self._answer_to(asked) is not None)

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view and not self.ended:
            try:
                view = view[self._sock.send(view, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                select.select([], [self._sock], [], self._deadline)
            except OSError:
                break  # what it said before is still to be read, and then its end

    def _read_until(self, enough: Callable[[], bool]) -> None:
        deadline = monotonic() + self._deadline
        while not enough() and not self.ended:
            if monotonic() > deadline:
                raise Nothing(f"in {self._deadline} s there was no more than {self._seen(None)}")
            if select.select([self._sock], [], [], _POLL)[0]:
                self._read()

    def _read(self) -> None:
        try:
            data = self._sock.recv(65536)
        except OSError:
            data = b""
        self.ended = not data
        self._framer.feed(data)
        while (message := self._framer.next_frame()) is not None:
            self._came.append(message)

    # -- what came

    def _answer_to(self, seq: int) -> Frame | None:
        return next((message for message in self._came if message.id != Command.EVENT and message.seq == seq), None)

    def _has_come(self, expected: Seen, asked: int | None) -> bool:
        """Whether there is as much as there has to be. The end of the session is not looked for here."""
        if expected.answer == "ended":
            return False
        answered = expected.answer == "silent" or asked is None or self._answer_to(asked) is not None
        return answered and {vcpu for vcpu, _ in expected.events} <= self._new_events().keys()

    def _new_events(self) -> dict[int, Frame]:
        return {_VCPU_OF.unpack_from(m.payload)[0]: m for m in self._came if m.id == Command.EVENT}

    def _seen(self, asked: int | None) -> Seen:
        events = self._new_events()
        self.waiting |= {vcpu: Event(message.seq, message.payload) for vcpu, message in events.items()}
        if self.ended:
            return Seen("ended")  # whatever it has said before
        answer = "silent"
        if asked is not None and (message := self._answer_to(asked)):
            error: int = _ERROR.unpack_from(message.payload)[0]
            data = message.payload[_ERROR.size :]
            answer = f"error {error}" if error else f"answer of {len(data)} bytes"
            answer += f": {data.hex()}" if data and message.id in _COMPARED else ""
        known = {asked, *self._barriers}
        strays = [m for m in self._came if m.id != Command.EVENT and m.seq not in known]
        answer += "".join(f", and one of {command_name(stray.id)} that is late" for stray in strays)
        return Seen(
            answer,
            tuple(sorted((vcpu, _described(message)) for vcpu, message in events.items())),
            tuple(sorted(message.seq for message in self._came if message.id == Command.EVENT)),
        )


def _described(message: Frame) -> str:
    size, kind = _EVENT.unpack_from(message.payload)
    return f"{event_name(kind)} of {size} and {len(message.payload) - size} bytes"
