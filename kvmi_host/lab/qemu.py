# SPDX-License-Identifier: LGPL-2.1-or-later
"""One QEMU process: started, found again by another process of ours, saved, restored and ended.

The process is known by its PID and the time it was started, which the kernel tells: a PID that was given to another
process since is not ours, and nothing is ever sent to it.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from qemu.qmp import QMPClient, QMPError

from kvmi_host.lab.errors import LabError
from kvmi_host.lab.paths import program
from kvmi_host.lab.progress import tail

T = TypeVar("T")

_KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet loglevel=5 panic=-1 net.ifnames=0 systemd.show_status=false "
    "mitigations=off nokaslr audit=0 no_timer_check tsc=reliable cryptomgr.notests random.trust_cpu=on"
)


def command(disk: Path, kernel: Path, initrd: Path, cpus: int, memory: int) -> list[str]:
    """The command line of the host in a box, without what differs from run to run.

    A virtio disk that is never written, and nothing that cannot be saved (NVMe, 9p and virtiofs cannot).

    :param memory: in MiB.
    """
    return [
        program("qemu-system-x86_64", "qemu-system-x86"),
        *shlex.split("-name kvmi-lab -nodefaults -no-user-config -no-reboot -display none -machine pc"),
        # The emulated AMD CPU has SVM with nested paging. tb-size bounds the memory for translated code (MiB).
        *shlex.split("-accel tcg,thread=multi,tb-size=256 -cpu max"),
        *shlex.split(f"-smp {cpus} -m {memory}M"),
        *("-kernel", str(kernel), "-initrd", str(initrd), "-append", _KERNEL_ARGUMENTS),
        *("-drive", f"if=none,id=disk,format=raw,readonly=on,file={str(disk).replace(',', ',,')}"),
        *shlex.split("-device virtio-blk-pci,drive=disk -device virtio-rng-pci"),
        # Port 0: the kernel chooses a free one. restrict: the host in a box reaches nothing outside.
        *shlex.split("-netdev user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:0-:22"),
        *shlex.split("-device virtio-net-pci,netdev=net,romfile="),
    ]


def _start_time(pid: int) -> int | None:
    """When that process was started, in clock ticks since boot; None if there is none (or only its exit status)."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] in "ZX" else int(after_name[19])


