# SPDX-License-Identifier: LGPL-2.1-or-later
"""A suite at work on a host that is reached by SSH: it goes on there by itself, and is followed from here.

When the connection breaks, it is made again, and reading goes on where it was. A host that does not come back, is not
the same any more, or has nothing to say, ends its part of the night: that is :class:`Ended`.
"""

from __future__ import annotations

import shlex
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kvmi_host.host.errors import RemoteError
from kvmi_host.host.printable import printable
from kvmi_host.host.remote import Remote
from kvmi_host.lab import deploy
from kvmi_host.lab.night import State
from kvmi_host.lab.suite import BEGIN, since

SCRIPT = Path(__file__).with_name("supervise")
_BUSY = 75  # the script's status for a host where another suite is at work
_MOST_LOG = 4 << 20  # bytes of the kernel's log that are kept
_LONGEST_LINE = 1 << 16


@dataclass(frozen=True)
class Patience:
    """How long is waited for what, in seconds. Emulated hosts are slow."""

    connecting: float = 60
    command: float = 600
    heartbeat: float = 5
    silence: float = 60
    """Without a heartbeat: then the connection is taken to be dead."""
    absence: float = 900
    """Until a host must be back whose connection broke."""
    retry: float = 5
    """Between two attempts to connect."""
    progress: float = 1200
    """Without a word of the suite: then it is taken to hang."""
    ending: float = 120
    """For pytest to write its reports when it is interrupted."""


@dataclass(frozen=True)
class Places:
    """Where things are on a host.

    :ivar run: the folder of the run.
    :ivar log: where the kernel's log takes lines.
    :ivar boot_id: the file that is another after each boot.
    :ivar top: the folder for what is brought there.
    """

    run: str = "/run/kvmi-host-suite"
    log: str = "/dev/kmsg"
    boot_id: str = "/proc/sys/kernel/random/boot_id"
    top: PurePosixPath = deploy.TOP


class Ended(Exception):
    """A host's part of the night ends here.

    :ivar reason: one sentence: what was tried, what happened, what to do.
    """

    def __init__(self, state: State, reason: str) -> None:
        super().__init__(reason)
        self.state = state
        self.reason = reason


