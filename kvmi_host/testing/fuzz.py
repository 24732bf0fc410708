# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages that nobody should send, and those that somebody might: a stream of them follows from one seed.

A message is drawn from the protocol's own tables, well-formed at first, and then often spoilt in one place: a field, a
padding, its size, its vCPU, the number that it answers. :meth:`Fuzzer.noise` makes what is no message at all.

Nothing here does I/O. :mod:`kvmi_host.testing.campaign` throws the messages at a live VM.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import NamedTuple

from kvmi_host.protocol import Access, Action, Command, CrWrite, Event, EventId, MsrWrite, PageFaultReply, frame
from kvmi_host.protocol.events import encode_reply
from kvmi_host.protocol.framing import HEADER, MAX_PAYLOAD
from kvmi_host.protocol.msrs import NAMES
from kvmi_host.protocol.x86 import REGISTERS

WELL_FORMED = "well-formed"
REPLY_SIZES = {EventId.CR: 8, EventId.MSR: 8, EventId.PF: 272}
"""The own data of replies."""

_PAGE = 4096
_NOWHERE = 1 << 33
"""No guest of ours has memory from here on."""
_IN_FLIGHT = 4096
"""How far the numbers of events that have not been read yet may be ahead."""
_VCPU = struct.Struct("<HHI")
_MIN_REPLY = _VCPU.size + 2
_RANGE = struct.Struct("<QQ")
_PAGES = struct.Struct("<HHI")
_PAGE_ENTRY = struct.Struct("<QB7x")
_EXCEPTION = struct.Struct("<BBHIQ")
_OFTEN = (*range(EventId.CR, EventId.CREATE_VCPU), EventId.PAUSE_VCPU)
"""The events of a vCPU, without the one that each instruction makes."""
_TRAPS = (3, 4)
"""The exceptions after which the puppet guest goes on."""
_MAX_VECTOR = 31


class Message(NamedTuple):
    """One message. ``form``: what is wrong with it, or :data:`WELL_FORMED`."""

    id: int
    seq: int
    payload: bytes
    form: str

    def encode(self) -> bytes:
        """Its bytes."""
        return frame(self.id, self.seq, self.payload)


