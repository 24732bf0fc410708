# SPDX-License-Identifier: LGPL-2.1-or-later
"""Live guests for the hardware suite: QEMU under KVM on this host, its serial lines, and what a test does with both."""

from __future__ import annotations

import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from types import TracebackType
from typing import Self

from kvmi_host.attach import FULL, AlreadyHooked, Policy, attach, find_target
from kvmi_host.attach.policy import Allow
from kvmi_host.attach.session import hand_to_kernel
from kvmi_host.host.debug_kernel import KMEMLEAK
from kvmi_host.introspect import Session, SessionClosed
from kvmi_host.protocol import Event, EventId, Framer, frame
from kvmi_host.protocol.framing import Frame
from kvmi_host.provision import find_image
from kvmi_host.testing.modewalk import (
    DEFAULT_PACE,
    Actions,
    Record,
    Station,
    actions_address,
    iterations_address,
    pace_address,
    record_address,
    want_address,
)
from kvmi_host.testing.qmp import Monitor

DEADLINE = 600.0 if KMEMLEAK.exists() else 60.0
"""Seconds that anything may take. An emulated host is 10 to 20 times slower than a real one, and a kernel that checks
itself another 10 times."""


class LiveError(AssertionError):
    """A live guest did not do in time what the test waits for."""


