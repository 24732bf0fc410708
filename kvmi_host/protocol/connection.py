# SPDX-License-Identifier: LGPL-2.1-or-later
"""The introspector's end of a session as a state machine: bytes in, events and answers out, no I/O.

Theory of operation: feed what the socket gives to :meth:`Connection.receive_data`, then take messages from
:meth:`Connection.next_message` until it has none; send what :meth:`Connection.command` and :meth:`Connection.reply`
return, whole and in order. Two rules follow from how the kernel end works:

- events and answers come interleaved: an event may arrive while an answer is awaited, and a vCPU that waits for a reply
  goes on serving commands;
- an answer is known by the seq of its command. One that nobody asked for means that the two ends no longer agree, and
  the session is over.

States, and what moves between them::

    state    receive_data(bytes)        receive_data(b"")             next_message() finds rubbish
    OPEN     OPEN                       ENDED at a message's end,     BROKEN, ProtocolError
                                        else BROKEN, ProtocolError
    ENDED    ValueError                 ENDED                         (takes out what is left)
    BROKEN   ProtocolError              ProtocolError                 ProtocolError
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from enum import Enum
from struct import Struct
from typing import NamedTuple, NoReturn

from kvmi_host.protocol.errors import CommandError, ProtocolError
from kvmi_host.protocol.events import Event, PageFaultReply, encode_reply
from kvmi_host.protocol.framing import Frame, Framer, frame
from kvmi_host.protocol.ids import Action, Command, command_name
from kvmi_host.protocol.messages import Request

_ERROR_CODE = Struct("<i4x")
_LAST_SEQ = 0xFFFFFFFF
_EVENT, _EVENT_REPLY = int(Command.EVENT), int(Command.EVENT_REPLY)

_SILENT_REMEMBERED = 1024
"""How many commands sent with answers off are remembered: refusals of them may still come."""


class State(Enum):
    """Where a connection is; the table at the head of this file says how it gets there."""

    OPEN = "open"
    ENDED = "ended"
    BROKEN = "broken"


class Answer(NamedTuple):
    """The answer to the command that was sent with the same ``seq``. ``data`` follows the error code."""

    command: int
    seq: int
    error: int
    data: bytes

    def result(self) -> bytes:
        """The data of a good answer.

        :raise CommandError: the kernel refused.
        """
        if self.error:
            raise CommandError(self.command, self.error)
        return self.data


class Connection:
    """One session, seen from the introspector."""

    __slots__ = ("_answers_on", "_asked", "_framer", "_seq", "_silent", "_switches", "state")

    def __init__(self) -> None:
        self.state = State.OPEN
        self._framer = Framer()
        self._seq = 0
        self._answers_on = True
        self._asked: dict[int, int] = {}
        self._silent: OrderedDict[int, int] = OrderedDict()
        self._switches: dict[int, bool] = {}

    @property
    def pending(self) -> int:
        """How many bytes are held of which no message was taken yet."""
        return self._framer.pending

    def receive_data(self, data: bytes) -> None:
        """Take what the socket gave; empty for end of file.

        :raise ProtocolError: the peer closed in the middle of a message, or broke the protocol before.
        """
        if self.state is State.BROKEN:
            raise ProtocolError("the session is broken: close it")
        if data:
            if self.state is State.ENDED:
                raise ValueError("data after the end of file")
            self._framer.feed(data)
        elif self._framer.pending:
            self._break(f"the peer closed in the middle of a message, after {self._framer.pending} bytes of it")
        else:
            self.state = State.ENDED

    def next_message(self) -> Event | Answer | None:
        """The next message, or None until more bytes come.

        :raise ProtocolError: it is none that the kernel may send here. The connection is BROKEN from then on.
        """
        if self.state is State.BROKEN:
            raise ProtocolError("the session is broken: close it")
        try:
            message = self._framer.next_frame()
            if message is None:
                return None
            message_id, seq, payload = message
            if message_id == _EVENT:
                return Event(seq, payload)
            return self._answer(message)
        except ProtocolError:
            self.state = State.BROKEN
            raise

    def command(self, request: Request[object]) -> tuple[int, bool, bytes]:
        """The command's seq, whether an answer will come, and its bytes.

        With the answers switched off none will come, except that the kernel may still refuse: an :class:`Answer` with
        that seq and an error.
        """
        self._seq = seq = (self._seq + 1) & _LAST_SEQ
        command = request.command
        answered = self._answers_on
        if command == Command.CONTROL_CMD_RESPONSE and len(request.payload) >= 2:
            enable, now = request.payload[0] != 0, request.payload[1] != 0
            answered = enable if now else self._answers_on
            self._switches = {seq: self._answers_on}
            self._answers_on = enable
        if answered:
            self._asked[seq] = command
        else:
            self._silent[seq] = command
            if len(self._silent) > _SILENT_REMEMBERED:
                self._silent.popitem(last=False)
        return seq, answered, frame(command, seq, request.payload)

    def take_seqs(self, count: int) -> range:
        """The seqs of `count` commands that the caller makes itself, and whose answers it receives itself.

        :raise ValueError: the answers are switched off.
        """
        if not self._answers_on:
            raise ValueError("what is asked for comes with the answers, and they are switched off")
        first = self._seq + 1 if self._seq + count <= _LAST_SEQ else 1
        self._seq = first + count - 1
        return range(first, first + count)

    def expect(self, command: int, seqs: Iterable[int]) -> None:
        """Answers of these commands may come by :meth:`next_message`."""
        self._asked.update(dict.fromkeys(seqs, command))

    def forget(self, seqs: Iterable[int]) -> None:
        """Answers of these commands will not come by :meth:`next_message`; they were expected before."""
        for seq in seqs:
            del self._asked[seq]

    def withdraw(self) -> bytes:
        """Give back the bytes of which no message was taken yet."""
        return self._framer.withdraw()

    def reply(
        self,
        event: Event,
        action: int = Action.CONTINUE,
        new_val: int | None = None,
        page_fault: PageFaultReply | None = None,
    ) -> bytes:
        """The reply to an event; see :func:`kvmi_host.protocol.events.encode_reply`."""
        return frame(_EVENT_REPLY, event.seq, encode_reply(event, action, new_val, page_fault))

    def _answer(self, message: Frame) -> Answer:
        command, seq, payload = message
        asked = self._asked.pop(seq, None)
        if asked is None:
            asked = self._silent.pop(seq, None)
        if asked != command:
            self._break(f"an answer of {command_name(command)} with seq {seq} that nobody asked for")
        if len(payload) < _ERROR_CODE.size:
            self._break(f"the answer of {command_name(command)} is too short for its error code")
        error: int = _ERROR_CODE.unpack_from(payload)[0]
        if error and seq in self._switches:
            self._answers_on = self._switches.pop(seq)
        return Answer(command, seq, error, payload[_ERROR_CODE.size :])

    def _break(self, why: str) -> NoReturn:
        self.state = State.BROKEN
        raise ProtocolError(why)
