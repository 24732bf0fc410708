# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watching a VM: events are switched on for all of its vCPUs, sorted, answered, and switched off again.

What the kernel cannot filter is sorted here: hits of our breakpoints from the guest's own, accesses to a page that
nobody asked for, pauses that were asked for by :class:`~kvmi_host.introspect.holding.Hold`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from math import inf
from time import monotonic

from kvmi_host.introspect.breakpoints import Breakpoints
from kvmi_host.introspect.holding import Hold
from kvmi_host.introspect.interests import Breakpoint, Interest, PageWatch
from kvmi_host.introspect.plans import Plan, allowed, ask, ask_all, listen, quietly
from kvmi_host.protocol import (
    Access,
    Action,
    CommandError,
    ErrorCode,
    Event,
    EventId,
    PageFaultReply,
    Registers,
    Reply,
    Request,
    messages,
)
from kvmi_host.protocol.ids import VM_EVENTS

RETRY_EVERY = 0.2
"""Seconds after which a vCPU that the guest has not started is tried again."""

_log = logging.getLogger(__name__)

_NEEDS_SORTING = frozenset(
    {EventId.UNHOOK, EventId.CREATE_VCPU, EventId.PAUSE_VCPU, EventId.BREAKPOINT, EventId.PF, EventId.SINGLESTEP}
)
"""Kinds of which not every event is for whoever watches."""

_MAX_PAGES = 400
"""How many pages fit in a SET_PAGE_ACCESS message, and a few less."""


class WatchedEvent(Event):
    """An event that waits for its answer: CONTINUE, unless :meth:`reply` says otherwise."""

    answer: Reply | None = None
    registers_to_set: Registers | None = None

    def reply(
        self,
        action: int = Action.CONTINUE,
        *,
        new_val: int | None = None,
        page_fault: PageFaultReply | None = None,
        registers: Registers | None = None,
    ) -> None:
        """Say how the event is to be answered, which is done when its handling has ended. The last word counts.

        :param action: RETRY at a breakpoint of ours: it is not stepped over, so move rip.
        :param new_val: for CR and MSR: the value to write instead of the guest's own.
        :param page_fault: for PF: how the access is made.
        :param registers: the general registers that the vCPU goes on with. They are set in the same write, and a
            refusal is not heard of.
        """
        self.answer = Reply(self, action, new_val, page_fault)
        self.registers_to_set = registers


_new_tuple = tuple.__new__
_kinds: dict[type[Event], type[WatchedEvent]] = {}


def watched(event: Event) -> WatchedEvent:
    """An event, which waits from now on."""
    kind = type(event)
    if kind is Event:
        return _new_tuple(WatchedEvent, event)
    if kind not in _kinds:  # a dialect that lays out events its own way
        _kinds[kind] = type(f"Watched{kind.__name__}", (WatchedEvent, kind), {})
    return _new_tuple(_kinds[kind], event)


