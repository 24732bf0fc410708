# SPDX-License-Identifier: LGPL-2.1-or-later
"""Holding the vCPUs of a VM, stepping one of them, and letting them go.

A vCPU is held by the reply that it waits for: that of a PAUSE_VCPU event, which we ask for, or of the SINGLESTEP event
that ends a step. Other events are answered as ever, so that each vCPU comes to such a point. ::

    vCPU       pause()   PAUSE_VCPU event   step()     SINGLESTEP event   resume()
    running    asked     (answered)         -          (answered)         running
    asked      asked     held               -          (answered)         running
    held       held      -                  stepping   -                  running
    stepping   stepping  held               stepping   held               running
"""

from __future__ import annotations

from kvmi_host.introspect.session import Session
from kvmi_host.protocol import CommandError, ErrorCode, Event, EventId


class Pause:
    """Whether a VM is paused, and which of its vCPUs are held. Every event must go through :meth:`keep`."""

    def __init__(self, session: Session, *, steps_are_watched: bool = False) -> None:
        """
        :param steps_are_watched: SINGLESTEP events are on for another reason, and stay on after a step.
        """
        self._session = session
        self._steps_are_watched = steps_are_watched
        self._on = False
        self._asked: set[int] = set()
        self._stepping: set[int] = set()
        self._held: dict[int, Event] = {}

    @property
    def on(self) -> bool:
        """Whether the VM is paused, or about to be."""
        return self._on

    @property
    def held(self) -> dict[int, Event]:
        """The vCPUs that are held, in order, and the event that each waits at."""
        return dict(sorted(self._held.items()))

    def pause(self) -> None:
        """Hold every vCPU that the guest has started.

        :raise CommandError: the session may not; nothing is held.
        """
        self._on = True
        try:
            for vcpu in range(self._session.guest_info()):
                if vcpu not in self._asked and vcpu not in self._held and vcpu not in self._stepping:
                    self._ask(vcpu)
        except CommandError:
            self.resume()
            raise

    def keep(self, event: Event) -> bool:
        """Whether the event's reply is ours to send, later."""
        if event.event == EventId.PAUSE_VCPU:
            self._asked.discard(event.vcpu)
        elif event.event == EventId.SINGLESTEP and event.vcpu in self._stepping:
            self._end_step(event.vcpu)
        else:
            return False
        if self._on:
            self._held[event.vcpu] = event
        return self._on

    def step(self, vcpu: int) -> None:
        """Let a held vCPU make one instruction.

        :raise ValueError: it is not held.
        :raise CommandError: the session may not; the vCPU stays held.
        """
        if vcpu not in self._held:
            raise ValueError(f"vCPU {vcpu} is not held")
        self._session.control_events(vcpu, EventId.SINGLESTEP, True)
        self._stepping.add(vcpu)
        self._session.reply(self._held.pop(vcpu))

    def resume(self) -> None:
        """Let all vCPUs go."""
        self._on = False
        for vcpu in sorted(self._stepping):
            self._end_step(vcpu)
        while self._held:
            _, event = self._held.popitem()
            self._session.reply(event)

    def _ask(self, vcpu: int) -> None:
        try:
            self._session.pause_vcpu(vcpu)
        except CommandError as error:
            if error.code != ErrorCode.EAGAIN:  # it has not been started: there is nothing to hold
                raise
        else:
            self._asked.add(vcpu)

    def _end_step(self, vcpu: int) -> None:
        self._stepping.discard(vcpu)
        if not self._steps_are_watched:
            self._session.control_events(vcpu, EventId.SINGLESTEP, False)