@dataclass(frozen=True)
class Process:
    """A QEMU process of ours.

    :ivar run: the folder with its sockets and logs.
    :ivar pid: its PID.
    :ivar started: the start time that goes with the PID.
    """

    run: Path
    pid: int
    started: int

    @classmethod
    def start(cls, run: Path, argv: list[str], incoming: bool = False) -> Process:
        """Start QEMU.

        :param run: where its sockets and logs go.
        :param argv: its command line, see :func:`command`.
        :param incoming: wait for :meth:`restore` instead of booting.
        """
        address = run / "qmp.sock"
        address.unlink(missing_ok=True)
        (run / "console.log").unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener, (run / "qemu.log").open("w") as log:
            try:
                listener.bind(str(address))
            except OSError as error:
                raise LabError(f"cannot listen on {address}: {error}; a shorter XDG_CACHE_HOME may help") from error
            # QEMU gets a socket that listens already: no need to wait until it has made one.
            listener.listen(1)
            fd = listener.fileno()
            rest = ["-chardev", f"socket,id=qmp,fd={fd},server=on,wait=off", "-mon", "qmp,mode=control"]
            rest += ["-chardev", f"file,id=console,path={str(run / 'console.log').replace(',', ',,')}"]
            rest += ["-serial", "chardev:console"]
            if incoming:
                rest += ["-incoming", "defer"]
            process = subprocess.Popen(
                argv + rest,
                pass_fds=[fd],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        started = _start_time(process.pid)
        if started is None:
            raise LabError(f"QEMU ended at once. It said:\n{tail(run / 'qemu.log')}")
        found = cls(run, process.pid, started)
        try:
            (run / "qemu.json").write_text(json.dumps({"pid": found.pid, "started": found.started}))
        except BaseException:
            found.stop()
            raise
        return found

    @classmethod
    def find(cls, run: Path) -> Process | None:
        """The process that was started with this folder, if it runs."""
        try:
            known = json.loads((run / "qemu.json").read_text())
            found = cls(run, int(known["pid"]), int(known["started"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if found.alive() else None

    def alive(self) -> bool:
        """Whether it runs."""
        return _start_time(self.pid) == self.started

    def ask(self, talk: Callable[[QMPClient], Awaitable[T]], deadline: float = 30) -> T:
        """Talk to QEMU's monitor (QMP).

        :param talk: what to say; called with the connection.
        :param deadline: seconds that the whole conversation may take.
        :return: what ``talk`` returned.
        :raise LabError: when QEMU refuses, ends, or does not answer in time.
        """

        async def conversation() -> T:
            async with asyncio.timeout(deadline):
                client = QMPClient("kvmi-lab")
                await client.connect(str(self.run / "qmp.sock"))
                try:
                    return await talk(client)
                finally:
                    await client.disconnect()

        try:
            return asyncio.run(conversation())
        except (OSError, EOFError, QMPError) as error:
            what = f"no answer within {deadline:g} s" if isinstance(error, TimeoutError) else str(error) or "it ended"
            said = tail(self.run / "qemu.log") or "nothing"
            raise LabError(f"QEMU's monitor ({self.run / 'qmp.sock'}) failed: {what}. QEMU said: {said}") from error

    def ssh_port(self) -> int:
        """The port of 127.0.0.1 that leads to the SSH server in the box."""

        async def talk(qmp: QMPClient) -> str:
            return str(await qmp.execute("human-monitor-command", {"command-line": "info usernet"}))

        table = self.ask(talk)
        found = re.search(r"HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)", table)
        if found is None:
            raise LabError(f"QEMU forwards no port to the box's SSH server: {table!r}")
        return int(found[1])

    def wait_console(self, marker: str, deadline: float) -> None:
        """Wait until the box has written this on its serial console.

        :raise LabError: when it takes longer than ``deadline`` seconds, or the box gives up or ends before.
        """
        console = self.run / "console.log"
        until = time.monotonic() + deadline
        while True:
            alive = self.alive()
            text = console.read_text(errors="replace") if console.exists() else ""
            if marker in text:
                return
            what = "" if alive else "QEMU ended"
            if "kvmi-lab: failed" in text or "Kernel panic" in text:
                what = "the box failed to boot"
            elif time.monotonic() > until:
                what = f"no {marker!r} on the console within {deadline:g} s"
            if what:
                log = tail(self.run / "qemu.log", 5)
                raise LabError(f"{what}. QEMU said: {log or 'nothing'}. The console's last lines:\n{tail(console)}")
            time.sleep(0.05)

    def save(self, state: Path) -> None:
        """Write the machine's state to a file, and let it go on."""

        async def talk(qmp: QMPClient) -> None:
            await qmp.execute("stop")
            await qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 34})
            await _migrate(qmp, "migrate", f"exec:exec zstd -q -T0 -3 -o {shlex.quote(str(state))}")
            await qmp.execute("cont")

        self.ask(talk, 60)

    def restore(self, state: Path) -> None:
        """Take the state from a file, in a process that was started as ``incoming``, and run."""

        async def talk(qmp: QMPClient) -> None:
            await _migrate(qmp, "migrate-incoming", f"exec:exec zstd -q -d -c {shlex.quote(str(state))}")
            await qmp.execute("cont")

        self.ask(talk, 60)

    def stop(self) -> None:
        """End it, at once: nothing in it is worth an orderly shutdown. Returns when it is gone."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            # Checked after opening: the handle is of this very process, whoever has the PID a moment later.
            if not self.alive():
                return
            for what in (signal.SIGTERM, signal.SIGKILL):
                signal.pidfd_send_signal(handle, what)
                if select.select([handle], [], [], 5)[0]:
                    break
        finally:
            os.close(handle)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)

    def peak_memory(self) -> int:
        """The most memory that the process has held so far, in MiB."""
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        return int(found[1]) // 1024 if found else 0


async def _migrate(qmp: QMPClient, verb: str, uri: str) -> None:
    """Have QEMU write or read its state, and wait until it did."""
    await qmp.execute(verb, {"uri": uri})
    while True:
        # Asked for, not waited for: a QEMU that cannot read a state exits without an event.
        answer = await qmp.execute("query-migrate")
        status = answer.get("status") if isinstance(answer, dict) else None
        if status == "completed":
            return
        if status == "failed":
            raise LabError(f"QEMU's {verb} failed: {answer}")
        await asyncio.sleep(0.02)
