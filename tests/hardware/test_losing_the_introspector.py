# SPDX-License-Identifier: LGPL-2.1-or-later
"""The introspector goes away, at every point of an exchange: the guest goes on as if it had never been looked at, what
the session held comes back, and the VM can be hooked again at once.

The guest makes every kind of event all along, and counts what it sees of its own breakpoints. So whatever a session
leaves behind, or does to the guest at its end, does not go unnoticed.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import pytest

from kvmi_host.attach import FULL, attach, find_target
from kvmi_host.attach.errors import AttachError
from kvmi_host.attach.handover import hand_over
from kvmi_host.attach.vmfd import VmHandle
from kvmi_host.host.footprint import footprint, receivers, users_of_kvm
from kvmi_host.introspect import Session
from kvmi_host.protocol import Access, Action, Command, Event, EventId, KvmiError, PageFaultReply, messages, msr_index
from kvmi_host.protocol.events import encode_reply
from kvmi_host.protocol.framing import frame
from kvmi_host.protocol.messages import Request
from kvmi_host.testing.live import DEADLINE, LiveGuest, hook_socket
from kvmi_host.testing.puppet import Puppet, page

pytestmark = pytest.mark.hardware

BP = 3
UD = 6
ANSWER = 16
"""Bytes of an answer that is an error code and nothing else."""


class Lost(NamedTuple):
    """A session that is about to be lost: as its messages, and as a bare socket."""

    session: Session
    sock: socket.socket
    guest: LiveGuest

    def say(self, *requests: Request[object], cut: int | None = None) -> None:
        """Send commands and leave their answers unread.

        :param cut: send no more than so many bytes.
        """
        data = b"".join(frame(request.command, number, request.payload) for number, request in enumerate(requests, 1))
        self.sock.sendall(data[:cut])

    def event(self, kind: EventId, vcpu: int = 0) -> Event:
        """Enable an event of one vCPU, and wait for it."""
        self.session.control_events(vcpu, kind, True)
        return self.next()

    def next(self) -> Event:
        event = self.session.next_event(DEADLINE)
        assert event is not None
        return event

    def unread(self, kind: EventId) -> None:
        """The same without reading it."""
        self.say(messages.control_events(0, kind, True))
        assert len(self.sock.recv(ANSWER, socket.MSG_WAITALL)) == ANSWER
        assert select.select([self.sock], [], [], DEADLINE)[0]

    def reply(self, event: Event, cut: int | None = None) -> None:
        """Reply to an event, or begin to."""
        self.sock.sendall(frame(Command.EVENT_REPLY, event.seq, encode_reply(event))[:cut])


def half_an_event(lost: Lost) -> None:
    lost.unread(EventId.HYPERCALL)
    lost.sock.recv(100, socket.MSG_WAITALL)


def replied(lost: Lost, cut: int | None = None) -> None:
    lost.session.control_cr(0, 3, True)
    lost.reply(lost.event(EventId.CR), cut)


def every_vcpu_waits(lost: Lost) -> None:
    for vcpu in range(lost.guest.vcpus):
        lost.session.control_events(vcpu, EventId.HYPERCALL, True)
    assert {lost.next().vcpu for _ in range(lost.guest.vcpus)} == set(range(lost.guest.vcpus))


def commands_behind_an_event(lost: Lost) -> None:
    lost.event(EventId.HYPERCALL)
    lost.say(*[messages.get_registers(0, [])] * 100)


def pauses_are_owed(lost: Lost) -> None:
    lost.event(EventId.HYPERCALL)
    for _ in range(5):
        lost.session.pause_vcpu(0)


def paused(lost: Lost) -> None:
    for vcpu in range(lost.guest.vcpus):
        lost.session.pause_vcpu(vcpu, wait=True)
        lost.next()


def between_two_steps(lost: Lost) -> None:
    event = lost.event(EventId.SINGLESTEP)
    for _ in range(3):
        lost.reply(event)
        event = lost.next()
    lost.reply(event)


def watched(lost: Lost) -> None:
    lost.session.set_page_access({page(vcpu): Access.R for vcpu in range(lost.guest.vcpus)})


def at_a_watched_page(lost: Lost) -> Event:
    watched(lost)
    return lost.event(EventId.PF)


def one_goes_and_the_others_stand(lost: Lost) -> None:
    event = at_a_watched_page(lost)
    lost.session.reply(event, Action.RETRY, page_fault=PageFaultReply(singlestep=True))


def registers_are_set(lost: Lost) -> None:
    event = lost.event(EventId.HYPERCALL)
    lost.session.set_registers(0, event.registers._replace(rip=0xDEAD0000, rsp=0, rbx=0))


def an_exception_is_asked_for(lost: Lost) -> None:
    lost.event(EventId.HYPERCALL)
    lost.session.inject_exception(0, UD)


def answers_are_off(lost: Lost) -> None:
    lost.session.control_cmd_response(False, now=True)
    lost.say(messages.pause_vcpu(0))


def a_write_of_lstar(lost: Lost) -> None:
    lost.session.control_msr(0, msr_index("lstar"), True)
    lost.event(EventId.MSR)


def vcpus_announce_themselves(lost: Lost) -> None:
    lost.session.control_vm_events(EventId.CREATE_VCPU, True)
    assert lost.next().event == EventId.CREATE_VCPU


def it_was_asked_to_leave(lost: Lost) -> None:
    lost.session.control_vm_events(EventId.UNHOOK, True)
    with VmHandle(lost.guest.pid) as vm:
        assert vm.unhook_request()
    assert lost.next().event == EventId.UNHOOK


CHECK = messages.check_command(Command.GET_VERSION)
REPLY_HEADER = 8
REPLY_COMMON = REPLY_HEADER + 8 + 8

POINTS: dict[str, Callable[[Lost], object]] = {
    "nothing was said": lambda lost: None,
    "within a command's header": lambda lost: lost.say(CHECK, cut=4),
    "after a command's header": lambda lost: lost.say(CHECK, cut=8),
    "within a command's payload": lambda lost: lost.say(CHECK, cut=12),
    "a command of the VM is unanswered": lambda lost: lost.say(messages.get_version()),
    "a command of a vCPU is unanswered": lambda lost: lost.say(messages.get_registers(0, [])),
    "commands are queued, and their answers not read": lambda lost: lost.say(*[messages.get_registers(0, [])] * 900),
    "an event is not read": lambda lost: lost.unread(EventId.HYPERCALL),
    "half an event is read": half_an_event,
    "an event is unanswered": lambda lost: lost.event(EventId.HYPERCALL),
    "within a reply's header": lambda lost: replied(lost, 4),
    "after a reply's header": lambda lost: replied(lost, REPLY_HEADER),
    "within a reply": lambda lost: replied(lost, REPLY_HEADER + 12),
    "before a reply's own data": lambda lost: replied(lost, REPLY_COMMON),
    "within a reply's own data": lambda lost: replied(lost, REPLY_COMMON + 4),
    "a reply was sent": replied,
    "every vCPU waits": every_vcpu_waits,
    "commands are queued behind an event": commands_behind_an_event,
    "pauses are owed": pauses_are_owed,
    "every vCPU is paused": paused,
    "a step was made": lambda lost: lost.event(EventId.SINGLESTEP),
    "between two steps": between_two_steps,
    "pages are watched": watched,
    "a watched page was met": at_a_watched_page,
    "one vCPU goes and the others stand": one_goes_and_the_others_stand,
    "registers are set": registers_are_set,
    "an exception is asked for": an_exception_is_asked_for,
    "answers are off": answers_are_off,
    "a breakpoint was met": lambda lost: lost.event(EventId.BREAKPOINT),
    "an MSR is written": a_write_of_lstar,
    "vCPUs announce themselves": vcpus_announce_themselves,
    "it was asked to leave": it_was_asked_to_leave,
}

FORGOTTEN, NO_LONGER_WATCHED = pytest.mark.rule("2.22"), pytest.mark.rule("2.23")
ALSO: dict[str, pytest.MarkDecorator] = {
    "registers are set": FORGOTTEN,
    "an exception is asked for": FORGOTTEN,
    "a step was made": NO_LONGER_WATCHED,
    "between two steps": NO_LONGER_WATCHED,
    "pages are watched": NO_LONGER_WATCHED,
    "a watched page was met": NO_LONGER_WATCHED,
    "one vCPU goes and the others stand": NO_LONGER_WATCHED,
    "an MSR is written": NO_LONGER_WATCHED,
}
"""Of which points another rule speaks."""


def close(sock: socket.socket) -> None:
    sock.close()


def kill(sock: socket.socket) -> None:
    """The process that has the socket is killed."""
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(1)
    sock.close()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def close_half(sock: socket.socket) -> None:
    """What the introspector says has ended, and it would still listen."""
    sock.shutdown(socket.SHUT_WR)


@contextmanager
def at_work(guest: LiveGuest) -> Iterator[None]:
    """Both vCPUs make every kind of event; at the end none of it has gone wrong. The VM is not hooked meanwhile."""
    with attach(guest.name, allow="full", timeout=DEADLINE).session as session:
        puppet = Puppet(session)
        for vcpu in range(guest.vcpus):
            puppet.start(vcpu, "storm", rsi=page(vcpu))
            puppet.advances(vcpu)
    yield
    # Hooked at once: nothing is waited for.
    with attach(guest.name, allow="full", timeout=DEADLINE).session as session:
        puppet = Puppet(session)
        for vcpu in range(guest.vcpus):
            puppet.advances(vcpu, 5)
            puppet.stop(vcpu)
            result = puppet.finish(vcpu)
            assert result.exceptions == result.counts[BP] == puppet.progress(vcpu)
        assert session.page_access(*(page(vcpu) for vcpu in range(guest.vcpus))) == (Access.ALL,) * guest.vcpus
        assert session.waiting == 0


def lose(guest: LiveGuest, point: Callable[[Lost], object], way: Callable[[socket.socket], None]) -> None:
    sock = hook_socket(guest)
    with sock, Session(sock, timeout=DEADLINE) as session:
        point(Lost(session, sock, guest))
        way(sock)


def until(reached: Callable[[], bool]) -> None:
    deadline = monotonic() + DEADLINE
    while not reached():
        assert monotonic() < deadline, "not reached in time"
        os.sched_yield()


@pytest.mark.rule("2.20", "2.21", "5.18", "5.19")
@pytest.mark.parametrize("point", [pytest.param(POINTS[name], marks=ALSO.get(name, ()), id=name) for name in POINTS])
def test_the_guest_outlives_an_introspector_that_closes_and_one_that_is_killed(
    puppet_guest: LiveGuest, point: Callable[[Lost], object]
) -> None:
    until(lambda: receivers(puppet_guest.pid) == 0)
    users = users_of_kvm()
    with at_work(puppet_guest):
        lose(puppet_guest, point, close)
        lose(puppet_guest, point, kill)  # hooked again at once
    until(lambda: receivers(puppet_guest.pid) == 0 and users_of_kvm() == users)


@pytest.mark.rule("2.20")
@pytest.mark.parametrize("point", ["nothing was said", "every vCPU waits", "within a reply"])
def test_an_introspector_that_only_listens_is_lost_as_well(puppet_guest: LiveGuest, point: str) -> None:
    with at_work(puppet_guest):
        lose(puppet_guest, POINTS[point], close_half)


@pytest.mark.rule("5.18")
def test_no_memory_stays_behind_wherever_the_introspector_is_lost(puppet_guest: LiveGuest) -> None:
    def all_points() -> None:
        for point in POINTS.values():
            lose(puppet_guest, point, close)
        until(lambda: receivers(puppet_guest.pid) == 0)

    with at_work(puppet_guest):
        all_points()  # what is allocated once, is by now
        before = footprint().objects
        rounds = 4
        for _ in range(rounds):
            all_points()
        # An object for every second session would be more, and stay. What the host takes meanwhile, it gives back.
        deadline = monotonic() + DEADLINE
        while (after := footprint().objects).total() - before.total() >= rounds * len(POINTS) / 2:
            assert monotonic() < deadline, f"{after - before} stay"


HANDSHAKES: dict[str, tuple[int, int]] = {
    # how much it reads of QEMU's 96 bytes, and says of its own 24
    "before it reads": (0, 0),
    "within what it is told": (40, 0),
    "before it answers": (96, 0),
    "within its answer": (96, 12),
}


def introspector(listening: socket.socket, reads: int, says: int) -> None:
    sock, _ = listening.accept()
    with sock:
        if reads:
            sock.recv(reads, socket.MSG_WAITALL)
        sock.sendall((struct.pack("<I", 24) + bytes(20))[:says])


@contextmanager
def listening_at(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(1)
        yield listening


@pytest.mark.rule("2.20", "6.2")
@pytest.mark.parametrize(("reads", "says"), HANDSHAKES.values(), ids=HANDSHAKES)
def test_an_introspector_that_is_lost_in_the_handshake_has_had_no_session(
    puppet_guest: LiveGuest, tmp_path: Path, reads: int, says: int
) -> None:
    with at_work(puppet_guest), listening_at(tmp_path / "socket") as listening, ThreadPoolExecutor() as pool:
        lost = pool.submit(introspector, listening, reads, says)
        with pytest.raises((AttachError, KvmiError)):
            hand_over(find_target(puppet_guest.name), str(tmp_path / "socket"), FULL, timeout=DEADLINE)
        lost.result()
        with VmHandle(puppet_guest.pid) as vm:
            assert not vm.hooked()


@pytest.mark.rule("2.20", "5.18")
def test_an_introspector_that_is_lost_after_the_handshake_leaves_no_session(
    puppet_guest: LiveGuest, tmp_path: Path
) -> None:
    with at_work(puppet_guest), listening_at(tmp_path / "socket") as listening, ThreadPoolExecutor() as pool:
        lost = pool.submit(introspector, listening, 96, 24)
        with suppress(AttachError):  # the session may be over before it is allowed anything
            hand_over(find_target(puppet_guest.name), str(tmp_path / "socket"), FULL, timeout=DEADLINE)
        lost.result()
