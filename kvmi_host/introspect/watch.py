# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watching a VM: events are switched on for all of its vCPUs, sorted, answered, and switched off again.

What the kernel cannot filter is sorted here: hits of our breakpoints from the guest's own, accesses to a page that
nobody asked for, pauses that were asked for by :class:`~kvmi_host.introspect.holding.Hold`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from time import monotonic
from typing import Self

from kvmi_host.introspect.breakpoints import Breakpoints
from kvmi_host.introspect.holding import Hold
from kvmi_host.introspect.interests import Breakpoint, Interest, PageWatch
from kvmi_host.introspect.plans import Plan, Say, allowed, ask, ask_all, listen
from kvmi_host.protocol import (
    Access,
    Action,
    CommandError,
    ErrorCode,
    Event,
    EventId,
    PageFaultReply,
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

    answer: Say | None = None

    @classmethod
    def of(cls, event: Event) -> Self:
        """An event, which waits from now on."""
        return tuple.__new__(cls, event)

    def reply(
        self,
        action: int = Action.CONTINUE,
        *,
        new_val: int | None = None,
        page_fault: PageFaultReply | None = None,
    ) -> None:
        """Say how the event is to be answered, which is done when its handling has ended. The last word counts.

        :param action: RETRY at a breakpoint of ours: it is not stepped over; move rip before.
        :param new_val: for CR and MSR: the value to write instead of the guest's own.
        :param page_fault: for PF: how the access is made.
        """
        self.answer = Say(self, action, new_val, page_fault)


class Watch:
    """What is watched, from :meth:`begin` to :meth:`end`.

    :ivar plain: kinds of events of which each is for whoever watches, and answered as it says: there is no need to go
        through :meth:`sort` and :meth:`answer` with them.
    :ivar unhooked: whether the host has asked for the session's end.
    """

    def __init__(self, hold: Hold, interests: Iterable[Interest]) -> None:
        self.unhooked = False
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

    def begin(self) -> Plan[None]:
        """Switch everything on. If that does not succeed: :meth:`end` undoes what did.

        :raise CommandError: an event or command is not allowed, or not there.
        :raise NotMapped: there is no instruction where a breakpoint is to be.
        """
        if (yield from allowed(messages.check_event(EventId.UNHOOK))):
            self._vm_events.add(EventId.UNHOOK)  # so that detach can ask us
        for kind in sorted(self._vm_events):
            yield from ask(messages.control_vm_events(kind, True))
        for vcpu in range((yield from ask(messages.guest_info()))):
            yield from self._take_in(vcpu)
        yield from _set_access(self._pages)
        yield from self._breakpoints.insert([one for one in self._interests if isinstance(one, Breakpoint)])

    def end(self, waiting: WatchedEvent | None = None) -> Plan[None]:
        """Breakpoints out, events off, pages released; then all vCPUs that wait may go on.

        What cannot be undone is logged, and the rest is done.

        :param waiting: an event that was handed out and is not answered.
        """
        yield from _attempt(self._breakpoints.remove())
        for vcpu in sorted(self._watched):
            yield from _attempt(self._switch(vcpu, False))
        for kind in sorted(self._vm_events):
            yield from _attempt(ask(messages.control_vm_events(kind, False)))
        yield from _attempt(_set_access(dict.fromkeys(self._pages, Access.ALL)))
        if waiting is not None:
            yield from self._let_go(waiting, waiting.answer)
        if self._breakpoints.stepping is not None:
            yield from self._hold.resume()
        while True:
            event = self._hold.kept.popleft() if self._hold.kept else (yield from listen(None if self._owing else 0))
            if event is None:
                break
            if event.event == EventId.UNHOOK:
                self.unhooked = True
            else:
                self._hold.meets(event)
                yield from self._let_go(event, None)
        self._breakpoints.forget()

    @property
    def _owing(self) -> bool:
        return self._hold.awaited and not self.unhooked

    def _let_go(self, event: Event, answer: Say | None) -> Plan[None]:
        if answer is None:
            # The instruction is back in its place.
            ours = event.event == EventId.BREAKPOINT and self._breakpoints.hit(event)
            answer = Say(event, Action.RETRY if ours else Action.CONTINUE)
        yield answer

    # -- from event to event

    @property
    def undisturbed(self) -> bool:
        """Whether the next event is the next one that comes, and nothing else is to be seen to."""
        return not (self._hold.kept or self._not_started or self._breakpoints.stepping is not None)

    def next(self, timeout: float | None) -> Plan[WatchedEvent | None]:
        """The next event for whoever watches.

        :param timeout: seconds to wait for one.
        :return: None: there was none in time, or the host asks for the session's end.
        """
        deadline = None if timeout is None else monotonic() + timeout
        while not self.unhooked:
            yield from self._retry()
            event = self._take_kept() or (yield from listen(self._patience(deadline)))
            if event is None:
                if deadline is not None and monotonic() >= deadline:
                    return None
            elif self._has_to_wait(event):
                self._hold.kept.append(event)
            elif (yield from self.sort(event)):
                return WatchedEvent.of(event)
        return None

    def sort(self, event: Event) -> Plan[bool]:
        """Whether an event is for whoever watches. If not, it is answered."""
        kind = event.event
        if kind == EventId.UNHOOK:
            self.unhooked = True
            return False
        if kind == EventId.CREATE_VCPU and event.vcpu not in self._watched:
            yield from self._take_in(event.vcpu)
        elif kind == EventId.PAUSE_VCPU and self._hold.meets(event):
            yield Say(event)
            return False
        elif kind == EventId.SINGLESTEP and event.vcpu == self._breakpoints.stepping:
            yield from self._breakpoints.stepped(event, EventId.SINGLESTEP in self._kinds)
            yield Say(event)
            return False
        if self._matches(event):
            if kind == EventId.BREAKPOINT and self._breakpoints.hit(event) and self._breakpoints.hit_again(event):
                yield from self._breakpoints.step_over(event)
                return False
            return True
        yield from self._reply(event)
        return False

    def answer(self, event: WatchedEvent) -> Plan[None]:
        """Answer an event that was handed out."""
        if event.answer is None or event.answer.action == Action.CONTINUE:
            yield from self._reply(event, event.answer)
        else:
            yield event.answer

    def _retry(self) -> Plan[None]:
        """Try again the vCPUs that the guest had not started."""
        if self._not_started and monotonic() >= self._retry_at:
            for vcpu in sorted(self._not_started):
                yield from self._take_in(vcpu)
            self._retry_at = monotonic() + RETRY_EVERY

    def _reply(self, event: Event, answer: Say | None = None) -> Plan[None]:
        if event.event == EventId.BREAKPOINT and self._breakpoints.hit(event):
            yield from self._breakpoints.step_over(event)
        else:
            yield answer or Say(event)

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
        """While one vCPU steps over a breakpoint, which is out, what the others say has to wait."""
        stepping = self._breakpoints.stepping
        return stepping is not None and event.vcpu != stepping and event.event != EventId.UNHOOK

    def _patience(self, deadline: float | None) -> float | None:
        left = None if deadline is None else max(0.0, deadline - monotonic())
        if self._not_started:
            return RETRY_EVERY if left is None else min(left, RETRY_EVERY)
        return left

    # -- vCPUs

    def _take_in(self, vcpu: int) -> Plan[None]:
        try:
            yield from self._switch(vcpu, True)
        except CommandError as error:
            if error.code != ErrorCode.EAGAIN:
                raise
            self._watched.discard(vcpu)
            self._not_started.add(vcpu)
        else:
            self._not_started.discard(vcpu)

    def _switch(self, vcpu: int, enable: bool) -> Plan[None]:
        requests: list[Request[None]] = [
            messages.control_events(vcpu, kind, enable)
            for kind in sorted(self._kinds - VM_EVENTS - {EventId.PAUSE_VCPU})
        ]
        for interest in self._interests:
            requests += interest.switch(vcpu, enable)
        if enable:
            self._watched.add(vcpu)
        yield from ask_all(requests)


def _pages(watches: Iterable[PageWatch]) -> dict[int, Access]:
    pages: dict[int, Access] = {}
    for watch in watches:
        page = watch.gpa & ~(messages.PAGE_SIZE - 1)
        pages[page] = pages.get(page, Access.ALL) & watch.allowed
    return pages


def _set_access(pages: dict[int, Access]) -> Plan[None]:
    gpas = sorted(pages)
    for start in range(0, len(gpas), _MAX_PAGES):
        part = gpas[start : start + _MAX_PAGES]
        yield from ask(messages.set_page_access({gpa: pages[gpa] for gpa in part}))


def _attempt(plan: Plan[None]) -> Plan[None]:
    try:
        yield from plan
    except CommandError as error:
        _log.warning("what was switched on is not switched off: %s", error)
