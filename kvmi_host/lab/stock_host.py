# SPDX-License-Identifier: LGPL-2.1-or-later
"""A stock Debian 12 in an emulated machine: what a host is before anything is deployed to it.

Unlike the host in a box it keeps what is done to it, reboots, and runs whichever kernel its packages say: there is no
boot loader, and each boot takes ``/vmlinuz`` and ``/initrd.img`` from its disk.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import threading
from pathlib import Path

from kvmi_host.lab import cache, qemu
from kvmi_host.lab.errors import LabError, LabHostError
from kvmi_host.lab.paths import program, project_root, run_dir
from kvmi_host.lab.progress import build, say, step
from kvmi_host.lab.ssh import Shell, configuration

NAME = "stock-host"
"""What it is called in its configuration of SSH, and in Ansible's inventory."""

_READY = "stock-host: ready"
_PATIENCE = 300  # seconds that it may be silent
_BOOT_DEADLINE = 600  # seconds; emulated, and with every unit that Debian starts
_KERNEL_ARGUMENTS = (
    "root=LABEL=stock-host rw console=ttyS0 loglevel=5 panic=-1 net.ifnames=0 "
    "mitigations=off nokaslr audit=0 no_timer_check tsc=reliable cryptomgr.notests random.trust_cpu=on"
)


def image() -> Path:
    """The folder that ``vm-images/stock-host/build`` writes, built if its recipe has changed (a minute or two, from the
    network)."""
    recipe = project_root() / "vm-images" / "stock-host"
    parts = [recipe / name for name in ("build", "packages", "root")]

    def make(out: Path) -> None:
        if os.geteuid() != 0:
            raise LabHostError("the stock host is built with mmdebstrap as root: run this as root, or with sudo")
        program("mmdebstrap", "mmdebstrap")
        build("building a stock Debian 12", [recipe / "build", out])

    return cache.entry("stock", cache.digest(*parts, recipe.parent / "apt-sources"), make)


def link_target(said: str) -> str | None:
    """Where a symbolic link of the disk leads, by what debugfs says of it; None for what is none."""
    found = re.search(r'Fast link dest: "([^"]+)"', said)
    return found[1].lstrip("/") if found else None


