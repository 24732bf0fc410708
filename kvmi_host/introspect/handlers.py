# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which function is called with which event."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from kvmi_host.introspect.interests import Interest
from kvmi_host.protocol import Event

H = TypeVar("H", bound=Callable[..., object])

_log = logging.getLogger(__name__)


class Handlers(Generic[H]):
    """Functions, and what each is interested in.

    :ivar errors: how often one has raised.
    """

    def __init__(self) -> None:
        self.errors = 0
        self._handlers: list[tuple[Interest, H]] = []

    def add(self, interests: Sequence[Interest]) -> Callable[[H], H]:
        """A decorator that adds a function."""

        def decorate(handler: H) -> H:
            self._handlers += [(interest, handler) for interest in interests]
            return handler

        return decorate

    def include(self, others: Handlers[H]) -> None:
        """Have the functions of another one called, too."""
        self._handlers += others._handlers

    @property
    def interests(self) -> Sequence[Interest]:
        """All that some function is interested in."""
        return list(dict.fromkeys(interest for interest, _ in self._handlers))

    def of(self, event: Event) -> Sequence[H]:
        """The functions for an event, in the order they were added."""
        kind = event.event
        return [handler for interest, handler in self._handlers if interest.event == kind and interest.matches(event)]

    def failed(self, handler: H, event: Event) -> None:
        """Report the exception that a handler raises, in its except clause."""
        self.errors += 1
        _log.exception("%s raised at %r: the guest goes on", getattr(handler, "__qualname__", handler), event)
