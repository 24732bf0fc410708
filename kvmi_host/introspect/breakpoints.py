# SPDX-License-Identifier: LGPL-2.1-or-later
"""Breakpoints in guest memory: INT3 in an instruction's place, and stepping over it.

To step over: every other vCPU is held, the instruction put back, one step made, INT3 put in again. No vCPU passes the
place unseen. An interrupt may come before the instruction: then it is still to be executed, and the next hit is no new
one.

A VMM may stop a vCPU at any time, in its step as well, and waits for those that are held. So a step that does not come
to its end is put off: all go on, and the breakpoint is met once more, which is no new hit either.
"""

from __future__ import annotations

from math import inf
from time import monotonic

from kvmi_host.introspect import memory
from kvmi_host.introspect.errors import SessionTimeout
from kvmi_host.introspect.holding import Hold
from kvmi_host.introspect.interests import Breakpoint
from kvmi_host.introspect.paging import NotMapped, walk
from kvmi_host.introspect.plans import Plan, ask, ask_all, quietly
from kvmi_host.protocol import Action, BreakpointHit, CommandError, Event, EventId, Reply, Request, messages

STEP_PATIENCE = 2.0
"""Seconds that a step may take, and that each vCPU may take to be held for it."""

_INT3 = b"\xcc"


class Breakpoints:
    """Those of one session.

    :ivar stepping: the vCPU that steps over one now.
    """

    def __init__(self, hold: Hold) -> None:
        self.stepping: int | None = None
        self._hold = hold
        self._originals: dict[int, bytes] = {}
        self._over: Event | None = None
        self._due = 0.0
        self._interrupted: dict[int, tuple[int, int]] = {}
        self._put_off: dict[int, Event] = {}

    def insert(self, breakpoints: list[Breakpoint]) -> Plan[None]:
        """Put them in.

        :raise NotMapped: vCPU 0's page tables, or those of the process, have nothing at an address.
        :raise CommandError: there is no memory, or the session may not change the guest.
        """
        for wanted in breakpoints:
            gpa = yield from _find(wanted)
            if gpa not in self._originals:
                original = yield from ask(messages.read_physical(gpa, 1))
                yield from ask(messages.write_physical(gpa, _INT3))
                self._originals[gpa] = original

    def remove(self) -> Plan[None]:
        """Put every instruction back. Hits that were not answered are still known by :meth:`hit`."""
        yield from ask_all([messages.write_physical(gpa, original) for gpa, original in self._originals.items()])

    def stop_stepping(self) -> list[Request[None]]:
        """If a vCPU is in a step, what lets it go on without it; the others are still held."""
        if self.stepping is None:
            return []
        vcpu, self.stepping = self.stepping, None
        return [messages.control_events(vcpu, EventId.SINGLESTEP, False)]

    def hit(self, event: Event) -> bool:
        """Whether a BREAKPOINT event is of one of these."""
        data = event.data
        return isinstance(data, BreakpointHit) and data.gpa in self._originals

    def hit_again(self, event: Event) -> bool:
        """Whether a hit is the rest of one that an interrupt came into."""
        registers = event.registers
        return self._interrupted.pop(event.vcpu, None) == (registers.rip, registers.rsp)

    def step_over(self, event: Event) -> Plan[None]:
        """Answer a hit, and let the vCPU begin with the step. Its SINGLESTEP event is for :meth:`stepped`."""
        data = event.data
        assert isinstance(data, BreakpointHit)
        self.stepping, self._over = event.vcpu, event
        try:
            yield from self._hold.pause(leave=[event.vcpu], patience=STEP_PATIENCE)
        except SessionTimeout:
            yield from self.put_off()
        else:
            yield from ask_all(_switch(data.gpa, self._originals[data.gpa], event.vcpu, True))
            self._due = monotonic() + STEP_PATIENCE
        yield Reply(event, Action.RETRY)

    @property
    def patience(self) -> float:
        """Seconds that are left for the step that is being made; infinite if there is none."""
        return inf if self.stepping is None else self._due - monotonic()

    def put_off(self) -> Plan[None]:
        """Let all vCPUs go on, with the breakpoint in."""
        assert self._over is not None
        over, self.stepping, self._over = self._over, None, None
        data = over.data
        assert isinstance(data, BreakpointHit)
        self._interrupted[over.vcpu] = (over.registers.rip, over.registers.rsp)
        self._put_off[over.vcpu] = over
        # Nobody waits for the vCPU's answer: it may be stopped.
        yield from quietly(*_switch(data.gpa, _INT3, over.vcpu, self._hold.keep_stepping))
        yield from self._hold.resume()

    def stepped_late(self, event: Event) -> Plan[None]:
        """A SINGLESTEP event that is for others: it may be of a step that was put off, and made nevertheless."""
        over = self._put_off.pop(event.vcpu, None)
        if over is not None and event.rip != over.rip and not (yield from _came_between(over, event)):
            self._interrupted.pop(event.vcpu, None)

    def stepped(self, event: Event) -> Plan[None]:
        """The step is made: put the breakpoint in again, and let all go on."""
        assert self._over is not None
        over, self.stepping, self._over = self._over, None, None
        data = over.data
        assert isinstance(data, BreakpointHit)
        if (yield from _came_between(over, event)):
            self._interrupted[over.vcpu] = (over.registers.rip, over.registers.rsp)
        yield from ask_all(_switch(data.gpa, _INT3, over.vcpu, self._hold.keep_stepping))
        yield from self._hold.resume()


def _switch(gpa: int, byte: bytes, vcpu: int, step: bool) -> list[Request[None]]:
    return [messages.write_physical(gpa, byte), messages.control_events(vcpu, EventId.SINGLESTEP, step)]


def _find(wanted: Breakpoint) -> Plan[int]:
    if wanted.physical:
        return wanted.address
    tables = yield from memory.tables_of(0, wanted.cr3)
    return (yield from walk(tables, wanted.address)).gpa


def _came_between(before: Event, after: Event) -> Plan[bool]:
    """Whether the step led to a handler, which is to return to where the step began.

    An interrupt leaves that address on the handler's stack, at its top or behind an error code. An instruction that
    pushes its own address is taken for one: then a hit may be missed that follows at once with the same stack.
    """
    if after.rip == before.rip:
        return False
    width = after.mode
    top = after.registers.rsp + (0 if width == 8 else after.sregs.ss.base)
    locate = memory.virtual(lambda: memory.tables_of(after.vcpu))
    try:
        pushed = yield from memory.read(locate, top, 2 * width)
    except (NotMapped, CommandError):
        return False
    rip = before.registers.rip.to_bytes(8, "little")[:width]
    return rip in (pushed[:width], pushed[width:])
