# SPDX-License-Identifier: LGPL-2.1-or-later
"""What introspection holds of a host's kernel: objects, memory, threads, modules in use."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

_PROC, _SLAB = Path("/proc"), Path("/sys/kernel/slab")
_CACHES = re.compile(r"(?:kmalloc-cg-|kvm|x86_(?:fpu|emulator)|radix_tree)\S*")
"""All that the kernel part takes is accounted to a memory cgroup (cg). What is not is taken by the rest of the host."""
_MODULES = ("kvm", "kvm_amd", "kvm_intel")


class Footprint(NamedTuple):
    """What is held at a moment.

    :ivar objects: allocated ones by cache, of those that the kernel part and KVM take from.
    :ivar unreclaimable_kib: the kernel's slabs that memory pressure does not shrink.
    :ivar vmalloc_kib: what is mapped in the kernel's virtual memory.
    :ivar threads: receiving threads of sessions.
    :ivar users: who holds the KVM modules: VMs the vendor's, sessions the common one.
    """

    objects: Counter[str]
    unreclaimable_kib: int
    vmalloc_kib: int
    threads: int
    users: int

    def __str__(self) -> str:
        return (
            f"{self.objects.total()} objects, {self.unreclaimable_kib} KiB of slabs, {self.vmalloc_kib} KiB of virtual"
            f" memory, {self.threads} threads, {self.users} users of kvm"
        )


NOTHING = Footprint(Counter(), 0, 0, 0, 0)


def footprint() -> Footprint:
    """What is held now; needs root. Caches are shrunk first, or what they keep at hand would count as allocated."""
    lines = [line.split() for line in (_PROC / "slabinfo").read_text().splitlines()[2:]]
    caches = [name for name, *_ in lines if _CACHES.fullmatch(name)]
    for name in caches:
        (_SLAB / name / "shrink").write_text("1")
    counts = {line.split()[0]: int(line.split()[1]) for line in (_PROC / "slabinfo").read_text().splitlines()[2:]}
    meminfo = dict(re.findall(r"^(\w+):\s+(\d+)", (_PROC / "meminfo").read_text(), re.MULTILINE))
    return Footprint(
        objects=Counter({name: counts[name] for name in caches}),
        unreclaimable_kib=int(meminfo["SUnreclaim"]),
        vmalloc_kib=int(meminfo["VmallocUsed"]),
        threads=receivers(),
        users=users_of_kvm(),
    )


def receivers(vmm: int | None = None) -> int:
    """How many receiving threads the kernel has.

    :param vmm: the process whose VM's are meant; None: those of all VMs.
    """
    names = [path.read_text().strip() for path in _PROC.glob("[0-9]*/comm") if path.exists()]
    return sum(name.startswith("kvmi-") for name in names) if vmm is None else names.count(f"kvmi-{vmm}")


def users_of_kvm() -> int:
    """How many hold the KVM modules."""
    counts = (Path("/sys/module", name, "refcnt") for name in _MODULES)
    return sum(int(count.read_text()) for count in counts if count.exists())
