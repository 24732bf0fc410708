# SPDX-License-Identifier: LGPL-2.1-or-later
"""The introspector's end of a session as a state machine: bytes in, events and answers out, no I/O.

Theory of operation: feed what the socket gives to :meth:`Connection.receive_data`, then take messages from
:meth:`Connection.next_message` until it has none; send what :meth:`Connection.command` and :meth:`Connection.reply`
return, whole and in order. Four rules follow from how the kernel end works:

- events and answers come interleaved: an event may arrive while an answer is awaited, and a vCPU that waits for a reply
  goes on serving commands;
- an answer is known by the seq of its command. One that nobody asked for means that the two ends no longer agree, and
  the session is over;
- events are numbered by one counter. One whose number came before is a lie, and ends the session, too. vCPUs may
  overtake each other between counting and sending, so a number that was skipped may still come; so many that no vCPUs
  can be on their way with them are lost;
- which dialect the kernel speaks is learnt from its answer to GET_VERSION. Events are read as v6's until then: ask
  before any is switched on.

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

from kvmi_host.protocol.dialects import DIALECTS, V6, Dialect, event_type, read_version
from kvmi_host.protocol.errors import CommandError, ProtocolError
from kvmi_host.protocol.events import Event, PageFaultReply, encode_reply
from kvmi_host.protocol.framing import Frame, Framer, frame
from kvmi_host.protocol.ids import Action, Command, command_name
from kvmi_host.protocol.messages import Request

_ERROR_CODE = Struct("<i4x")

_SILENT_REMEMBERED = 1024
"""How many commands sent with answers off are remembered: refusals of them may still come."""

MAX_UNANSWERED = 65536
"""How many commands may wait for their answers. The kernel queues far fewer, and refuses what is more."""

MAX_SKIPPED = 4096
"""How many event numbers may be on their way while later ones have come: KVM has no more vCPUs than that."""

_SEQ_MASK = 0xFFFFFFFF
# Looked at for each message: an enum's are slow.
_EVENT, _EVENT_REPLY, _GET_VERSION = int(Command.EVENT), int(Command.EVENT_REPLY), int(Command.GET_VERSION)


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
    """One session, seen from the introspector.

    :ivar state: see the head of this file.
    :ivar due: the number that the next event should have; None before the first one.
    """

    __slots__ = (
        "_answers_on",
        "_asked",
        "_dialect",
        "_event",
        "_framer",
        "_seq",
        "_silent",
        "_skipped",
        "_switches",
        "due",
        "state",
    )

    def __init__(self, dialect: Dialect = V6) -> None:
        """
        :param dialect: what events are read as until GET_VERSION is answered.
        :raise UnsupportedDialect: it is only known by name.
        """
        self.state = State.OPEN
        self._speak(dialect)
        self.due: int | None = None
        self._skipped: set[int] = set()
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

    @property
    def dialect(self) -> Dialect:
        """What the kernel speaks, as far as is known: the answer to GET_VERSION tells."""
        return self._dialect

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
                event = self._event(seq, payload)
                self.count(seq)
                return event
            return self._answer(message)
        except ProtocolError:
            self.state = State.BROKEN
            raise

    def count(self, seq: int) -> None:
        """Account for the number of an event. For those that were received elsewhere; :meth:`next_message` does.

        :raise ProtocolError: it came before, or too many were skipped.
        """
        if seq == self.due:
            self.due = (seq + 1) & _SEQ_MASK
        else:
            self._out_of_turn(seq)

    def command(self, request: Request[object]) -> tuple[int, bool, bytes]:
        """The command's seq, whether an answer will come, and its bytes.

        With the answers switched off none will come, except that the kernel may still refuse: an :class:`Answer` with
        that seq and an error.

        :raise ProtocolError: :data:`MAX_UNANSWERED` commands wait for their answers.
        """
        if len(self._asked) >= MAX_UNANSWERED:
            self._break(f"the peer has left {MAX_UNANSWERED} commands unanswered: it is stuck")
        self._seq = seq = (self._seq + 1) & _SEQ_MASK
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
        first = self._seq + 1 if self._seq + count <= _SEQ_MASK else 1
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
        data = payload[_ERROR_CODE.size :]
        if command == _GET_VERSION and not error:
            self._speak(DIALECTS[read_version(data).dialect])
        return Answer(command, seq, error, data)

    def _speak(self, dialect: Dialect) -> None:
        self._event = event_type(dialect)
        self._dialect = dialect

    def _out_of_turn(self, seq: int) -> None:
        """Account for an event whose number is not the next one."""
        due = self.due
        if due is None:  # the first one: a session may be handed over after it has begun
            due = 1 if 1 <= seq <= MAX_SKIPPED else seq
        ahead = (seq - due) & _SEQ_MASK
        if seq in self._skipped:
            self._skipped.remove(seq)
        elif ahead > _SEQ_MASK // 2:
            self._break(f"event {seq} for the second time: the last one was {due - 1 & _SEQ_MASK}")
        elif ahead + len(self._skipped) > MAX_SKIPPED:
            self._break(f"event {seq} where {due} is due, more than {MAX_SKIPPED} skipped in all: events are lost")
        else:
            self._skipped.update((due + n) & _SEQ_MASK for n in range(ahead))
            self.due = (seq + 1) & _SEQ_MASK

    def _break(self, why: str) -> NoReturn:
        self.state = State.BROKEN
        raise ProtocolError(why)
