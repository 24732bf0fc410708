# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a host needs before its VMs can be introspected: each thing by itself, whether it is there, and what to do.

    for finding in examine(Machine()):
        print(finding.state, finding.subject, finding.evidence, finding.remedy)

The rules about modules are those of ``kernel/README.md``.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

OUR_VERSION = "kvmi"
"""What ``modinfo -F version`` says of our modules. Debian's own have no version."""

_SECURE_BOOT = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
_DKMS_KEY = "var/lib/dkms/mok.pub"
_INSTALL = "install kvmi-dkms (`make dkms` builds it)"


class State(StrEnum):
    """What came out."""

    OK = "ok"
    MISSING = "missing"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    :ivar evidence: what was seen.
    :ivar remedy: what to do; empty if nothing.
    """

    subject: str
    state: State
    evidence: str
    remedy: str = ""


class Machine:
    """What can be seen of a machine: its files, and what its programs say.

    :param root: the folder that stands for its root folder.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def path(self, name: str) -> Path:
        """The file of that name, without the first slash."""
        return self._root / name

    def read(self, name: str) -> str | None:
        """A file's text without what is blank around it; None if it cannot be read."""
        try:
            return self.path(name).read_text(errors="replace").strip()
        except OSError:
            return None

    def run(self, argv: Sequence[str]) -> str | None:
        """What a program writes, whether or not it fails; None if there is no such program."""
        try:
            return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            return None


def _virtualization(machine: Machine) -> Finding:
    subject = "virtualization"
    flags = (machine.read("proc/cpuinfo") or "").split()
    if found := {"svm", "vmx"} & set(flags):
        return Finding(subject, State.OK, f"the CPU has {min(found)}")
    remedy = "switch it on in the firmware's setup; for a virtual machine, with its host"
    return Finding(subject, State.MISSING, "the CPU's flags have neither svm nor vmx", remedy)


def _loaded(machine: Machine) -> Finding:
    subject = "loaded modules"
    if not machine.path("sys/module/kvm").exists():
        return Finding(subject, State.MISSING, "kvm is not loaded", "modprobe kvm_amd, or kvm_intel")
    if machine.read("sys/module/kvm/version") == OUR_VERSION:
        return Finding(subject, State.OK, "kvm has introspection")
    remedy = f"{_INSTALL}, stop all VMs, and load it anew: modprobe -r kvm_amd kvm; modprobe kvm_amd (or kvm_intel)"
    return Finding(subject, State.MISSING, "kvm is another one: it has no version, or not ours", remedy)


def _switch(machine: Machine) -> Finding:
    subject = "kvm.introspection"
    parameter = "sys/module/kvm/parameters/introspection"
    value = machine.read(parameter)
    if value is None:
        return Finding(subject, State.UNKNOWN, "the loaded kvm has no such parameter", "see: loaded modules")
    if value in {"Y", "1"}:
        return Finding(subject, State.OK, "it is switched on")
    remedy = f"write 1 to /{parameter}; for good, `options kvm introspection=1` in /etc/modprobe.d"
    return Finding(subject, State.MISSING, "it is switched off", remedy)


def _next_load(machine: Machine) -> Finding:
    subject = "modules on the disk"
    version = machine.run(["modinfo", "-F", "version", "kvm"])
    if version is None:
        return Finding(subject, State.UNKNOWN, "there is no modinfo", "install kmod")
    if version == OUR_VERSION:
        return Finding(subject, State.OK, "modprobe loads ours")
    return Finding(subject, State.MISSING, "modprobe loads another kvm", f"{_INSTALL}, or load ours with insmod")


def _secure_boot(machine: Machine) -> Finding:
    subject = "Secure Boot"
    try:
        *_, value = machine.path(_SECURE_BOOT).read_bytes()
    except (OSError, ValueError):
        return Finding(subject, State.OK, "there is none: modules need no signature")
    if not value:
        return Finding(subject, State.OK, "it is off: modules need no signature")

    key = machine.path(_DKMS_KEY)
    if not key.exists():
        return Finding(subject, State.MISSING, f"it is on, and DKMS has no key in /{_DKMS_KEY}", _INSTALL)
    said = machine.run(["mokutil", "--test-key", str(key)])
    if said is None:
        evidence = "it is on; whether the key of DKMS is enrolled takes mokutil to tell"
        return Finding(subject, State.UNKNOWN, evidence, "apt-get install mokutil")
    if "already enrolled" in said:
        return Finding(subject, State.OK, "it is on, and the key of DKMS is enrolled")
    remedy = f"mokutil --import /{_DKMS_KEY}, then reboot and choose Enroll MOK"
    return Finding(subject, State.MISSING, "it is on, and the key of DKMS is not enrolled", remedy)


_CHECKS: Sequence[Callable[[Machine], Finding]] = (_virtualization, _loaded, _switch, _next_load, _secure_boot)


def examine(machine: Machine) -> Iterator[Finding]:
    """Look at everything, one after the other."""
    for check in _CHECKS:
        yield check(machine)
