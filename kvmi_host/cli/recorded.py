# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ``attach --json`` would have printed of a recorded session, from the messages of the recording."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import IO, Any, TypeVar

from kvmi_host.cli.records import Record, event_record
from kvmi_host.cli.tally import Tally
from kvmi_host.introspect.session import MAX_WAITING_EVENTS
from kvmi_host.protocol import Command, Event, Framer, KvmiError, ProtocolError
from kvmi_host.recording import BadRecording, EndsEarly, Message, read_recording

T = TypeVar("T")

Line = tuple[str, Any]
"""Where an object was found, and the object."""

_NOTE, _EVENT = "a note in the recording", "an event in the recording"


def recorded_lines(stream: IO[bytes]) -> Iterator[Line]:
    """What ``attach --json`` would have printed, and the summary where it is missing, of a recording.

    :raise BadRecording: after all else: the recording is damaged, or was cut off.
    :raise ProtocolError: after all else: the VM's side broke the protocol.
    """
    events = _Events()
    summarized = False
    first_ns = last_ns = 0
    trouble: KvmiError | None = None
    try:
        for item in read_recording(stream):
            first_ns, last_ns = first_ns or item.time_ns, item.time_ns
            try:
                if isinstance(item, Message):
                    yield from events.crossed(item)
                elif "leaving" in item.content:
                    yield from events.leave(_field(item.content, "leaving", "events", int))
                else:
                    if "session" in item.content:
                        events.name = _field(item.content, "session", "name", str)
                    yield _NOTE, item.content
                    summarized = summarized or "summary" in item.content
            except ProtocolError as error:
                trouble = error
    except BadRecording as error:
        trouble = error
    yield from events.rest()
    if not summarized:
        trouble = trouble or EndsEarly("the recording has no end: who made it was killed, or is still at it")
        if first_ns:
            events.tally.ended = str(trouble)
            yield _NOTE, {"summary": events.tally.summary((last_ns - first_ns) / 1e9)}
    if trouble:
        raise trouble


class _Events:
    """The events that attach showed. Some that it received it answered without a look, because it was leaving; so one
    is shown here as soon as it, or one that came later, is answered, and the last ones when it is known how many."""

    def __init__(self) -> None:
        self.name = ""
        self.tally = Tally()
        self._waiting: deque[tuple[Event, int]] = deque()
        self._left = False

    def crossed(self, message: Message) -> Iterator[Line]:
        """Take a message.

        :raise ProtocolError: it is of the VM's side, and no message, or no event of this protocol.
        """
        framer = Framer()
        framer.feed(message.data)
        frame = framer.next_frame()
        if frame is None and not message.sent:
            raise ProtocolError(f"the VM's side sent {len(message.data)} bytes that are no whole message")
        if frame is None or self._left:
            return
        if frame.id == Command.EVENT and not message.sent:
            self._waiting.append((Event(frame.seq, frame.payload), message.time_ns))
            if len(self._waiting) > MAX_WAITING_EVENTS:
                yield self._next()
        elif frame.id == Command.EVENT_REPLY and message.sent:
            answered = [at for at, (event, _) in enumerate(self._waiting, 1) if event.seq == frame.seq]
            for _ in range(answered[0] if answered else 0):
                yield self._next()

    def leave(self, shown: int) -> Iterator[Line]:
        """Attach has shown so many, and shows no more."""
        while self._waiting and self.tally.events < shown:
            yield self._next()
        self._waiting.clear()
        self._left = True

    def rest(self) -> Iterator[Line]:
        """What is left when the recording ends."""
        while self._waiting:
            yield self._next()

    def _next(self) -> Line:
        event, time_ns = self._waiting.popleft()
        self.tally.enter(event)
        return _EVENT, event_record(self.name, event, time_ns)


def _field(note: Record, kind: str, name: str, of: type[T]) -> T:
    value = note[kind].get(name) if isinstance(note[kind], dict) else None
    if not isinstance(value, of):
        raise BadRecording(f"damaged: a note of {kind!r} without its {name!r}")
    return value
