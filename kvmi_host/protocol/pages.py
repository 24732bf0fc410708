# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading many pages: the answers are received where the pages belong, so that none is copied or parsed by itself.

Theory of operation: a good answer to READ_PHYSICAL of a whole page is a head that is known beforehand (message header,
error code 0) and the page; and the kernel answers in order. So the stream is laid out in advance, a head and a page in
turns, and received into that layout. A head that is another, of an event or a refusal, shows that the stream has left
the layout: what came from there on is the connection's, which takes it message by message, until what is left is the
beginning of the next good answer.

The two modes, and what moves between them::

    laid out     receive into room(), tell received()           received(), leave(): what is not, the connection gets
    by message   take() each answer that the connection gives   resume(): what the connection holds is laid out
"""

from __future__ import annotations

from array import array

from kvmi_host.protocol.connection import Answer, Connection
from kvmi_host.protocol.errors import CommandError
from kvmi_host.protocol.framing import HEADER
from kvmi_host.protocol.ids import Command
from kvmi_host.protocol.messages import PAGE_SIZE, read_physical

MOST_PAGES = 1024
"""How many pages are read in one go."""

HEAD = HEADER.size + 8
"""Bytes before the page in a good answer: message header and error code."""
ANSWER = HEAD + PAGE_SIZE
"""Bytes of a good answer."""
_COMMAND = HEADER.size + 16  # its payload is an address and a size
_AT_ONCE = 16  # pages received with one call; more are slower, for their places have to be listed
_decode = read_physical(0, PAGE_SIZE).decode


class PageReads:
    """Commands that read successive pages, and their answers.

    :ivar commands: the bytes to send, whole.
    :ivar laid_out: which mode it is in.
    :ivar heads: where the heads of the answers go, HEAD bytes each; ``expected`` is what they have to be.
    :ivar pages: where the pages go.
    :ivar at: how much of the layout was received.
    """

    def __init__(self, connection: Connection, gpa: int, pages: memoryview) -> None:
        """
        :param gpa: the first page's guest-physical address.
        :param pages: where they go; a view of bytes, for MOST_PAGES at most.
        :raise ValueError: the answers are switched off.
        """
        count = len(pages) // PAGE_SIZE
        self._connection = connection
        self._seqs = connection.take_seqs(count)
        numbers = array("I", self._seqs)
        self.commands = _headers(_COMMAND, numbers, _COMMAND)
        ranges = self.commands.cast("Q")  # a header, an address and a size, of 8 bytes each
        ranges[1::3] = array("Q", range(gpa, gpa + len(pages), PAGE_SIZE))
        ranges[2::3] = array("Q", [PAGE_SIZE]) * count
        self.expected = _headers(HEAD, numbers, ANSWER)
        self.pages = pages
        self.heads = memoryview(bytearray(HEAD * count))
        self.at = 0
        self._checked = 0  # heads that are as they have to be
        self._taken = 0  # answers that came by message, or were laid out before
        self._in_order = True
        self._refused: tuple[int, CommandError] | None = None
        self.laid_out = True
        if connection.pending:
            self._by_message()

    @property
    def unanswered(self) -> int:
        """How many answers have not come."""
        return len(self._seqs) - (self.at // ANSWER if self.laid_out else self._taken)

    # -- laid out

    def room(self) -> list[memoryview]:
        """Where the next bytes are to be received, one part after another."""
        page, within = divmod(self.at, ANSWER)
        room = []
        for here in range(page, min(page + _AT_ONCE, len(self._seqs))):
            room.append(self.heads[here * HEAD : (here + 1) * HEAD])
            room.append(self.pages[here * PAGE_SIZE : (here + 1) * PAGE_SIZE])
        if within >= HEAD:
            del room[0]
            within -= HEAD
        room[0] = room[0][within:]
        return room

    def received(self, size: int) -> None:
        """So many bytes came to :meth:`room`."""
        self.at += size
        before, self._checked = self._checked, (self.at + PAGE_SIZE) // ANSWER
        if not self._good_heads(before, self._checked):
            self._leave(next(page for page in range(before, self._checked) if not self._good_heads(page, page + 1)))

    def leave(self) -> None:
        """What comes next is to be taken by message."""
        if self.laid_out:
            self._leave(self.at // ANSWER)

    # -- by message

    def take(self, answer: Answer) -> None:
        """An answer came; it may be that of a command which is not of these.

        :raise ProtocolError: it holds less than a page.
        """
        if answer.seq not in self._seqs:
            return
        page = answer.seq - self._seqs.start
        self._in_order = self._in_order and page == self._taken
        self._taken += 1
        try:
            data = _decode(answer.result())
        except CommandError as error:
            data = bytes(PAGE_SIZE)
            if self._refused is None or page < self._refused[0]:
                self._refused = page, error
        self.pages[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = data

    def resume(self) -> bool:
        """Have it laid out again, if nothing is left but the beginning of the next good answer."""
        if not self._in_order or not self.unanswered:
            return False
        page, rest = self._taken, self._connection.withdraw()
        head, data = rest[:HEAD], rest[HEAD:]
        if head != self.expected[page * HEAD : page * HEAD + len(head)]:
            self._connection.receive_data(rest)
            return False
        self.heads[page * HEAD : page * HEAD + len(head)] = head
        self.pages[page * PAGE_SIZE : page * PAGE_SIZE + len(data)] = data
        self.at = page * ANSWER + len(rest)
        self._checked = page + (len(head) == HEAD)
        self._connection.forget(self._seqs[page:])
        self.laid_out = True
        return True

    def result(self) -> None:
        """What came of it, when no answer is missing any more.

        :raise CommandError: the first refusal. The pages that were refused are zero.
        """
        if self._refused:
            raise self._refused[1]

    def _good_heads(self, start: int, end: int) -> bool:
        return self.heads[HEAD * start : HEAD * end] == self.expected[HEAD * start : HEAD * end]

    def _leave(self, page: int) -> None:
        """What came from `page` on is the connection's; all before was good."""
        stray = b"".join(
            part
            for here in range(page, -(-self.at // ANSWER))
            for part in (self.heads[here * HEAD :][:HEAD], self.pages[here * PAGE_SIZE :][:PAGE_SIZE])
        )[: self.at - page * ANSWER]
        self._taken = page
        self._by_message()
        if stray:
            self._connection.receive_data(stray)

    def _by_message(self) -> None:
        self.laid_out = False
        self._connection.expect(Command.READ_PHYSICAL, self._seqs[self._taken :])


def _headers(distance: int, seqs: array[int], size: int) -> memoryview:
    """The headers of messages of `size` bytes with these seqs, `distance` bytes from one to the next; zeros between."""
    view = memoryview(bytearray(distance * len(seqs)))
    words, step = view.cast("I"), distance // 4
    words[0::step] = array("I", [Command.READ_PHYSICAL | (size - HEADER.size) << 16]) * len(seqs)
    words[1::step] = seqs
    return view