class Exchange:
    """What the introspector knows of its session.

    :ivar vcpus: how many the guest has.
    :ivar scratch: addresses of pages that the guest makes no use of, or none that matters.
    :ivar waiting: the event that each vCPU waits for the reply to.
    :ivar seen: the number of the last event.
    """

    def __init__(self, vcpus: int, scratch: Sequence[int]) -> None:
        self.vcpus = vcpus
        self.scratch = scratch
        self.waiting: dict[int, Event] = {}
        self.seen = 0

    def note_event(self, event: Event) -> None:
        """An event came."""
        self.seen = event.seq
        if event.event != EventId.UNHOOK:
            self.waiting[event.vcpu] = event

    def note_sent(self, message: Message) -> None:
        """A message has gone out."""
        if message.id == Command.EVENT_REPLY and (event := self._answered(message)):
            del self.waiting[event.vcpu]

    def harmless(self, message: Message) -> bool:
        """Whether the guest runs on as if there were no introspector, whatever the kernel makes of the message."""
        check = _HARM.get(message.id)
        return check is None or check(self, message)

    def _answered(self, message: Message) -> Event | None:
        if len(message.payload) < _MIN_REPLY:
            return None
        event = self.waiting.get(_VCPU.unpack_from(message.payload)[0])
        return event if event and event.seq == message.seq else None

    def _reply_is_harmless(self, message: Message) -> bool:
        payload = message.payload
        event = self._answered(message)
        if event is None:
            # It is refused, unless it answers what is on its way to us.
            return not 0 < (message.seq - self.seen) & 0xFFFFFFFF < _IN_FLIGHT
        own = payload[_VCPU.size + 8 :]
        size = REPLY_SIZES.get(EventId(event.event), 0)
        if any(payload[2:8]) or any(payload[10:16]) or len(own) > size:
            return True
        if payload[8] == Action.CRASH:
            return False
        data = event.data
        return not isinstance(data, CrWrite | MsrWrite) or own.ljust(8, b"\0") == data.new.to_bytes(8, "little")

    def _registers_are_harmless(self, message: Message) -> bool:
        payload = message.payload
        if len(payload) < _VCPU.size + REGISTERS.size:
            return True
        vcpu, *padding = _VCPU.unpack_from(payload)
        if vcpu >= self.vcpus or any(padding):
            return True
        event = self.waiting.get(vcpu)
        return event is not None and payload[_VCPU.size :][: REGISTERS.size] == REGISTERS.pack(*event.registers)

    def _write_is_harmless(self, message: Message) -> bool:
        if len(message.payload) < _RANGE.size:
            return True
        gpa, size = _RANGE.unpack_from(message.payload)
        leaves_page = not 1 <= size <= _PAGE - gpa % _PAGE
        return leaves_page or len(message.payload) < _RANGE.size + size or self._untouched(gpa)

    def _access_is_harmless(self, message: Message) -> bool:
        entries = message.payload[_PAGES.size :]
        whole = entries[: len(entries) // _PAGE_ENTRY.size * _PAGE_ENTRY.size]
        return all(self._untouched(gpa) for gpa, _ in _PAGE_ENTRY.iter_unpack(whole))

    def _exception_is_harmless(self, message: Message) -> bool:
        if len(message.payload) < _VCPU.size + _EXCEPTION.size:
            return True
        vector, has_error, padding, *_ = _EXCEPTION.unpack_from(message.payload, _VCPU.size)
        return vector in _TRAPS or vector > _MAX_VECTOR or has_error > 1 or padding != 0

    def _untouched(self, gpa: int) -> bool:
        return gpa >= _NOWHERE or gpa - gpa % _PAGE in self.scratch


_HARM: dict[int, Callable[[Exchange, Message], bool]] = {
    Command.EVENT_REPLY: Exchange._reply_is_harmless,
    Command.SET_REGISTERS: Exchange._registers_are_harmless,
    Command.WRITE_PHYSICAL: Exchange._write_is_harmless,
    Command.SET_PAGE_ACCESS: Exchange._access_is_harmless,
    Command.INJECT_EXCEPTION: Exchange._exception_is_harmless,
}


class Fuzzer:
    """Draws messages for one session after another.

    :ivar exchange: the session that messages are for; to be set anew for each.
    :ivar spoilt: the share of messages that are not well-formed.
    """

    def __init__(self, random: Random, exchange: Exchange, *, harm: float = 0) -> None:
        """
        :param harm: how much of what harms the guest is let through.
        """
        self.random = random
        self.exchange = exchange
        self.spoilt = 0.3
        self._harm = harm
        self._seq = 0
        self._answered: list[Message] = []
        self._captures: deque[bytes] = deque(maxlen=64)

    def opening(self) -> list[Message]:
        """What has every vCPU tell of most of what it does."""
        messages = []
        for vcpu in range(self.exchange.vcpus):
            header = _VCPU.pack(vcpu, 0, 0)
            messages += [
                self._message(Command.CONTROL_EVENTS, header + struct.pack("<HBBI", event, 1, 0, 0))
                for event in _OFTEN
                if self.random.random() < 0.8
            ]
            messages.append(self._message(Command.CONTROL_CR, header + struct.pack("<BBHI", 1, 0, 0, 3)))
            messages.append(self._message(Command.CONTROL_MSR, header + struct.pack("<BBHI", 1, 0, 0, NAMES["lstar"])))
        return messages

    def message(self) -> Message:
        """The next message. It counts as sent."""
        while True:
            replies = self.exchange.waiting and self.random.random() < 0.5
            message = self._any_reply() if replies else self._command()
            if self.exchange.harmless(message) or self.random.random() < self._harm:
                break
        if message.id == Command.EVENT_REPLY and message.form == WELL_FORMED:
            self._answered = [*self._answered[-7:], message]
        self.exchange.note_sent(message)
        self._captures.append(message.encode())
        return message

    def burst(self) -> list[Message]:
        """Messages that go out together."""
        messages = [self.message() for _ in range(self.random.choice((1, 1, 2, 4, 16, 64)))]
        if self.exchange.waiting and self.random.random() < 0.1:
            messages += self._quietly(self.random.choice(tuple(self.exchange.waiting.values())))
        return messages

    def answers(self) -> list[Message]:
        """A reply to every vCPU that waits, and now and then something else."""
        messages = [self._reply(event) for event in self.exchange.waiting.values()]
        for message in messages:
            self.exchange.note_sent(message)
        return messages + ([self.message()] if self.random.random() < 0.2 else [])

    def noise(self) -> bytes:
        """Bytes that may be no messages at all, or messages that end in the middle."""
        random = self.random
        how = random.randrange(4)
        if how == 0 or not self._captures:
            return random.randbytes(random.randrange(1, 2048))
        if how == 1:
            header = HEADER.pack(
                random.randrange(32), random.choice((0, 8, 16, 152, MAX_PAYLOAD)), random.getrandbits(32)
            )
            return header + random.randbytes(random.randrange(MAX_PAYLOAD))
        data = bytearray(b"".join(random.choices(self._captures, k=random.randrange(1, 16))))
        if how == 2:
            for _ in range(random.randrange(1, 9)):
                data[random.randrange(len(data))] ^= 1 << random.randrange(8)
            return bytes(data)
        start = random.randrange(len(data))
        return bytes(data[start : random.randrange(start, len(data) + 1)])

    def pieces(self, data: bytes) -> list[bytes]:
        """The writes in which bytes go out."""
        random = self.random
        how = random.randrange(8)
        if how == 0 and len(data) <= 256:
            return [data[i : i + 1] for i in range(len(data))]
        if how > 2:
            return [data]
        cuts = sorted({0, len(data), *(random.randrange(len(data) + 1) for _ in range(4))})
        return [data[a:b] for a, b in pairwise(cuts)]

    # -- commands

    def _command(self) -> Message:
        command = self.random.choice(tuple(_SHAPES))
        shape = _SHAPES[command]
        values = [field if isinstance(field, int) else field(self) for field in shape.fields]
        tail = shape.tail(self, values)
        if self.random.random() >= self.spoilt:
            return self._message(command, struct.pack(shape.code, *values) + tail)

        how = self.random.randrange(6)
        if how < 3 and values:
            at = self.random.randrange(len(values))
            values[at] = self._edge(struct.calcsize("<" + shape.code[1 + at]))
            return self._message(command, struct.pack(shape.code, *values) + tail, "a field that is odd")
        payload = struct.pack(shape.code, *values) + tail
        if how == 3 and payload:
            return self._message(command, payload[: self.random.randrange(len(payload))], "too short")
        if how == 4:
            more = self.random.choice((1, 8, 64, MAX_PAYLOAD - len(payload)))
            return self._message(command, payload + self.random.randbytes(more), "too long")
        unknown = self.random.choice(
            (Command.EVENT, 12, 22, 24, 25, 26, 28, 30, 63, 0xFFFF, self.random.getrandbits(16))
        )
        # By chance it is known after all.
        form = "another id" if unknown in _SHAPES else "an unknown id"
        return self._message(unknown, payload, form)

    def _edge(self, size: int) -> int:
        bits = 8 * size
        top = (1 << bits) - 1
        random = self.random
        return random.choice(
            (0, 1, 2, top, top - 1, top >> 1, 1 << (bits - 1), random.getrandbits(bits), 1 << random.randrange(bits))
        )

    def _message(self, number: int, payload: bytes, form: str = WELL_FORMED) -> Message:
        self._seq = (self._seq + 1) & 0xFFFFFFFF
        return Message(number, self._seq, payload, form)

    def _choice(self, values: Sequence[int]) -> int:
        return int(self.random.choice(values))

    # -- replies

    def _quietly(self, event: Event) -> list[Message]:
        """A vCPU's registers and the reply to it, with no answer to either."""
        registers = _VCPU.pack(event.vcpu, 0, 0) + REGISTERS.pack(*event.registers)
        reply = self._reply(event)
        self.exchange.note_sent(reply)
        off, on = (self._message(Command.CONTROL_CMD_RESPONSE, struct.pack("<BBHI", n, 1, 0, 0)) for n in (0, 1))
        return [off, self._message(Command.SET_REGISTERS, registers), reply, on]

    def _reply(self, event: Event) -> Message:
        action = self.random.choices((Action.CONTINUE, Action.RETRY, Action.CRASH), (40, 3, self._harm))[0]
        payload = encode_reply(event, action, page_fault=self._context() if event.event == EventId.PF else None)
        return Message(Command.EVENT_REPLY, event.seq, payload, WELL_FORMED)

    def _any_reply(self) -> Message:
        """To what waits: as it should be, or spoilt in one place."""
        random = self.random
        event = random.choice(tuple(self.exchange.waiting.values()))
        message = self._reply(event)
        if random.random() >= self.spoilt / 4:
            return message
        payload = message.payload
        seq, form = event.seq, "a reply that is odd"
        how = random.randrange(8)
        if how == 0:
            seq = random.choice((seq - 1, seq + 1, seq + 100_000, 0, random.getrandbits(32))) & 0xFFFFFFFF
            form = "a reply with another number"
        elif how == 1:
            payload = _VCPU.pack(self._edge(2), 0, 0) + payload[_VCPU.size :]
            form = "a reply of another vCPU"
        elif how == 2 and self._answered:
            return self._answered[random.randrange(len(self._answered))]._replace(form="a reply for the second time")
        elif how == 3:
            payload = payload[: random.randrange(len(payload))]
            form = "a reply that is too short"
        elif how == 4:
            payload += random.randbytes(random.choice((1, 8, 272, 4096)))
            form = "a reply that is too long"
        else:
            at = random.randrange(len(payload))
            payload = payload[:at] + random.randbytes(1) + payload[at + 1 :]
        return Message(Command.EVENT_REPLY, seq, payload, form)

    def _context(self) -> PageFaultReply:
        random = self.random
        data = random.randbytes(random.choice((0, 8, 256)))
        return PageFaultReply(
            self._address(), data, singlestep=random.random() < 0.2, rep_complete=random.random() < 0.2
        )

    # -- what a good field has in it

    def _vcpu(self) -> int:
        return self.random.randrange(self.exchange.vcpus)

    def _flag(self) -> int:
        return self.random.randrange(2)

    def _answers(self) -> int:
        # While they are off, much of what is well-formed ends the session.
        return int(self.random.random() >= self.spoilt / 3)

    def _command_id(self) -> int:
        return self._choice(tuple(Command))

    def _event_id(self) -> int:
        return self._choice(tuple(EventId))

    def _vm_event(self) -> int:
        return self._choice((EventId.UNHOOK, EventId.CREATE_VCPU))

    def _vcpu_event(self) -> int:
        # Each instruction makes a SINGLESTEP event: there would be no others.
        stepped = self.random.random() < 0.02
        return (
            EventId.SINGLESTEP
            if stepped
            else self._choice((*range(EventId.CR, EventId.CREATE_VCPU), EventId.PAUSE_VCPU))
        )

    def _cr(self) -> int:
        return self._choice((0, 3, 4))

    def _msr(self) -> int:
        return self._choice(tuple(NAMES.values()))

    def _function(self) -> int:
        return self._choice((0, 1, 7, 0xD, 0x40000000, 0x80000001))

    def _few(self) -> int:
        return self.random.randrange(9)

    def _size(self) -> int:
        return self._choice((1, 8, 64, _PAGE // 2))

    def _vector(self) -> int:
        return self._choice(range(_MAX_VECTOR + 1) if self._harm else _TRAPS)

    def _page(self) -> int:
        return self._choice(self.exchange.scratch)

    def _address(self) -> int:
        return self._page() + self.random.randrange(_PAGE // 2)

    def _no_tail(self, _values: list[int]) -> bytes:
        return b""

    def _msrs(self, values: list[int]) -> bytes:
        return b"".join(struct.pack("<I", self._msr()) for _ in range(values[3]))

    def _data(self, values: list[int]) -> bytes:
        return self.random.randbytes(values[1])

    def _pages(self, values: list[int]) -> bytes:
        return b"".join(struct.pack("<Q", self._page()) for _ in range(values[1]))

    def _accesses(self, values: list[int]) -> bytes:
        return b"".join(_PAGE_ENTRY.pack(self._page(), self._access()) for _ in range(values[1]))

    def _access(self) -> int:
        return self._choice((Access.NONE, Access.R, Access.R | Access.W, Access.R | Access.X, Access.ALL, Access.ALL))

    def _registers(self, values: list[int]) -> bytes:
        """Those that the vCPU has, if it waits: they do no harm."""
        event = self.exchange.waiting.get(values[0])
        return REGISTERS.pack(*event.registers) if event else self.random.randbytes(REGISTERS.size)


@dataclass(frozen=True, slots=True)
class _Shape:
    """A command's payload: its fields as a format of `struct`, a number or what draws one for each, and the rest."""

    code: str = "<"
    fields: tuple[int | Callable[[Fuzzer], int], ...] = ()
    tail: Callable[[Fuzzer, list[int]], bytes] = Fuzzer._no_tail


_OF_VCPU = (Fuzzer._vcpu, 0, 0)
_SHAPES: dict[int, _Shape] = {
    Command.GET_VERSION: _Shape(),
    Command.CHECK_COMMAND: _Shape("<HHI", (Fuzzer._command_id, 0, 0)),
    Command.CHECK_EVENT: _Shape("<HHI", (Fuzzer._event_id, 0, 0)),
    Command.GET_GUEST_INFO: _Shape(),
    Command.GET_VCPU_INFO: _Shape("<HHI", _OF_VCPU),
    Command.PAUSE_VCPU: _Shape("<HHIBBHI", (*_OF_VCPU, Fuzzer._flag, 0, 0, 0)),
    Command.CONTROL_VM_EVENTS: _Shape("<HBBI", (Fuzzer._vm_event, Fuzzer._flag, 0, 0)),
    Command.CONTROL_EVENTS: _Shape("<HHIHBBI", (*_OF_VCPU, Fuzzer._vcpu_event, Fuzzer._flag, 0, 0)),
    Command.CONTROL_CR: _Shape("<HHIBBHI", (*_OF_VCPU, Fuzzer._flag, 0, 0, Fuzzer._cr)),
    Command.CONTROL_MSR: _Shape("<HHIBBHI", (*_OF_VCPU, Fuzzer._flag, 0, 0, Fuzzer._msr)),
    Command.GET_REGISTERS: _Shape("<HHIHHI", (*_OF_VCPU, Fuzzer._few, 0, 0), Fuzzer._msrs),
    Command.SET_REGISTERS: _Shape("<HHI", _OF_VCPU, Fuzzer._registers),
    Command.GET_CPUID: _Shape("<HHIII", (*_OF_VCPU, Fuzzer._function, 0)),
    Command.GET_XSAVE: _Shape("<HHI", _OF_VCPU),
    Command.READ_PHYSICAL: _Shape("<QQ", (Fuzzer._address, Fuzzer._size)),
    Command.WRITE_PHYSICAL: _Shape("<QQ", (Fuzzer._address, Fuzzer._size), Fuzzer._data),
    Command.INJECT_EXCEPTION: _Shape("<HHIBBHIQ", (*_OF_VCPU, Fuzzer._vector, 0, 0, 0, 0)),
    Command.GET_PAGE_ACCESS: _Shape("<HHI", (0, Fuzzer._few, 0), Fuzzer._pages),
    Command.SET_PAGE_ACCESS: _Shape("<HHI", (0, Fuzzer._few, 0), Fuzzer._accesses),
    Command.GET_MTRR_TYPE: _Shape("<Q", (Fuzzer._address,)),
    Command.CONTROL_CMD_RESPONSE: _Shape("<BBHI", (Fuzzer._answers, Fuzzer._flag, 0, 0)),
    Command.GET_MAX_GFN: _Shape(),
}

SERVED = frozenset(_SHAPES)
"""The commands that messages are drawn for: all that the kernel part serves."""
