# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host in a box: a Debian 12 KVM host with our modules, libvirt and stock QEMU, inside an emulated machine.

It is booted once; its state is saved, and from then on restored within seconds as long as nothing that it was made from
changes. It keeps nothing: its disk is never written, so each start is the same machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from kvmi_host.host.kernels import Series
from kvmi_host.lab import cache, deploy, images, qemu
from kvmi_host.lab.errors import LabError
from kvmi_host.lab.paths import program, project_root, run_dir
from kvmi_host.lab.progress import say, step
from kvmi_host.lab.ssh import Shell, configuration

SSH_NAME = "kvmi-lab"
"""What a box is called in its own configuration of OpenSSH."""

_BOOT_DEADLINE = 180
_WARM_DEADLINE = 240
_RESTORED_DEADLINE = 45
_PATIENCE = 300  # seconds that it may be too busy to say that it is there


@dataclass(frozen=True)
class Status:
    """What is known of a box that runs."""

    name: str
    pid: int
    port: int
    kernel: str
    modules: str
    restored: bool
    peak_memory_mib: int
    console: str
    libvirt_uri: str


class Box:
    """A host in a box, by its name. Each name is a machine of its own; they share images and saved state.

    As a context manager it is brought up at the start and taken down at the end.

    :param name: letters, digits, ``-`` and ``_``.
    :param kernel: the kernel that it boots.
    :param modules: the folder of ``kvm.ko`` and the others, ``"stock"``, or None for those of this tree.
    :param cpus: how many.
    :param memory: in MiB.
    """

    def __init__(
        self,
        name: str = "box",
        kernel: Series = Series.V6_1,
        modules: str | None = None,
        cpus: int = 1,
        memory: int = 2048,
    ) -> None:
        self.name = name
        self.series = kernel
        self._modules = modules
        self._cpus = cpus
        self._memory = memory
        self._run = run_dir(name)
        self._shell: Shell | None = None

    def __enter__(self) -> Box:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    # Life

    def up(self, fresh: bool = False) -> Status:
        """Bring it up, from saved state if there is one; whatever has to be built for that is built.

        A box of this name that was made from the same things and runs is left running; another is replaced.

        :param fresh: boot in any case, and save nothing.
        :raise LabError: when it does not come up; nothing runs then.
        """
        with images.kvm_modules(self.series, self._modules) as modules_built:
            image = images.host_image()
            modules = modules_built()
        kernel = image.kernel(self.series)
        initrd = images.initrd(kernel, modules)
        argv = qemu.command(image.disk, kernel.image, initrd, self._cpus, self._memory)
        key = cache.digest(images.qemu_version(argv[0]), *argv)
        with cache.locked(f"box_{self.name}"):
            running = qemu.Process.find(self._run)
            if running and not fresh and self._record().get("key") == key:
                return self.status()
            if running:
                say(f"{self.name} runs, but from other things than these: replacing it")
                self.down()
            try:
                restored = not fresh and self._restore(argv, image, kernel, key)
                if not restored:
                    self._boot(argv, image, kernel, key, save=not fresh)
            except BaseException:
                self.down()
                raise
            return self.status()

    def _restore(self, argv: list[str], image: images.HostImage, kernel: images.HostKernel, key: str) -> bool:
        """Start from saved state. False when there is none, or none that works, and nothing runs."""
        state = cache.find("state", key)
        if state is None:
            return False
        try:
            with step(f"restoring the host in a box ({self.name})"):
                process = qemu.Process.start(self._run, argv, incoming=True)
                process.restore(state / "memory.zst")
                self._note(process, image, kernel, key, restored=True)
                # Its clock stood still since it was saved. This is the first command, too: it shows that all is well.
                self.shell(_RESTORED_DEADLINE).run(["date", "-u", "-s", f"@{time.time():.3f}"])
        except LabError as error:
            say(f"the saved state does not work, so it is dropped and the box booted: {error}")
            cache.drop("state", key)
            self.down()
            return False
        return True

    def _boot(self, argv: list[str], image: images.HostImage, kernel: images.HostKernel, key: str, save: bool) -> None:
        """Start from power-on, and save the state when it is at its best."""
        with step(f"booting the host in a box ({self.name})"):
            process = qemu.Process.start(self._run, argv)
            process.wait_console("kvmi-lab: ready", _BOOT_DEADLINE * self.series.patience)
            self._note(process, image, kernel, key, restored=False)
        if save:
            with step("having libvirt probe QEMU there"):
                process.wait_console("kvmi-lab: warm", _WARM_DEADLINE * self.series.patience)
            program("zstd", "zstd")
            with step("saving its state for the next time"):
                cache.entry("state", key, lambda out: process.save(out / "memory.zst"), keep=4)
        with step("connecting to it"):
            self.shell(_RESTORED_DEADLINE).run(["true"])

    def down(self) -> bool:
        """End it. What was changed in it is gone.

        :return: whether it ran.
        """
        if self._shell:
            self._shell.close()
            self._shell = None
        process = qemu.Process.find(self._run)
        if process:
            process.stop()
        for name in ("box.json", "qemu.json", "qmp.sock", "ssh", "ssh_config"):
            (self._run / name).unlink(missing_ok=True)
        return process is not None

    def is_up(self) -> bool:
        """Whether its machine runs."""
        return qemu.Process.find(self._run) is not None

    def status(self) -> Status:
        """What is known of it.

        :raise LabError: when it does not run.
        """
        process, record = self._running()
        return Status(
            name=self.name,
            pid=process.pid,
            port=int(record["port"]),
            kernel=str(record["kernel"]),
            modules=str(record["modules"]),
            restored=record["restored"] == "True",
            peak_memory_mib=process.peak_memory(),
            console=str(self.console_log),
            libvirt_uri=self.libvirt_uri,
        )

    # Use

    @property
    def console_log(self) -> Path:
        """What the box writes on its serial console."""
        return self._run / "console.log"

    @property
    def ssh_config(self) -> Path:
        """How OpenSSH reaches it, as :data:`SSH_NAME`. It is there while the box is up."""
        return self._run / "ssh_config"

    @property
    def libvirt_uri(self) -> str:
        """The way to its libvirtd from this machine."""
        return f"qemu+ssh://root@{SSH_NAME}/system?command={self._run / 'ssh'}"

    def ssh_command(self, *command: str) -> list[str]:
        """The OpenSSH command line that runs a command there, or an interactive shell."""
        self._running()
        return [program("ssh", "openssh-client"), "-F", str(self.ssh_config), SSH_NAME, *command]

    def shell(self, deadline: float = 30) -> Shell:
        """The SSH connection to it, made on first use."""
        if self._shell is None:
            _, record = self._running()
            image = images.HostImage(Path(record["image"]))
            self._shell = Shell(int(record["port"]), image.key, image.known_hosts, deadline)
        return self._shell

    def run(
        self,
        argv: Sequence[str] | str,
        *,
        stdin: bytes | None = None,
        deadline: float = 120,
        check: bool = True,
        on_output: Callable[[str], None] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in it as root: see :meth:`kvmi_host.lab.ssh.Shell.run`."""
        return self.shell().run(argv, stdin=stdin, deadline=deadline, check=check, on_output=on_output)

    def deploy(self) -> bool:
        """Bring our package, the ``kvmi-host`` command, guest images and the hardware suite there.

        :return: False when all of it was there already.
        """
        root = project_root()
        guests = images.guest_images()
        fingerprint = deploy.fingerprint(root, guests)
        marker = str(deploy.TOP / "deployed")
        if self.run(["cat", marker], check=False).stdout.strip() == fingerprint:
            return False
        with step("deploying to the host in a box"):
            script = f"{deploy.SCRIPT}echo {fingerprint} > {marker}"
            self.run(script, stdin=deploy.archive(root, guests))
        return True

    # What is kept about it while it runs

    def _note(
        self, process: qemu.Process, image: images.HostImage, kernel: images.HostKernel, key: str, restored: bool
    ) -> None:
        """Record what other processes of ours need to find and use it."""
        port = process.ssh_port()
        record = {
            "key": key,
            "port": port,
            "image": str(image.path),
            "kernel": kernel.release,
            "modules": self._modules or os.environ.get("KVMI_LAB_MODULES") or "this tree's",
            "restored": restored,
        }
        shared = f"ControlMaster auto\nControlPath {self._run}/ctl-%C\nControlPersist 20\n"
        config = configuration(SSH_NAME, port, image.key, image.known_hosts, _PATIENCE)
        self.ssh_config.write_text(config + shared)
        wrapper = self._run / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {program("ssh", "openssh-client")} -F {self.ssh_config} "$@"\n')
        wrapper.chmod(0o700)
        (self._run / "box.json").write_text(json.dumps(record))

    def _record(self) -> dict[str, object]:
        try:
            record = json.loads((self._run / "box.json").read_text())
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def _running(self) -> tuple[qemu.Process, dict[str, str]]:
        process = qemu.Process.find(self._run)
        record = self._record()
        if process is None or not record:
            raise LabError(f"the host in a box called {self.name} does not run: `kvmi-host lab up` starts it")
        return process, {key: str(value) for key, value in record.items()}