class StockHost:
    """The machine. As a context manager it is ended at the end, and its disk goes.

    :param keep: leave it as it is instead.
    :param cpus: how many, each a thread.
    :param memory: in MiB.
    """

    def __init__(self, *, keep: bool = False, cpus: int = 2, memory: int = 4096) -> None:
        self._keep, self._cpus, self._memory = keep, cpus, memory
        self._run = run_dir(NAME)
        self._image = image()
        self._stopping = threading.Event()
        self._process: qemu.Process | None = None
        self._watcher: threading.Thread | None = None
        self._shell: Shell | None = None
        self._boots = 0
        self.port = _free_port()

    def __enter__(self) -> StockHost:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._keep:
            self.down()
            self.disk.unlink(missing_ok=True)

    @property
    def disk(self) -> Path:
        """Its own copy of the disk."""
        return self._run / "root.img"

    @property
    def ssh_config(self) -> Path:
        """How OpenSSH reaches it, as :data:`NAME`."""
        return self._run / "ssh_config"

    @property
    def console_log(self) -> Path:
        """What it wrote on its serial console since it was last booted."""
        return self._run / "console.log"

    def up(self) -> None:
        """Boot it from a fresh copy of the disk.

        :raise LabError: one runs already, or it does not come up.
        """
        if qemu.Process.find(self._run):
            raise LabError(f"a stock host runs already: end it, with its PID in {self._run}/qemu.json")
        argv = ["cp", "--sparse=always", "--reflink=auto", str(self._image / "root.img"), str(self.disk)]
        subprocess.run(argv, check=True)
        key, known = self._image / "id_ed25519", self._image / "known_hosts"
        self.ssh_config.write_text(configuration(NAME, self.port, key, known, _PATIENCE))
        self._boot()
        self._watcher = threading.Thread(target=self._boot_again, name=NAME, daemon=True)
        self._watcher.start()

    def down(self) -> None:
        """End it, at once."""
        self._stopping.set()
        self.reconnect()
        if process := qemu.Process.find(self._run):
            process.stop()
        if self._watcher:
            self._watcher.join()

    def run(self, line: str, *, deadline: float = 600, check: bool = True) -> str:
        """Run a line of shell there, and give what it says on standard output.

        :raise LabError: it fails, or does not end by the deadline.
        """
        if self._shell is None:
            key, known = self._image / "id_ed25519", self._image / "known_hosts"
            self._shell = Shell(self.port, key, known, deadline=120)
        try:
            return self._shell.run(line, deadline=deadline, check=check).stdout
        except LabError:
            self.reconnect()  # it may be that it was rebooted meanwhile
            raise

    def reconnect(self) -> None:
        """Forget the connection: it was rebooted."""
        if self._shell:
            self._shell.close()
            self._shell = None

    def _boot(self) -> None:
        self._boots += 1
        with step(f"booting the stock host (boot {self._boots})"):
            kernel, initrd = self._from_disk("vmlinuz"), self._from_disk("initrd.img")
            self._process = qemu.Process.start(self._run, self._command(kernel, initrd))
            self._process.wait_console(_READY, _BOOT_DEADLINE)

    def _boot_again(self) -> None:
        """QEMU ends where the machine would reboot: the kernel may be another one by now."""
        while self._process and not self._stopping.wait(0.5):
            if self._process.alive():
                continue
            try:
                shutil.copy(self.console_log, self._run / f"console-{self._boots}.log")
                self._boot()
            except (LabError, OSError) as error:
                say(f"the stock host did not come back: {error}")
                return

    def _from_disk(self, link: str) -> Path:
        """A file of the disk that is not mounted by anyone, through a symbolic link in its root folder."""
        # Its journal may not be empty: what debugfs reads would be from before.
        check = [program("e2fsck", "e2fsprogs"), "-fp", str(self.disk)]
        status = subprocess.run(check, capture_output=True, text=True)
        if status.returncode > 1:  # 1: mended
            raise LabError(f"the disk of the stock host is not sound: {status.stdout}{status.stderr}")
        debugfs = program("debugfs", "e2fsprogs")
        said = subprocess.run([debugfs, "-R", f"stat /{link}", self.disk], capture_output=True, text=True, check=True)
        target = link_target(said.stdout)
        if target is None:
            raise LabError(f"the stock host has no /{link}: no kernel is installed there: {said.stdout}{said.stderr}")
        out = self._run / link
        out.unlink(missing_ok=True)
        subprocess.run([debugfs, "-R", f"dump /{target} {out}", self.disk], capture_output=True, check=True)
        if not out.exists() or not out.stat().st_size:
            raise LabError(f"the stock host has no /{target}, which /{link} names")
        return out

    def _command(self, kernel: Path, initrd: Path) -> list[str]:
        disk = str(self.disk).replace(",", ",,")
        return [
            program("qemu-system-x86_64", "qemu-system-x86"),
            *shlex.split(f"-name {NAME} -nodefaults -no-user-config -no-reboot -display none -machine pc"),
            *shlex.split("-accel tcg,thread=multi,tb-size=512 -cpu max"),
            *shlex.split(f"-smp {self._cpus} -m {self._memory}M"),
            *("-kernel", str(kernel), "-initrd", str(initrd), "-append", _KERNEL_ARGUMENTS),
            *("-drive", f"if=none,id=disk,format=raw,discard=unmap,cache=unsafe,file={disk}"),
            *shlex.split("-device virtio-blk-pci,drive=disk -device virtio-rng-pci"),
            *shlex.split(f"-netdev user,id=net,hostfwd=tcp:127.0.0.1:{self.port}-:22"),
            *shlex.split("-device virtio-net-pci,netdev=net,romfile="),
        ]


def _free_port() -> int:
    """A port of 127.0.0.1: it has to be the same after a reboot, which is another QEMU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
