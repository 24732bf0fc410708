# SPDX-License-Identifier: LGPL-2.1-or-later
"""Switching events on for a whole VM, and off again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import monotonic

from kvmi_host.introspect.errors import SessionError
from kvmi_host.introspect.session import Session
from kvmi_host.protocol import CommandError, ErrorCode, Event, EventId, event_name, msr_index
from kvmi_host.protocol.ids import VM_EVENTS

CONTROL_REGISTERS = (0, 3, 4)
"""Those whose writes can be watched."""

_MSR_PREFIX = "msr:"
_RETRY_EVERY = 0.2  # seconds: how often a vCPU that the guest has not started is tried again


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which events to watch. ``pause``: pause every vCPU once, when it is first watched."""

    events: frozenset[int]
    control_registers: frozenset[int] = frozenset()
    msrs: frozenset[int] = frozenset()
    pause: bool = False

    @classmethod
    def parse(cls, names: Iterable[str], event_id: Callable[[str], int]) -> Wanted:
        """From names of events, and ``cr0``, ``cr3``, ``cr4``, ``pause``; ``cr`` is all three registers; ``msr:lstar``
        or ``msr:0xc0000082`` is an MSR.

        :param event_id: the number of an event's name; raises ValueError if there is no such event.
        :raise ValueError: an MSR is not known, or none is named.
        """
        events: set[int] = set()
        registers: set[int] = set()
        msrs: set[int] = set()
        pause = False
        for name in names:
            if name in {f"cr{number}" for number in CONTROL_REGISTERS}:
                events.add(EventId.CR)
                registers.add(int(name[2:]))
            elif name.startswith(_MSR_PREFIX):
                events.add(EventId.MSR)
                msrs.add(msr_index(name.removeprefix(_MSR_PREFIX)))
            elif name == event_name(EventId.MSR):
                raise ValueError(f"which MSR? As in {_MSR_PREFIX}lstar, {_MSR_PREFIX}0xc0000082")
            elif name in {"pause", "pause-vcpu"}:
                pause = True
            else:
                event = event_id(name)
                events.add(event)
                registers.update(CONTROL_REGISTERS if event == EventId.CR else ())
        return cls(frozenset(events), frozenset(registers), frozenset(msrs), pause)


class Watch:
    """The events of one session that are switched on. New and newly started vCPUs are taken in as they come."""

    def __init__(self, session: Session, wanted: Wanted) -> None:
        """
        :raise CommandError: an event is not allowed, or not there.
        """
        self._session = session
        self._wanted = wanted
        self._watched: set[int] = set()
        self._not_started: set[int] = set()
        self._retry_at = 0.0
        for event in sorted(wanted.events & VM_EVENTS):
            session.control_vm_events(event, True)
        for vcpu in range(session.guest_info()):
            self._take_in(vcpu)

    def saw(self, event: Event) -> None:
        """Take in the vCPU that a CREATE_VCPU event is about. Call it before the event is replied to."""
        if event.event == EventId.CREATE_VCPU and event.vcpu not in self._watched:
            self._take_in(event.vcpu)

    def retry(self) -> None:
        """Try again the vCPUs that the guest had not started. Call it now and then."""
        if self._not_started and monotonic() >= self._retry_at:
            for vcpu in sorted(self._not_started):
                self._take_in(vcpu)
            self._retry_at = monotonic() + _RETRY_EVERY

    def stop(self) -> None:
        """Switch everything off, and let go of the vCPUs that wait. Does what it can of it; raises nothing of ours."""
        try:
            for vcpu in sorted(self._watched):
                self._switch(vcpu, False)
            for event in sorted(self._wanted.events & VM_EVENTS):
                self._session.control_vm_events(event, False)
            while (event_left := self._session.next_event(0)) is not None:
                if event_left.event != EventId.UNHOOK:
                    self._session.reply(event_left)
        except (CommandError, SessionError):
            return  # the session is being taken down: the kernel lets go of the vCPUs when it ends

    def _take_in(self, vcpu: int) -> None:
        try:
            self._switch(vcpu, True)
        except CommandError as error:
            if error.code != ErrorCode.EAGAIN:
                raise
            self._not_started.add(vcpu)
            return
        self._not_started.discard(vcpu)
        self._watched.add(vcpu)
        if self._wanted.pause:
            self._session.pause_vcpu(vcpu)

    def _switch(self, vcpu: int, enable: bool) -> None:
        for event in sorted(self._wanted.events - VM_EVENTS):
            self._session.control_events(vcpu, event, enable)
        for register in sorted(self._wanted.control_registers):
            self._session.control_cr(vcpu, register, enable)
        for msr in sorted(self._wanted.msrs):
            self._session.control_msr(vcpu, msr, enable)
