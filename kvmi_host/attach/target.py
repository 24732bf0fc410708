# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which process runs a VM: from a libvirt name, a UUID, or ``pid:N``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from uuid import UUID

from kvmi_host.attach.errors import AttachError, NoSuchVm, VmNotRunning
from kvmi_host.provision import connect, default_uri, find_domain, is_remote

if TYPE_CHECKING:
    import libvirt

_PROC = Path("/proc")
_LIBVIRT_RUN = Path("/run/libvirt/qemu")
"""Where the system's libvirt writes the process of each VM."""
_NO_UUID = UUID(int=0)
_POLL = 0.5


@dataclass(frozen=True, slots=True)
class Target:
    """A running VM. ``uuid`` is zero for a VMM that was not given one; ``start_time``: seconds since the epoch.

    :ivar uri: of the libvirt that runs it; None if it was named by its process.
    """

    pid: int
    name: str
    uuid: UUID
    start_time: int
    uri: str | None = None


def find_target(vm: str, uri: str | None = None, wait: float = 0.0) -> Target:
    """The process of a VM.

    :param vm: a libvirt name or UUID, or ``pid:N`` for any VMM's process.
    :param uri: of the local libvirt that knows the name; see :func:`kvmi_host.provision.connect`.
    :param wait: seconds that a domain has to come to run.
    :raise NoSuchVm: nothing has that name, UUID or process id.
    :raise VmNotRunning: the domain is shut off, or is being migrated.
    :raise AttachError: the VM runs on another host, or several processes could be it.
    :raise ProvisionError: libvirt could not be asked.
    """
    if vm.startswith("pid:"):
        return _from_pid(vm)
    deadline = monotonic() + wait
    while True:
        try:
            return _from_libvirt(vm, uri)
        except VmNotRunning:
            if monotonic() >= deadline:
                raise
        sleep(_POLL)  # libvirt tells of changes only to those who run its event loop


def _from_libvirt(vm: str, uri: str | None) -> Target:
    wanted = uri or default_uri()
    if is_remote(wanted):
        raise AttachError(f"{wanted}: VMs are attached to on their own host: run kvmi-host there")
    connection = connect(wanted)
    try:
        domain = find_domain(connection, vm)
        name, uuid = domain.name(), UUID(domain.UUIDString())
        running, migrated = bool(domain.isActive()), _is_migrated(domain)
    finally:
        connection.close()
    if migrated:
        raise VmNotRunning(f"{name} is being migrated: its memory is here no more, or not yet")
    if not running:
        raise VmNotRunning(f"{name} is shut off: kvmi-host guest start {name}")
    pid = _process_of(name, uuid, wanted)
    return Target(pid, name, uuid, _start_time(pid), wanted)


def _process_of(name: str, uuid: UUID, uri: str) -> int:
    """The process of a domain that runs: the one that libvirt has written down, or else the only one with its UUID.

    Anybody can put a UUID on a command line, and so stand in for a VM.
    """

    def has_uuid(pid: int) -> bool:
        return option_of(command_line(pid), "-uuid") == str(uuid)

    if urlsplit(uri).path == "/system":
        try:
            pid = int((_LIBVIRT_RUN / f"{name}.pid").read_text())
        except (OSError, ValueError):
            pass  # a libvirt that keeps them elsewhere
        else:
            if has_uuid(pid):
                return pid
    found = [pid for pid in processes() if has_uuid(pid)]
    if not found:
        raise VmNotRunning(f"{name} is running, but no process on this host has its UUID {uuid}")
    if len(found) > 1:
        several = ", ".join(f"pid:{pid}" for pid in found)
        raise AttachError(
            f"{name}: several processes have its UUID {uuid}: find out whose they are, and name one: {several}"
        )
    return found[0]


def _is_migrated(domain: libvirt.virDomain) -> bool:
    import libvirt

    state, reason = domain.state()
    return bool(state == libvirt.VIR_DOMAIN_PAUSED and reason == libvirt.VIR_DOMAIN_PAUSED_MIGRATION)


def _from_pid(vm: str) -> Target:
    try:
        pid = int(vm.removeprefix("pid:"))
    except ValueError:
        raise NoSuchVm(f"{vm}: what follows pid: is a process id") from None
    if not (_PROC / str(pid)).is_dir():
        raise NoSuchVm(f"there is no process {pid}")
    words = command_line(pid)
    name = (option_of(words, "-name") or "").split(",", 1)[0].removeprefix("guest=")
    uuid = option_of(words, "-uuid")
    return Target(pid, name or vm, UUID(uuid) if uuid else _NO_UUID, _start_time(pid))


def processes() -> Iterator[int]:
    """The processes that there are."""
    return (int(entry) for entry in os.listdir(_PROC) if entry.isdigit())


def command_line(pid: int) -> list[str]:
    """The words of a process's command line; none if it has ended."""
    try:
        return (_PROC / str(pid) / "cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []  # it ended since it was listed


def option_of(words: list[str], option: str) -> str | None:
    """The argument that follows `option` on QEMU's command line."""
    for word, value in pairwise(words):
        if word == option:
            return value
    return None


def _start_time(pid: int) -> int:
    try:
        # proc(5): field 22 of stat, in clock ticks since boot; the name in field 2 may hold blanks.
        ticks = int((_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        raise NoSuchVm(f"there is no process {pid}") from None
    boot = next(line for line in (_PROC / "stat").read_text().splitlines() if line.startswith("btime "))
    return int(boot.split()[1]) + ticks // os.sysconf("SC_CLK_TCK")
