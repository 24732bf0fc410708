# SPDX-License-Identifier: LGPL-2.1-or-later
"""Commands that are sent without waiting for the answers in between, and what came of each. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar, cast

from kvmi_host.protocol import Answer, Connection, KvmiError, Request

T = TypeVar("T")

_PIECE = 16384
"""Bytes: about as much is encoded at a time."""


class Batch(Generic[T]):
    """Gives out the commands' bytes piece by piece, and takes their answers in whatever order they come.

    :ivar unanswered: how many answers have not come, those of commands included that were not given out yet.
    """

    def __init__(self, connection: Connection, requests: Sequence[Request[T]]) -> None:
        self._connection = connection
        self._requests = requests
        self._next = 0
        self._asked: dict[int, int] = {}
        self._results: list[T | KvmiError | None] = [None] * len(requests)
        self._failed: int | None = None
        self.unanswered = len(requests)

    def piece(self) -> bytes:
        """The bytes of the next commands, empty when all were given out. They have to be sent."""
        piece = bytearray()
        while len(piece) < _PIECE and self._next < len(self._requests):
            index, self._next = self._next, self._next + 1
            seq, answered, data = self._connection.command(self._requests[index])
            piece += data
            self._asked[seq] = index
            if not answered:
                self.take(Answer(self._requests[index].command, seq, 0, b""))
        return bytes(piece)

    def take(self, answer: Answer) -> bool:
        """An answer came; False if it is that of a command which is not of this batch."""
        index = self._asked.pop(answer.seq, None)
        if index is None:
            return False
        self.unanswered -= 1
        try:
            self._results[index] = self._requests[index].decode(answer.result())
        except KvmiError as error:
            self._results[index] = error
            self._failed = index if self._failed is None else min(self._failed, index)
        return True

    def results(self) -> list[T]:
        """What each command gave, in the order of the requests, when no answer is missing any more.

        :raise CommandError: the first refusal.
        :raise ProtocolError: an answer was too short for what it has to hold, and no command before was refused.
        """
        if self._failed is not None:
            raise cast("KvmiError", self._results[self._failed])
        return cast("list[T]", self._results)