class LiveGuest:
    """A bare-metal guest in a stock QEMU of its own. As a context manager, it is killed at the end.

    :ivar monitor: QEMU's monitor.
    """

    def __init__(
        self,
        vcpus: int,
        image: str = "modewalk",
        *,
        accel: str = "kvm",
        cpu: str = "host",
        memory: str = "32",
        options: Sequence[str] = (),
    ) -> None:
        """
        :param memory: QEMU's ``-m``: MiB, and more that it takes.
        :param options: more options of QEMU.
        """
        self.vcpus = vcpus
        self.image = image
        self._lines: list[str] = []
        self._grown = threading.Condition()
        ours, qemus = socket.socketpair()
        self.monitor = Monitor(ours, DEADLINE)
        with qemus:
            self._process = subprocess.Popen(
                [
                    *("qemu-system-x86_64", "-accel", accel, "-cpu", cpu, "-smp", str(vcpus), "-m", memory),
                    *("-nodefaults", "-display", "none", "-serial", "stdio", *options),
                    *("-chardev", f"socket,id=monitor,fd={qemus.fileno()}", "-mon", "chardev=monitor,mode=control"),
                    *("-kernel", str(find_image(image).kernel)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                pass_fds=[qemus.fileno()],
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return self._process.pid

    @property
    def name(self) -> str:
        """The VM, as attach takes it."""
        return f"pid:{self.pid}"

    def booted(self) -> Self:
        """Wait until every vCPU has come up."""
        self.await_line(lambda line: line == f"{self.image}: {self.vcpus} vcpus", since=0)
        return self

    def await_line(self, wanted: Callable[[str], bool], since: int | None = None) -> str:
        """Wait for a serial line.

        :param since: how many lines to pass over; None: all that have come.
        :raise LiveError: none came in time; the message has the last lines.
        """
        deadline = monotonic() + DEADLINE
        with self._grown:
            position = len(self._lines) if since is None else since
            while True:
                for line in self._lines[position:]:
                    if wanted(line):
                        return line
                position = len(self._lines)
                left = deadline - monotonic()
                if left <= 0 or not self._reader.is_alive():
                    raise LiveError("the guest has not printed the awaited line; its last ones:\n" + self.tail())
                self._grown.wait(left)

    def goes_on(self) -> None:
        """Wait until every vCPU has made progress from now on, as its serial lines tell.

        :raise LiveError: one has not.
        """
        with self._grown:
            since = len(self._lines)
        for vcpu in range(self.vcpus):
            self.await_line(_tells_progress_of(self.image, vcpu), since)

    def wait(self) -> int:
        """Wait for QEMU's end; its exit status, negative for a signal."""
        return self._process.wait(DEADLINE)

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End QEMU. May be called again."""
        self._process.send_signal(how)
        self._process.wait(DEADLINE)
        self._reader.join(DEADLINE)
        self.monitor.close()

    @property
    def alive(self) -> bool:
        """Whether QEMU runs, stopped or not."""
        return self._process.poll() is None

    def freeze(self) -> None:
        """Leave the host's CPUs to others, until :meth:`thaw`. It must not be hooked."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Go on. One that was not frozen does so anyway."""
        self._process.send_signal(signal.SIGCONT)

    def tail(self) -> str:
        """The last serial lines."""
        return "\n".join(self._lines[-20:])

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            with self._grown:
                self._lines.append(line.rstrip("\r\n"))
                self._grown.notify_all()
        with self._grown:
            self._grown.notify_all()


def _tells_progress_of(image: str, vcpu: int) -> Callable[[str], bool]:
    marks = tuple(f"{image}: vcpu {vcpu} {word} " for word in ("lap", "held", "alive"))
    return lambda line: line.startswith(marks)


class SharedGuests:
    """One running guest of each bare-metal image, which tests share. One at a time has the host's CPUs."""

    def __init__(self) -> None:
        self._guests: dict[str, LiveGuest] = {}

    def use(self, image: str, vcpus: int) -> LiveGuest:
        """The guest of an image, booted if there is none; the others stand aside."""
        self.stand_aside()
        if image not in self._guests or not self._guests[image].alive:
            self._guests[image] = LiveGuest(vcpus, image)
        guest = self._guests[image]
        guest.thaw()
        return guest.booted()

    def stand_aside(self) -> None:
        """Leave the host's CPUs to a guest that is not shared."""
        for guest in self._guests.values():
            if guest.alive:
                guest.freeze()

    def kill(self) -> None:
        """End all of them."""
        for guest in self._guests.values():
            guest.kill()


def hook(guest: LiveGuest, allow: Allow = "full") -> Session:
    """Hook a guest; a session that has just lost its introspector may take a moment to end."""
    deadline = monotonic() + DEADLINE
    while True:
        try:
            return attach(guest.name, allow=allow, timeout=DEADLINE).session
        except AlreadyHooked:
            if monotonic() > deadline:
                raise


def hook_socket(guest: LiveGuest, policy: Policy = FULL) -> socket.socket:
    """Hook a guest, for a bare socket."""
    ours, kernels = socket.socketpair()
    try:
        with kernels:
            hand_to_kernel(find_target(guest.name), kernels, policy)
    except BaseException:
        ours.close()
        raise
    return ours


def await_event(session: Session) -> Event:
    """The next event. Its vCPU waits for the reply.

    :raise LiveError: none came in time.
    """
    event = session.next_event(DEADLINE)
    if event is None:
        raise LiveError("no event came")
    return event


def await_end(session: Session) -> None:
    """Wait until the kernel ends the session; events that were under way are passed over.

    :raise LiveError: it goes on.
    """
    try:
        while session.next_event(DEADLINE):
            pass
    except SessionClosed:
        return
    raise LiveError("the session goes on")


class Wire:
    """The socket of a session, message by message: for what a well-behaved introspector does not send."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(DEADLINE)
        self._sock = sock
        self._framer = Framer()

    def send(self, number: int, payload: bytes, seq: int) -> None:
        """Send one message."""
        self.send_raw(frame(number, seq, payload))

    def send_raw(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._sock.sendall(data)

    def receive(self) -> Frame:
        """The next message.

        :raise LiveError: the kernel ended the session.
        """
        while (message := self._framer.next_frame()) is None:
            data = self._sock.recv(65536)
            if not data:
                raise LiveError("the session has ended")
            self._framer.feed(data)
        return message


class Walker:
    """A session with the modewalk guest: its vCPUs are sent to stations, and their events taken."""

    def __init__(self, session: Session, vcpus: int) -> None:
        self.session = session
        self.vcpus = range(vcpus)

    def reset(self) -> None:
        """Let every vCPU walk, as after boot."""
        for vcpu in self.vcpus:
            self.session.write_physical(actions_address(vcpu), bytes([Actions.ALL]))
            self.session.write_physical(pace_address(vcpu), struct.pack("<I", DEFAULT_PACE))
            self.session.write_physical(want_address(vcpu), b"\0")

    def record(self, vcpu: int) -> Record:
        """The guest's own account of a vCPU."""
        return Record.unpack(self.session.read_physical(record_address(vcpu), 64))

    def hold(self, vcpu: int, station: Station, actions: Actions = Actions.ALL) -> None:
        """Have a vCPU stay at a station, and wait until it goes round there, as fast as it can.

        No event of it may be enabled yet.
        """
        self.session.write_physical(pace_address(vcpu), struct.pack("<I", 1))
        self.session.write_physical(actions_address(vcpu), bytes([actions]))
        self.session.write_physical(want_address(vcpu), bytes([station]))
        self.await_record(vcpu, lambda record: record.at is station)
        # The iteration that was under way may still be of another station or with other actions.
        begun = self.record(vcpu).iterations
        self.await_record(vcpu, lambda record: record.at is station and record.iterations >= begun + 2)

    def await_record(self, vcpu: int, wanted: Callable[[Record], bool]) -> Record:
        """Read a vCPU's record until it is as wanted.

        :raise LiveError: it was not, in time.
        """
        deadline = monotonic() + DEADLINE
        while not wanted(record := self.record(vcpu)):
            if monotonic() > deadline:
                raise LiveError(f"vCPU {vcpu} has not come to what the test waits for: {record}")
        return record

    def advances(self, vcpu: int) -> None:
        """Wait until a vCPU has gone round again."""
        before = self.record(vcpu).iterations
        self.await_record(vcpu, lambda record: record.iterations > before)

    def enable(self, event: EventId, *vcpus: int, cr: int | None = None) -> None:
        """Enable an event on these vCPUs; all of them if none is named."""
        for vcpu in vcpus or self.vcpus:
            self.session.control_events(vcpu, event, True)
            if cr is not None:
                self.session.control_cr(vcpu, cr, True)

    def event(self) -> Event:
        """The next event; see :func:`await_event`."""
        return await_event(self.session)

    def answered(self, count: int) -> Iterator[Event]:
        """The next `count` events; each is replied to when the next one is asked for."""
        for _ in range(count):
            event = self.event()
            yield event
            self.session.reply(event)

    def iterations(self, vcpu: int) -> int:
        """How many iterations a vCPU has done."""
        (count,) = struct.unpack("<Q", self.session.read_physical(iterations_address(vcpu), 8))
        return int(count)
