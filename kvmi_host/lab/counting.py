# SPDX-License-Identifier: LGPL-2.1-or-later
"""What exits of a vCPU cost, in instructions of the emulated host.

The counting host is a kernel, KVM's modules and one program on a machine of QEMU's whose clock counts the instructions
that it has executed (``-icount``): one nanosecond each. What is measured there repeats nearly to the digit, however
busy the machine is that emulates.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvmi_host.lab import images
from kvmi_host.lab.errors import LabError
from kvmi_host.lab.paths import program, project_root
from kvmi_host.lab.progress import build, step, tail

_DEADLINE = 300
_KERNEL_ARGUMENTS = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check tsc=reliable cryptomgr.notests"

Costs = Mapping[str, int]
"""Instructions a round, by kind of instruction; see tests/bench/exits.c."""


@dataclass(frozen=True)
class Report:
    """What was counted.

    :ivar stock: exits, with Debian's modules.
    :ivar ours: the same with ours, where no VM is hooked.
    :ivar events: the same instructions when each is an event that an introspector answers at once.
    """

    stock: Costs
    ours: Costs
    events: Costs


def _compile(out: Path) -> Path:
    root = project_root()
    exits = out / "exits"
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread"]
    flags += [f"-I{root}/kernel/src/include/uapi", f"-I{root}/kernel/src/arch/x86/include/uapi"]
    source = root / "tests" / "bench" / "exits.c"
    build("compiling exits", [program("gcc", "gcc"), *flags, "-o", exits, source])
    return exits


def _run(kernel: images.HostKernel, modules: Path | None, exits: Path, command: str, work: Path) -> list[Costs]:
    """Run a shell command in the counting host; its lines are JSON objects."""
    initrd, console, output = work / "initrd", work / "console.log", work / "output"
    folder = modules or kernel.kvm_modules
    recipe = project_root() / "vm-images" / "counting-host" / "build"
    parameters = ["introspection=1"] if modules else []
    build("building the counting host", [recipe, kernel.boot_modules, folder, exits, command, initrd, *parameters])
    argv = [
        program("qemu-system-x86_64", "qemu-system-x86"),
        *shlex.split("-nodefaults -no-user-config -no-reboot -display none -machine pc -m 512M -smp 1"),
        *shlex.split("-accel tcg,thread=single -icount shift=0,sleep=off -cpu max"),
        *("-kernel", str(kernel.image), "-initrd", str(initrd), "-append", _KERNEL_ARGUMENTS),
        *("-serial", f"file:{console}", "-serial", f"file:{output}"),
    ]
    with step(f"counting with {'our' if modules else 'stock'} modules"):
        try:
            subprocess.run(argv, stdin=subprocess.DEVNULL, timeout=_DEADLINE, check=True)
        except (subprocess.SubprocessError, OSError) as error:
            raise LabError(f"the counting host: {error}; the end of its console:\n{tail(console)}") from error
    lines = output.read_text().splitlines()
    if len(lines) != command.count("\n") + 1:
        raise LabError(f"the counting host said {lines}; the end of its console:\n{tail(console)}")
    return [json.loads(line) for line in lines]


def count(kernel: images.HostKernel, modules: Path) -> Report:
    """Count what exits cost with stock modules and with ours, and what events cost.

    :param modules: the folder of our ``kvm.ko`` and ``kvm-amd.ko``.
    :raise LabError: the counting host did not come to its end.
    """
    with tempfile.TemporaryDirectory(prefix="kvmi-count-") as folder:
        work = Path(folder)
        exits = _compile(work)
        (stock,) = _run(kernel, None, exits, "exits bare", work)
        ours, events = _run(kernel, modules, exits, "exits bare\nexits event", work)
    return Report(stock, ours, events)
