# SPDX-License-Identifier: LGPL-2.1-or-later
"""The event loop of an introspector that only watches: every event is handled, and answered CONTINUE or kept."""

from __future__ import annotations

from collections.abc import Callable

from kvmi_host.introspect.session import Session
from kvmi_host.protocol import Event, EventId


def serve(
    session: Session, handle: Callable[[Event], bool | None], idle: Callable[[], bool], tick: float = 0.2
) -> bool:
    """Handle events until the host wants the session back or `idle` says stop.

    :param handle: called with each event before it is answered. True: it will see to the answer itself. If it raises,
        the guest goes on all the same.
    :param idle: called after each event, and every `tick` seconds without one; true ends the loop.
    :return: whether UNHOOK ended it: the host asks to clean up and close.
    :raise SessionClosed: the VM or its session ended.
    """
    while not idle():
        event = session.next_event(tick)
        if event is None:
            continue
        kept: bool | None = False
        try:
            kept = handle(event)
        finally:
            if event.event != EventId.UNHOOK and not kept:
                session.reply(event)
        if event.event == EventId.UNHOOK:
            return True
    return False
