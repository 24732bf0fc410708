# SPDX-License-Identifier: LGPL-2.1-or-later
"""The round trip of an event: what a session does most, in its compiled form where that was built.

What is here exists twice, here and in ``_roundtrip.c``. Compiled, nothing runs in Python for an event that comes alone
and is answered without a change; all else is left to the derived classes' ``_next_event`` and ``_reply``, which do the
same alone.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from kvmi_host.protocol import Action, Event, PageFaultReply
from kvmi_host.protocol.pages import PageReads


class Replying:
    """Answers to events.

    :ivar _fd: the socket that the compiled form may send to; negative: none.
    """

    _fd: int

    def reply(
        self,
        event: Event,
        action: int = Action.CONTINUE,
        *,
        new_val: int | None = None,
        page_fault: PageFaultReply | None = None,
    ) -> None:
        """Answer an event, and let its vCPU go on.

        :param new_val: for CR and MSR: the value to write instead of the guest's own.
        :param page_fault: for PF: how the access is made.
        :raise ValueError: the event has no reply, or takes no such data.
        """
        self._reply(event, action, new_val=new_val, page_fault=page_fault)

    def _reply(
        self,
        event: Event,
        action: int = Action.CONTINUE,
        *,
        new_val: int | None = None,
        page_fault: PageFaultReply | None = None,
    ) -> None:
        raise NotImplementedError

    def send_raw(self, data: bytes) -> None:
        """Send bytes as they are: for tests of the other end, and for messages made elsewhere."""
        raise NotImplementedError


class RoundTrip(Replying):
    """Events and their replies.

    :ivar timeout: the deadline of a command in seconds.
    :ivar _direct: the compiled form may receive: nothing that came before is left in Python, so that the next bytes
        begin a message; events are those of dialect v6.
    :ivar _due: the number that the next event has to have, kept by the compiled form while it receives.
    """

    timeout: float
    _direct: bool
    _due: int

    def next_event(self, timeout: float | None = None) -> Event | None:
        """The next event, or None when `timeout` seconds have passed without one.

        :param timeout: None is the session's own timeout; 0 only looks.
        :raise SessionClosed: the peer is gone and every event it sent was taken.
        """
        return self._next_event(self.timeout if timeout is None else timeout)

    def _next_event(self, timeout: float, received: bytes = b"") -> Event | None:
        """:meth:`next_event`, when `received` came before."""
        raise NotImplementedError


def event_in(_data: memoryview, _size: int) -> Event | None:
    """The event that the first `size` bytes of `data` are. None: they are not exactly one, or this is not compiled."""
    return None


def receive_pages(fd: int, reads: PageReads, milliseconds: int) -> int:
    """Receive the answers to `reads` to where they belong: how many bytes; 0 at the end.

    Call it when there is something. The compiled form goes on while the answers are good and none takes longer than so
    many `milliseconds` to come.

    :raise OSError: as readv(2).
    """
    return os.readv(fd, reads.room())


if not TYPE_CHECKING:
    with suppress(ImportError):  # not built: there was no C compiler
        from kvmi_host.introspect._roundtrip import Replying, RoundTrip, event_in, receive_pages  # noqa: F401
