# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages that are sent without waiting for the answers in between, and what came of each command. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar, cast

from kvmi_host.protocol import Answer, Connection, KvmiError, Reply, Request

T = TypeVar("T")

_PIECE = 16384
"""Bytes: about as much is encoded at a time."""


class Batch(Generic[T]):
    """Gives out the bytes of commands, and of replies among them, piece by piece, and takes the answers to the commands
    in whatever order they come.

    :ivar unanswered: how many answers have not come, those of commands included that were not given out yet.
    """

    def __init__(self, connection: Connection, items: Sequence[Request[T] | Reply]) -> None:
        self._connection = connection
        self._items = items
        self._next = 0
        self._asked: dict[int, int] = {}
        self._silent: dict[int, int] = {}
        self._results: list[T | KvmiError | None] = [None] * len(items)
        self._failed: int | None = None
        self.unanswered = len(items)

    def piece(self) -> bytes:
        """The bytes of the next commands, empty when all were given out. They have to be sent."""
        piece = bytearray()
        while len(piece) < _PIECE and self._next < len(self._items):
            index, self._next = self._next, self._next + 1
            item = self._items[index]
            if isinstance(item, Reply):
                piece += self._connection.reply(*item)
                self.unanswered -= 1
                continue
            seq, answered, data = self._connection.command(item)
            piece += data
            if answered:
                self._asked[seq] = index
            else:
                self._silent[seq] = index  # a refusal may come all the same
                self._decode(index, Answer(item.command, seq, 0, b""))
                self.unanswered -= 1
        return bytes(piece)

    def take(self, answer: Answer) -> bool:
        """An answer came; False if it is that of a command which is not of this batch."""
        index = self._asked.pop(answer.seq, None)
        if index is not None:
            self.unanswered -= 1
        else:
            index = self._silent.pop(answer.seq, None)
            if index is None:
                return False
        self._decode(index, answer)
        return True

    def _decode(self, index: int, answer: Answer) -> None:
        request = self._items[index]
        assert isinstance(request, Request)
        try:
            self._results[index] = request.decode(answer.result())
        except KvmiError as error:
            self._results[index] = error
            self._failed = index if self._failed is None else min(self._failed, index)

    def results(self) -> list[T]:
        """What each command gave, and None for a reply, in their order, when no answer is missing any more.

        :raise CommandError: the first refusal.
        :raise ProtocolError: an answer was too short for what it has to hold, and no command before was refused.
        """
        if self._failed is not None:
            raise cast("KvmiError", self._results[self._failed])
        return cast("list[T]", self._results)