class Host:
    """A host, over connections that are made again when they break.

    :param reach: makes a connection, or raises RemoteError.
    :param alive: whether the machine still runs, as far as can be told from here.
    :param stop: set when the night is to end.
    :ivar kernel_log: what the kernel has said since the suite began.
    """

    def __init__(
        self,
        reach: Callable[[], Remote],
        alive: Callable[[], bool],
        stop: threading.Event,
        patience: Patience,
        places: Places,
    ) -> None:
        self.patience = patience
        self.places = places
        self.kernel_log = ""
        self._reach = reach
        self._alive = alive
        self._stop = stop
        self._boot_id = b""
        self._read = 0  # bytes of the suite's output
        self._remote: Remote | None = None

    def open(self) -> None:
        """Connect for the first time.

        :raise RemoteError: it does not let us in.
        """
        self._remote = self._reach()
        self._boot_id = self._read_boot_id(self._remote)

    def close(self) -> None:
        """Connect no more."""
        if self._remote:
            self._remote.close()

    def run(
        self, line: str, *, stdin: bytes = b"", most: int = 1 << 20, deadline: float | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a line of the shell there, and once again if the connection breaks: it has to be one that may.

        :param most: bytes that it may write.
        :param deadline: seconds, instead of the usual.
        :raise Ended: the host is gone, or did not do it.
        """
        seconds = deadline or self.patience.command
        try:
            return self._connected.run(line, stdin=stdin, deadline=seconds, most=most)
        except RemoteError as error:
            self._come_back(error)
        try:
            return self._connected.run(line, stdin=stdin, deadline=seconds, most=most)
        except RemoteError as error:
            raise Ended(State.HUNG, f"it lets us in, but does not work: {error}: look at it, and reboot it") from error

    def call(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """Have the script ``supervise`` do something there."""
        return self.run(self._line(verb, *arguments), stdin=SCRIPT.read_bytes())

    def require_idle(self) -> None:
        """
        :raise Ended: another suite is at work there.
        """
        done = self.call("idle")
        if done.returncode == _BUSY:
            who = printable(done.stderr.decode(errors="replace"))
            raise Ended(State.REFUSED, f"another suite is at work there ({who}): wait until it has ended, or end it")

    def start(self, name: str, seconds: float, argv: list[str]) -> None:
        """Start a suite.

        :param name: of the run, unlike that of any other.
        :param seconds: after which it ends itself, followed or not.
        :raise Ended: it cannot be started.
        """
        self._read = 0
        done = self.call("start", name, str(int(seconds)), *argv)
        said = printable((done.stderr or done.stdout).decode(errors="replace"))
        # If the connection broke while it was started, it was asked for twice.
        if done.returncode and not (done.returncode == _BUSY and said.startswith(f"{name},")):
            raise Ended(State.REFUSED, f"the suite could not be started in {self.places.run}: {said}")

    def follow(
        self,
        name: str,
        until: float,
        on_output: Callable[[bytes], None],
        stop: threading.Event,
        progress: float | None = None,
    ) -> int | None:
        """Read what a suite says until it ends; when called again, from there on.

        :param until: the time (of the monotonic clock) at which it must have ended.
        :param stop: when set, it is followed no more.
        :param progress: seconds that it may be silent, instead of the usual.
        :return: its exit status; None if it was killed.
        :raise Ended: and why it is not to be followed any more.
        """
        while True:
            reader = _Reader(name, progress or self.patience.progress, self.patience.silence, until, stop)
            line = self._line("follow", str(self._read), f"{self.patience.heartbeat:g}")
            tick = min(1.0, self.patience.heartbeat)
            try:
                with closing(self._connected.stream(line, stdin=SCRIPT.read_bytes(), tick=tick)) as pieces:
                    for piece in pieces:
                        self._read += len(piece.stdout)
                        if piece.stdout:
                            on_output(piece.stdout)
                        reader.take(piece.stdout, piece.stderr)
                if reader.ended:
                    return reader.status
                raise RemoteError("following the suite ended before the suite did")
            except RemoteError as error:
                self._come_back(error)
            finally:
                self.kernel_log = reader.kernel_log or self.kernel_log

    @property
    def _connected(self) -> Remote:
        assert self._remote is not None  # open() was called
        return self._remote

    def _line(self, verb: str, *arguments: str) -> str:
        return shlex.join(["sh", "-s", "--", self.places.run, self.places.log, verb, *arguments])

    def _read_boot_id(self, remote: Remote) -> bytes:
        return remote.run(f"cat {shlex.quote(self.places.boot_id)}", deadline=self.patience.connecting).stdout

    def _come_back(self, error: RemoteError) -> None:
        """Connect again.

        :raise Ended: it does not let us in in time, or was booted meanwhile.
        """
        self.close()
        until = time.monotonic() + self.patience.absence
        while True:
            if not self._alive():
                raise Ended(State.DIED, "its machine has ended: console.log may say why")
            try:
                remote = self._reach()
                boot_id = self._read_boot_id(remote)
                break
            except RemoteError as again:
                last = again
            if time.monotonic() > until:
                raise self._gone(error, last)
            if self._stop.wait(self.patience.retry):
                raise Ended(State.INTERRUPTED, f"the night was ended while the host was away: {error}")
        self._remote = remote
        if boot_id != self._boot_id:
            self._boot_id = boot_id
            raise Ended(State.REBOOTED, "it was booted anew meanwhile: its console may say why")

    def _gone(self, error: RemoteError, last: RemoteError) -> Ended:
        waited = f"and it did not let us in again within {self.patience.absence:g} s (at last: {last})"
        if isinstance(error, Silence):
            return Ended(State.LOST, f"{error}, {waited}: look at the network between here and there, and at the host")
        return Ended(State.DIED, f"{error}, {waited}: is it powered off? Its console may say why")


class _Reader:
    """What comes of a suite that is followed, and whether to follow it on."""

    def __init__(self, name: str, progress: float, silence: float, until: float, stop: threading.Event) -> None:
        self.ended = False
        self.status: int | None = None
        self._begin = f"{BEGIN}: {name}"
        self._longest = progress, silence
        self._until = until
        self._stop = stop
        self._progressed = self._heard = time.monotonic()
        self._log = bytearray()
        self._rest = b""

    @property
    def kernel_log(self) -> str:
        """What the kernel has said since the suite began."""
        return since(self._log.decode(errors="replace"), self._begin)

    def take(self, stdout: bytes, stderr: bytes) -> None:
        """Take what came.

        :raise Silence: nothing comes any more, not even a heartbeat.
        :raise Ended: the suite has used up its time, or says nothing any more; or the night is to end.
        """
        now = time.monotonic()
        if stdout:
            self._progressed = now
        if stdout or stderr:
            self._heard = now
        *lines, self._rest = (self._rest + stderr).split(b"\n")
        for line in lines:
            if line.startswith(b"supervise: ended"):
                status = line.split()[-1]
                self.ended, self.status = True, int(status) if status.isdigit() else None
            elif line == b"supervise: gone":
                raise Ended(State.HUNG, "someone removed the folder of the run while the suite was at work")
            elif line and len(self._log) < _MOST_LOG:  # a heartbeat has nothing in it
                self._log += line + b"\n"
        self._rest = self._rest[-_LONGEST_LINE:]
        if self.ended:
            return
        if self._stop.is_set():
            raise Ended(State.INTERRUPTED, "the night was ended from here while the suite was at work")
        if now > self._until:
            raise Ended(State.HUNG, "the suite did not end by the host's deadline: raise it, or see which test hangs")
        progress, silence = self._longest
        if now - self._heard > silence:
            raise Silence(f"nothing came from it for {silence:g} s")
        if now - self._progressed > progress:
            silent = f"for {progress:g} s"
            raise Ended(
                State.HUNG, f"it answers, and the suite said nothing {silent}: the end of pytest.log tells more"
            )


class Silence(RemoteError):
    """Nothing comes over a connection that looks well."""
