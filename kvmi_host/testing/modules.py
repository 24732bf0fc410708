# SPDX-License-Identifier: LGPL-2.1-or-later
"""KVM's modules on the host that the hardware suite runs on: they come and go, with one kind of paging or the other."""

from __future__ import annotations

import os
import subprocess
from enum import StrEnum
from pathlib import Path
from time import monotonic

from kvmi_host.testing.live import DEADLINE, LiveError

OURS = Path("/run/kvmi/modules")
"""Where the lab's hosts have ours."""

_LOADED = Path("/sys/module")


class Paging(StrEnum):
    """Who walks a guest's page tables."""

    NESTED = "nested"
    """The CPU, and then those of the host."""
    SHADOW = "shadow"
    """KVM, which makes tables of its own of them."""


def vendor() -> str:
    """The vendor's module that is loaded, or was.

    :return: ``kvm_amd`` or ``kvm_intel``.
    """
    flags = Path("/proc/cpuinfo").read_text().split()
    return "kvm_intel" if "vmx" in flags else "kvm_amd"


def paging() -> Paging:
    """What the loaded modules do."""
    name = vendor()
    switch = _LOADED / name / "parameters" / _nested(name)
    return Paging.NESTED if switch.read_text().strip() in ("Y", "1") else Paging.SHADOW


def _nested(name: str) -> str:
    return "ept" if name == "kvm_intel" else "npt"


def unload() -> None:
    """Unload KVM, which no VM may use. The last session's thread may still be on its way out: it is waited for.

    :raise LiveError: it is in use.
    """
    deadline = monotonic() + DEADLINE
    while (_LOADED / "kvm" / "refcnt").read_text().strip() != "1":
        if monotonic() > deadline:
            raise LiveError("the kvm module is in use")
        os.sched_yield()
    subprocess.run(["rmmod", vendor(), "kvm"], check=True)


def load(kind: Paging = Paging.NESTED) -> None:
    """Load ours, with introspection switched on.

    :raise LiveError: they are not there.
    """
    if not (OURS / "kvm.ko").exists():
        raise LiveError(f"no modules in {OURS}: run this in the host in a box, or in the Intel host")
    name = vendor()
    switch = f"{_nested(name)}={int(kind is Paging.NESTED)}"
    subprocess.run(["insmod", OURS / "kvm.ko", "introspection=1"], check=True)
    subprocess.run(["insmod", OURS / f"{name.replace('_', '-')}.ko", switch], check=True)