class Watch:
    """What is watched, from :meth:`begin` to :meth:`end`.

    :ivar plain: kinds of events of which each is for whoever watches, and answered as it says: there is no need to go
        through :meth:`sort` and :meth:`answer` with them.
    :ivar unhooked: whether the host has asked for the session's end.
    :ivar stopped: set it, and :meth:`next` finds no more events.
    """

    def __init__(self, hold: Hold, interests: Iterable[Interest]) -> None:
        self.unhooked = False
        self.stopped = False
        self._obeys = False
        self._hold = hold
        self._interests = tuple(interests)
        self._kinds = frozenset(interest.event for interest in self._interests)
        self.plain = self._kinds - _NEEDS_SORTING
        self._breakpoints = Breakpoints(hold)
        self._pages = _pages(interest for interest in self._interests if isinstance(interest, PageWatch))
        self._vm_events = set(self._kinds & VM_EVENTS)
        self._watched: set[int] = set()
        self._not_started: set[int] = set()
        self._retry_at = 0.0

    # -- the beginning and the end

    def obey(self) -> Plan[None]:
        """From now on the host can ask for the session's end; before, it can only end it by force. Tell others of the
        session when this is through.

        :raise UnsupportedDialect: the kernel numbers its messages otherwise.
        """
        yield from ask(messages.get_version())  # which tells how events are to be read
        if EventId.UNHOOK in self._kinds or (yield from allowed(messages.check_event(EventId.UNHOOK))):
            self._vm_events.add(EventId.UNHOOK)
            yield from ask(messages.control_vm_events(EventId.UNHOOK, True))
        self._obeys = True

    def begin(self) -> Plan[None]:
        """:meth:`obey`, where that was not done, and switch everything on. If that does not succeed: :meth:`end` undoes
        what did.

        :raise CommandError: an event or command is not allowed, or not there.
        :raise NotMapped: there is no instruction where a breakpoint is to be.
        :raise UnsupportedDialect: the kernel numbers its messages otherwise.
        """
        if not self._obeys:
            yield from self.obey()
        self._hold.keep_stepping = EventId.SINGLESTEP in self._kinds
        for kind in sorted(self._vm_events - {EventId.UNHOOK}):
            yield from ask(messages.control_vm_events(kind, True))
        for vcpu in range((yield from ask(messages.guest_info()))):
            yield from self._take_in(vcpu)
        yield from ask_all(_accesses(self._pages))
        yield from self._breakpoints.insert([one for one in self._interests if isinstance(one, Breakpoint)])

    def end(self, waiting: WatchedEvent | None = None) -> Plan[None]:
        """Breakpoints out, events off, pages released; then all vCPUs that wait may go on.

        What cannot be undone is logged, and the rest is done. If the host has asked for the session's end, nothing is
        waited for but that the breakpoints are out: the session's end undoes the rest.

        :param waiting: an event that was handed out and is not answered.
        """
        self._hold.keep_stepping = False
        yield from _attempt(self._breakpoints.remove())
        steps = self._breakpoints.stop_stepping()
        off = [
            steps,
            *(self._switches(vcpu, False) for vcpu in sorted(self._watched)),
            *([messages.control_vm_events(kind, False)] for kind in sorted(self._vm_events)),
            _accesses(dict.fromkeys(self._pages, Access.ALL)),
        ]
        if self.unhooked:
            # The VMM may have stopped its vCPUs, to save them: none of them would answer.
            yield from _attempt(quietly(*(request for requests in off for request in requests)))
        else:
            for requests in off:
                yield from _attempt(ask_all(requests))
        if steps:
            yield from self._hold.resume()
        if waiting is not None:
            yield from self._let_go(waiting, waiting.answer, waiting.registers_to_set)
        while True:
            event = self._hold.kept.popleft() if self._hold.kept else (yield from listen(None if self._owing else 0))
            if event is None:
                break
            if event.event == EventId.UNHOOK:
                self.unhooked = True
            elif not (yield from self._hold.take(event)):
                yield from self._let_go(event)

    @property
    def _owing(self) -> bool:
        return self._hold.awaited and not self.unhooked

    def _let_go(self, event: Event, answer: Reply | None = None, registers: Registers | None = None) -> Plan[None]:
        answer = answer or Reply(event)
        if answer.action == Action.CONTINUE and self._is_ours(event):
            answer = Reply(event, Action.RETRY)  # the instruction is back in its place
        yield from _say(answer, registers)

    # -- from event to event

    @property
    def undisturbed(self) -> bool:
        """Whether the next event is the next one that comes, and nothing else is to be seen to."""
        return not (self.stopped or self._hold.kept or self._not_started or self._breakpoints.stepping is not None)

    def next(self, timeout: float | None) -> Plan[Event | None]:
        """The next event for whoever watches.

        :param timeout: seconds to wait for one.
        :return: None: there was none in time, the host asks for the session's end, or :attr:`stopped` was set.
        """
        deadline = None if timeout is None else monotonic() + timeout
        while not self.unhooked:
            yield from self._retry()
            if self._breakpoints.patience <= 0:
                yield from self._breakpoints.put_off()
            if self.stopped:  # looked at last: who sets it later wakes whoever listens
                break
            event = self._take_kept() or (yield from listen(self._patience(deadline)))
            if event is None:
                if deadline is not None and monotonic() >= deadline:
                    return None
            elif self._has_to_wait(event):
                self._hold.kept.append(event)
            elif (yield from self.sort(event)):
                return event
        return None

    def sort(self, event: Event) -> Plan[bool]:
        """Whether an event is for whoever watches. If not, it is answered."""
        kind = event.event
        if kind == EventId.UNHOOK:
            self.unhooked = True
            return False
        if kind == EventId.CREATE_VCPU and event.vcpu not in self._watched:
            yield from self._take_in(event.vcpu)
        elif kind == EventId.PAUSE_VCPU and (yield from self._hold.take(event)):
            return False
        elif kind == EventId.SINGLESTEP and event.vcpu == self._breakpoints.stepping:
            yield from self._breakpoints.stepped(event)
            yield from self._hold.hold(event)
            return False
        elif kind == EventId.SINGLESTEP:
            yield from self._breakpoints.stepped_late(event)
        ours = self._is_ours(event)
        if self._matches(event) and not (ours and self._breakpoints.hit_again(event)):
            return True
        if ours:
            yield from self._breakpoints.step_over(event)
        else:
            yield Reply(event)
        return False

    def answer(self, event: Event) -> Plan[None]:
        """Answer an event that was handed out."""
        answer, registers = Reply(event), None
        if isinstance(event, WatchedEvent):
            answer, registers = event.answer or answer, event.registers_to_set
        if answer.action == Action.CONTINUE and self._is_ours(event):
            if registers is not None:
                yield from ask(messages.set_registers(event.vcpu, registers))
            yield from self._breakpoints.step_over(event)
        else:
            yield from _say(answer, registers)

    def _is_ours(self, event: Event) -> bool:
        return event.event == EventId.BREAKPOINT and self._breakpoints.hit(event)

    def _retry(self) -> Plan[None]:
        """Try again the vCPUs that the guest had not started."""
        if self._not_started and monotonic() >= self._retry_at:
            for vcpu in sorted(self._not_started):
                yield from self._take_in(vcpu)
            self._retry_at = monotonic() + RETRY_EVERY

    def _matches(self, event: Event) -> bool:
        return any(interest.event == event.event and interest.matches(event) for interest in self._interests)

    def _take_kept(self) -> Event | None:
        kept = self._hold.kept
        for index, event in enumerate(kept):
            if not self._has_to_wait(event):
                del kept[index]
                return event
        return None

    def _has_to_wait(self, event: Event) -> bool:
        """While one vCPU steps over a breakpoint, which is out, what the others say has to wait. While the VM is
        paused, no step is begun."""
        if event.event == EventId.UNHOOK:
            return False
        stepping = self._breakpoints.stepping
        if stepping is not None:
            return event.vcpu != stepping
        return self._hold.paused and self._is_ours(event)

    def _patience(self, deadline: float | None) -> float | None:
        left = self._breakpoints.patience
        if deadline is not None:
            left = min(left, deadline - monotonic())
        if self._not_started:
            left = min(left, RETRY_EVERY)
        return None if left == inf else max(0.0, left)

    # -- vCPUs

    def _take_in(self, vcpu: int) -> Plan[None]:
        self._watched.add(vcpu)
        try:
            yield from ask_all(self._switches(vcpu, True))
        except CommandError as error:
            if error.code != ErrorCode.EAGAIN:
                raise
            self._watched.discard(vcpu)
            self._not_started.add(vcpu)
        else:
            self._not_started.discard(vcpu)

    def _switches(self, vcpu: int, enable: bool) -> list[Request[None]]:
        requests: list[Request[None]] = [
            messages.control_events(vcpu, kind, enable)
            for kind in sorted(self._kinds - VM_EVENTS - {EventId.PAUSE_VCPU})
        ]
        for interest in self._interests:
            requests += interest.switch(vcpu, enable)
        return requests


def _say(answer: Reply, registers: Registers | None) -> Plan[None]:
    if registers is None:
        yield answer
    else:
        yield from quietly(messages.set_registers(answer.event.vcpu, registers), answer)


def _pages(watches: Iterable[PageWatch]) -> dict[int, Access]:
    pages: dict[int, Access] = {}
    for watch in watches:
        page = watch.gpa & ~(messages.PAGE_SIZE - 1)
        pages[page] = pages.get(page, Access.ALL) & watch.allowed
    return pages


def _accesses(pages: dict[int, Access]) -> list[Request[None]]:
    gpas = sorted(pages)
    parts = (gpas[start : start + _MAX_PAGES] for start in range(0, len(gpas), _MAX_PAGES))
    return [messages.set_page_access({gpa: pages[gpa] for gpa in part}) for part in parts]


def _attempt(plan: Plan[object]) -> Plan[None]:
    try:
        yield from plan
    except CommandError as error:
        _log.warning("what was switched on is not switched off: %s", error)
