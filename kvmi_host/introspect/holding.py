# SPDX-License-Identifier: LGPL-2.1-or-later
"""Holding vCPUs: each waits with an event that is not answered until it may go on.

A vCPU waits with one event at a time. One that waits with an event already is held by that, until it is answered, and
is not asked to pause. A PAUSE_VCPU event that was asked for may come late, when something else was answered first:
whoever meets it hands it to :meth:`Hold.take`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping

from kvmi_host.introspect.errors import SessionTimeout
from kvmi_host.introspect.plans import Plan, ask, listen
from kvmi_host.protocol import CommandError, ErrorCode, Event, EventId, Reply, messages


class Hold:
    """Which vCPUs of a session are held, and with what.

    :ivar kept: events that came while others were awaited, in order, not answered.
    :ivar keep_stepping: SINGLESTEP events are wanted for themselves: they stay on when a step has ended.
    """

    def __init__(self) -> None:
        self.kept: deque[Event] = deque()
        self.keep_stepping = False
        self._held: dict[int, Event] = {}
        self._owed: Counter[int] = Counter()
        self._left: set[int] = set()
        self._depth = 0

    def pause(
        self, waiting: Collection[int] = (), leave: Collection[int] = (), patience: float | None = None
    ) -> Plan[None]:
        """Hold every vCPU that the guest has started. Once for each :meth:`resume` that follows.

        :param waiting: vCPUs that wait with an event which the caller has.
        :param leave: vCPUs that shall go on.
        :param patience: seconds that each may take; None: as long as the session waits for an answer.
        :raise SessionTimeout: one does not stop.
        """
        self._depth += 1
        self._left.update(leave)
        count = yield from ask(messages.guest_info())
        elsewhere = {*waiting, *leave, *self._held, *(event.vcpu for event in self.kept)}
        yield from self._stop((vcpu for vcpu in range(count) if vcpu not in elsewhere), patience)

    def _stop(self, vcpus: Iterable[int], patience: float | None = None) -> Plan[None]:
        running = set()
        for vcpu in vcpus:
            try:
                # The answer comes when it is out of the guest; the event may take a little longer.
                yield from ask(messages.pause_vcpu(vcpu, wait=True))
            except CommandError as error:
                if error.code != ErrorCode.EAGAIN:  # it has not been started: there is nothing to hold
                    raise
                continue
            self._owed[vcpu] += 1
            running.add(vcpu)
        while running:
            event = yield from listen(patience)
            if event is None:
                raise SessionTimeout(f"vCPUs {sorted(running)} were asked to pause, and do not")
            if not (yield from self.take(event)):
                self.kept.append(event)
            if event.event != EventId.UNHOOK:
                running.discard(event.vcpu)

    def resume(self) -> Plan[None]:
        """Let them go on, when all that paused them have said so. Those in :attr:`kept` wait for their answer."""
        self._depth -= 1
        if self._depth:
            return
        self._left.clear()
        while self._held:
            _, event = self._held.popitem()
            yield Reply(event)

    @property
    def held(self) -> Mapping[int, Event]:
        """The vCPUs that are held, and what each waits with."""
        return self._held

    def take(self, event: Event) -> Plan[bool]:
        """Whether this is a pause that was asked for here. It is held, or answered if it comes too late for that."""
        if event.event != EventId.PAUSE_VCPU or not self._owed[event.vcpu]:
            return False
        self._owed[event.vcpu] -= 1
        if event.vcpu in self._left:
            yield Reply(event)
        else:
            yield from self.hold(event)
        return True

    def hold(self, event: Event) -> Plan[None]:
        """Hold a vCPU with its event where there is a pause, or answer that."""
        if self._depth:
            self._held[event.vcpu] = event
        else:
            yield Reply(event)

    @property
    def paused(self) -> bool:
        """Whether there is a pause."""
        return self._depth > 0

    @property
    def awaited(self) -> bool:
        """Whether there are pauses to come that were asked for here."""
        return self._owed.total() > 0

    def step(self, vcpu: int) -> Plan[Event]:
        """Let a held vCPU execute one instruction, or take one interrupt.

        :return: the event that it waits with now: SINGLESTEP, or another that the instruction made. That one is in
            :attr:`kept`, for whoever asked for such events.
        :raise ValueError: the vCPU is not held.
        :raise CommandError: the session may not; the vCPU stays held.
        :raise SessionTimeout: the vCPU has not come to the next instruction, perhaps because it sleeps. It is held
            where it is.
        """
        if vcpu not in self._held:
            raise ValueError(f"vCPU {vcpu} is not paused: one steps within a pause")
        yield from ask(messages.control_events(vcpu, EventId.SINGLESTEP, True))
        yield Reply(self._held.pop(vcpu))
        event = yield from self._event_of(vcpu)
        if not self.keep_stepping:
            yield from ask(messages.control_events(vcpu, EventId.SINGLESTEP, False))
        if event is None:
            yield from self._stop([vcpu])
            raise SessionTimeout(f"vCPU {vcpu} was to make one step, and has not come to its end: does it sleep?")
        if event.event == EventId.SINGLESTEP:
            self._held[vcpu] = event
        else:
            self.kept.append(event)
        return event

    def _event_of(self, vcpu: int) -> Plan[Event | None]:
        """The next event of this vCPU, None if none comes; those of the others are kept."""
        while True:
            event = yield from listen()
            if event is None or (event.vcpu == vcpu and event.event != EventId.UNHOOK):
                return event
            if not (yield from self.take(event)):
                self.kept.append(event)
