# SPDX-License-Identifier: LGPL-2.1-or-later
"""A campaign against the kernel part: what :mod:`kvmi_host.testing.fuzz` draws is thrown at a VM whose vCPUs make every
kind of event, while another VM is hooked, unhooked and killed.

    report = Campaign(seed=1, messages=200_000).run()

What is drawn follows from the seed; what is answered to, and when, is up to the vCPUs.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf
from random import Random
from time import monotonic, sleep
from types import TracebackType
from typing import Self

from kvmi_host.attach import FULL, OBSERVE, AttachError, NotHooked, Policy, VmHandle
from kvmi_host.host.footprint import NOTHING, Footprint, footprint, receivers
from kvmi_host.protocol import Access, Command, ErrorCode, Event, EventId, Frame, Framer, command_name, frame
from kvmi_host.testing.fuzz import SERVED, Exchange, Fuzzer, Message
from kvmi_host.testing.live import DEADLINE, LiveError, LiveGuest, hook, hook_socket
from kvmi_host.testing.puppet import Puppet, page
from kvmi_host.testing.qmp import MonitorError

_UNKNOWN = 0xFFFF
"""No command: it is answered even while answers are off."""
_REFUSAL = 8
_ERRORS = frozenset(map(int, ErrorCode))
_QUIET = 0.02
"""Seconds after which noise has been dealt with, or is waited for to go on."""
_SLICE = 1 << 16
_TELL_EVERY = 10.0
_SILENT = 4
"""After so many sessions without any event the guest is asked whether it is well."""
_STOPPED, _NOISY = 0.03, 0.1
"""The shares of sessions with a VM that its VMM has stopped, and of those that make noise."""


class Profile(StrEnum):
    """What may be sent."""

    STORM = "storm"
    """Nothing but what is well-formed and does no harm: no session ends before its time."""
    HARMLESS = "harmless"
    """What the guest comes through."""
    ANYTHING = "anything"
    """What kills or breaks it, too: it is replaced then."""


_SPOILT = (0.0, 0.1, 0.3, 0.6)
"""The shares of messages that are not well-formed, of which each session has one. Most of them end it."""
_LENGTHS = (20, 100, 500)
"""How many messages a session has if nothing ends it."""
_HARM = 0.05


@dataclass(slots=True)
class Report:
    """What a campaign did.

    :ivar sent: messages by form.
    :ivar commands: messages by command, whatever their form.
    :ivar events: events by kind.
    :ivar noise: bytes that were drawn as no messages.
    :ivar ended: sessions that the kernel ended.
    :ivar replaced: how often the VM was broken or dead.
    :ivar neighbours: VMs that lived and died meanwhile; and their sessions.
    """

    seed: int
    profile: Profile
    sent: Counter[str] = field(default_factory=Counter)
    commands: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    noise: int = 0
    sessions: int = 0
    ended: int = 0
    replaced: int = 0
    neighbours: int = 0
    neighbour_sessions: int = 0
    seconds: float = 0.0
    before: Footprint = NOTHING
    after: Footprint = NOTHING

    @property
    def left_behind(self) -> int:
        """How many objects there are more than before."""
        return self.after.objects.total() - self.before.objects.total()

    @property
    def messages(self) -> int:
        """How many were sent."""
        return self.sent.total()

    def __str__(self) -> str:
        rate = self.messages / self.seconds if self.seconds else 0
        lines = [
            f"{self.profile}, seed {self.seed}: {self.messages} messages in {self.seconds:.0f} s, {rate:.0f} a second",
            f"{self.sessions} sessions, {self.ended} of them ended by the kernel; {self.replaced} times a new VM",
            f"beside it {self.neighbours} VMs with {self.neighbour_sessions} sessions lived and died",
            f"messages: {_listed(self.sent)}; {self.noise} bytes of noise",
            f"commands: {_listed(self.commands)}",
            f"events: {_listed(self.events)}",
            f"before: {self.before}",
            f"after:  {self.after}",
            f"more objects than before: {_listed(self.after.objects - self.before.objects)}",
        ]
        return "\n".join(lines)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


class _Ended(Exception):
    """The kernel has ended the session."""


class _Line:
    """The socket of a session. Never blocked: what comes is taken while what goes has to wait."""

    def __init__(self, sock: socket.socket, exchange: Exchange, report: Report) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._exchange = exchange
        self._report = report
        self._framer = Framer()
        self._awaited = -1

    def send(self, data: bytes) -> None:
        """Send all of it.

        :raise _Ended: the kernel did not want it.
        """
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._sock.send(rest[:_SLICE]) :]
            except BlockingIOError:
                self._wait(select.POLLIN | select.POLLOUT)
            except (BrokenPipeError, ConnectionResetError):
                raise _Ended from None

    def settle(self, seq: int) -> None:
        """Wait until the kernel has read all that was sent, and take what it has to say.

        :raise _Ended: it has ended the session instead.
        """
        self._awaited = seq
        self.send(frame(_UNKNOWN, seq))
        while self._awaited >= 0:
            self._wait()

    def take(self, seconds: float) -> bool:
        """Take what has come, or comes first; False: nothing in time.

        :raise _Ended: the session is over.
        """
        return self._take(seconds, select.POLLIN)

    def _wait(self, events: int = select.POLLIN) -> None:
        if not self._take(DEADLINE, events):
            raise LiveError("the session is stuck: the kernel neither reads nor answers")

    def _take(self, seconds: float, events: int) -> bool:
        poll = select.poll()
        poll.register(self._sock, events)
        if not poll.poll(seconds * 1000):
            return False
        try:
            data = self._sock.recv(_SLICE)
        except BlockingIOError:
            return True
        except ConnectionResetError:
            raise _Ended from None
        if not data:
            raise _Ended
        self._framer.feed(data)
        while (message := self._framer.next_frame()) is not None:
            self._message(message)
        return True

    def _message(self, message: Frame) -> None:
        # The refusal of a command that has the number of events is no event.
        if message.id == Command.EVENT and len(message.payload) > _REFUSAL:
            self._event(Event(message.seq, message.payload))
        elif message.id == _UNKNOWN and message.seq == self._awaited:
            self._awaited = -1
        else:
            error = int.from_bytes(message.payload[:4], "little", signed=True)
            if error and error not in _ERRORS:
                raise LiveError(f"{command_name(message.id)} is answered with error {error}")

    def _event(self, event: Event) -> None:
        if event.seq != self._exchange.seen + 1:
            raise LiveError(f"event {event.seq} comes after {self._exchange.seen}")
        self._exchange.note_event(event)
        self._report.events[EventId(event.event).name.lower()] += 1


class Neighbours:
    """VMs that come, are hooked and unhooked, and are killed: one after another, in a thread, while the block runs.

    :ivar failure: what went wrong.
    """

    def __init__(self, random: Random, report: Report) -> None:
        self.failure: Exception | None = None
        self._random = random
        self._report = report
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._enough.set()
        self._thread.join(2 * DEADLINE)

    def _run(self) -> None:
        try:
            while not self._enough.is_set():
                with LiveGuest(1, "puppet") as guest:
                    self._live(guest.booted())
                    self._report.neighbours += 1
        except Exception as failure:
            self.failure = failure

    def _live(self, guest: LiveGuest) -> None:
        """The last session is open when the guest is killed."""
        for _ in range(self._random.randrange(1, 20)):
            if self._enough.is_set():
                return
            with hook(guest) as session:
                self._report.neighbour_sessions += 1
                session.set_page_access({page(0): Access.R})
                session.control_events(0, EventId.PF, True)
                for _ in range(self._random.randrange(3)):
                    session.pause_vcpu(0)
                how = self._random.randrange(4)
                if how == 0:
                    with VmHandle(guest.pid) as vm:
                        vm.unhook_force()
                elif how == 1:
                    session.next_event(0.05)
                elif how == 2:
                    session.send_raw(self._random.randbytes(64))
                elif self._random.random() < 0.2:
                    guest.kill()
                    return


class Campaign:
    """One of a profile, with one seed.

    :ivar report: what has been done so far.
    """

    def __init__(
        self,
        seed: int,
        profile: Profile = Profile.HARMLESS,
        *,
        messages: float = inf,
        seconds: float = inf,
        vcpus: int = 4,
        tell: Callable[[str], None] = lambda _line: None,
    ) -> None:
        """
        :param messages: how many to send at least, or
        :param seconds: how long to go on.
        :param tell: takes a line now and then that tells how far it is.
        """
        self.report = Report(seed, profile)
        self._random = Random(seed)
        self._messages = messages
        self._seconds = seconds
        self._vcpus = vcpus
        self._tell = tell
        self._scratch = tuple(page(index) for index in range(2 * vcpus))
        self._fuzzer = Fuzzer(self._random, self._exchange(), harm=_HARM if profile is Profile.ANYTHING else 0)
        self._others = receivers()
        self._guest = self._boot()
        self._silent = 0

    def run(self) -> Report:
        """Do it.

        :raise LiveError: the guest or a session is not well, or stays behind. Its notes say how to do it again.
        """
        try:
            self._start()
            self._session()
            self.report.before = self._rest()
            self._throw()
            self.report.after = self._rest()
            self._finish()
        except Exception as error:
            error.add_note(str(self.report))
            raise
        finally:
            self._guest.kill()
        return self.report

    def _exchange(self) -> Exchange:
        return Exchange(self._vcpus, self._scratch)

    def _boot(self) -> LiveGuest:
        """A guest that ends when it would be reset."""
        return LiveGuest(self._vcpus, "puppet", options=["-no-reboot"])

    def _start(self) -> None:
        """Have the guest make events."""
        self._guest.booted()
        with hook(self._guest) as session:
            puppet = Puppet(session)
            for vcpu in range(self._vcpus):
                puppet.start(vcpu, "storm", rsi=page(vcpu))
                puppet.advances(vcpu)

    def _throw(self) -> None:
        begun = told = monotonic()
        with Neighbours(Random(self.report.seed + 1), self.report) as neighbours:
            while self.report.messages < self._messages and self.report.seconds < self._seconds:
                self._session()
                self.report.seconds = monotonic() - begun
                if monotonic() > told + _TELL_EVERY:
                    told = monotonic()
                    self._tell(f"{self.report.messages} messages, {self.report.sessions} sessions")
        if neighbours.failure:
            raise neighbours.failure

    def _session(self) -> None:
        """One session, from hook to end, whoever ends it."""
        stopped = self.report.profile is not Profile.STORM and self._random.random() < _STOPPED
        noisy = self.report.profile is not Profile.STORM and self._random.random() < _NOISY
        events = self.report.events.total()
        try:
            if stopped:
                self._guest.monitor.command("stop")
            self._converse(noisy)
            if stopped:
                self._guest.monitor.command("cont")
        except (AttachError, MonitorError, OSError):
            if self.report.profile is not Profile.ANYTHING:
                raise
            self._replace()
        else:
            self._silent = self._silent + 1 if self.report.events.total() == events else 0
            broken = self._broken()
            if broken and self.report.profile is not Profile.ANYTHING:
                raise LiveError(f"{broken}; the last lines of the guest:\n{self._guest.tail()}")
            if broken:
                self._replace()

    def _broken(self) -> str:
        """What is wrong with the guest, if anything."""
        if not self._guest.alive:
            return "the guest has ended, or would have been reset"
        if self._silent < _SILENT:
            return ""
        self._silent = 0
        try:
            self._goes_on()
        except LiveError as error:
            return str(error)
        return ""

    def _goes_on(self) -> None:
        """Every vCPU goes on making events.

        :raise LiveError: one does not.
        """
        with hook(self._guest) as session:
            puppet = Puppet(session)
            for vcpu in range(self._vcpus):
                puppet.advances(vcpu)

    def _converse(self, noisy: bool) -> None:
        policy = self._policy(noisy)
        self._fuzzer.exchange = self._exchange()
        self._fuzzer.spoilt = 0 if self.report.profile is Profile.STORM else self._random.choice(_SPOILT)
        with hook_socket(self._guest, policy) as sock:
            line = _Line(sock, self._fuzzer.exchange, self.report)
            self.report.sessions += 1
            try:
                self._send(line, self._fuzzer.opening())
                if noisy:
                    self._make_noise(line)
                else:
                    self._talk(line)
            except _Ended:
                self.report.ended += 1
                if self._fuzzer.spoilt == 0 and policy is FULL and self.report.profile is not Profile.ANYTHING:
                    raise LiveError("the kernel has ended a session in which nothing was wrong") from None

    def _policy(self, noisy: bool) -> Policy:
        """What the session may do: nobody knows what noise says, so it must not be able to change the guest."""
        if self.report.profile is Profile.STORM:
            return FULL
        if noisy:
            return FULL if self.report.profile is Profile.ANYTHING else OBSERVE
        how = self._random.randrange(10)
        if how == 0:
            return OBSERVE
        if how == 1:
            return Policy(False, frozenset(self._some(SERVED)), frozenset(self._some(EventId)))
        return FULL

    def _some(self, of: Iterable[int]) -> list[int]:
        return [one for one in of if self._random.random() < 0.7]

    def _talk(self, line: _Line) -> None:
        until = self.report.messages + self._random.choice(_LENGTHS)
        while self.report.messages < until:
            if self.report.profile is Profile.STORM:
                self._send(line, self._fuzzer.answers())
                line.take(_QUIET)
                continue
            self._send(line, self._fuzzer.burst())
            if self._random.random() < 0.9:
                line.settle(self._random.getrandbits(31))
            if not self._fuzzer.exchange.waiting and self._random.random() < 0.3:
                line.take(_QUIET)
        how = self._random.randrange(4)
        if how == 0:
            with VmHandle(self._guest.pid) as vm, contextlib.suppress(NotHooked):
                vm.unhook_force()
        elif how == 1:
            line.send(self._fuzzer.message().encode()[:-1])

    def _make_noise(self, line: _Line) -> None:
        for _ in range(self._random.randrange(1, 9)):
            noise = self._fuzzer.noise()
            self.report.noise += len(noise)
            for piece in self._fuzzer.pieces(noise):
                line.send(piece)
            while line.take(_QUIET):
                pass

    def _send(self, line: _Line, messages: list[Message]) -> None:
        for message in messages:
            self.report.sent[message.form] += 1
            known = message.id in SERVED or message.id == Command.EVENT_REPLY
            self.report.commands[command_name(message.id) if known else "unknown"] += 1
        for piece in self._fuzzer.pieces(b"".join(message.encode() for message in messages)):
            line.send(piece)

    def _replace(self) -> None:
        self.report.replaced += 1
        self._renew()

    def _renew(self) -> None:
        self._silent = 0
        self._guest.kill()
        self._guest = self._boot()
        self._start()

    def _rest(self) -> Footprint:
        """What is held when the guest lives, however the last session has left it, and has no session."""
        if self.report.profile is Profile.ANYTHING:
            self._renew()
        deadline = monotonic() + DEADLINE
        while receivers() > self._others:
            if monotonic() > deadline:
                raise LiveError(f"{receivers() - self._others} sessions do not end")
            sleep(0.1)
        return footprint()

    def _finish(self) -> None:
        """No VM has stayed behind, and the guest is as well as before."""
        before, after = self.report.before.users, self.report.after.users
        if after != before:
            raise LiveError(f"a VM is left behind, or lost: {after} users of KVM's modules, {before} before")
        self._goes_on()
        with hook(self._guest) as session:
            Puppet(session).settle(self._vcpus)
        self._guest.goes_on()
