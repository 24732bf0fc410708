# SPDX-License-Identifier: LGPL-2.1-or-later
"""The life of a guest through libvirt: define, start, stop, save, destroy, list."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from kvmi_host.provision.domain import Guest, domain_xml, has_nvram, made_by_us
from kvmi_host.provision.errors import GuestExists, ProvisionError
from kvmi_host.provision.libvirtd import find_domain, is_session, serial_log
from kvmi_host.provision.storage import Tell, provide, remove

if TYPE_CHECKING:
    import libvirt

# libvirt's virDomainState, by number.
_STATES = ("no state", "running", "blocked", "paused", "shutting down", "shut off", "crashed", "suspended")


@dataclass(frozen=True, slots=True)
class GuestInfo:
    """One line of the list. ``memory`` in MiB; ``image`` and ``introspection`` (its method) are None for guests that we
    did not make.
    """

    name: str
    uuid: UUID
    state: str
    vcpus: int
    memory: int
    image: str | None
    introspection: str | None


def define(connection: libvirt.virConnect, guest: Guest, tell: Tell = lambda _: None) -> UUID:
    """Define a guest, without starting it; its UUID. When that fails, nothing of it is left.

    :param tell: is told what takes its time.
    :raise GuestExists: the name is taken.
    :raise NoImage: the image's files are not there, or QEMU cannot read them (for a kernel on a remote host, starting
        tells).
    :raise ProvisionError: libvirt could not, and why.
    """
    uri = connection.getURI()
    uuid = guest.uuid or uuid4()
    with _refusals(guest.name), ExitStack() as undo:
        if any(domain.name() == guest.name for domain in connection.listAllDomains()):
            raise GuestExists(f"there is a guest {guest.name!r} already: kvmi-host guest destroy {guest.name}")
        image, storage = provide(connection, guest, uuid, undo, tell)
        placed = replace(guest, image=image, uuid=uuid)
        log = serial_log(uri, guest.name)
        if log and is_session(uri):
            # libvirt makes the folder of its own log, but only after it opened this one.
            Path(log).parent.mkdir(parents=True, exist_ok=True)
        connection.defineXML(domain_xml(placed, storage, log))
        undo.pop_all()
    return uuid


def start(connection: libvirt.virConnect, vm: str) -> None:
    """Start a guest that is defined. One that was saved goes on where it was.

    :raise NoSuchGuest: it is not.
    :raise ProvisionError: libvirt could not, and why.
    """
    domain = find_domain(connection, vm)
    with _refusals(vm):
        domain.create()


def stop(connection: libvirt.virConnect, vm: str, timeout: float = 10.0) -> None:
    """Ask a guest to shut down, and switch it off when it has not after `timeout` seconds. Stopped already: nothing.

    :raise NoSuchGuest: there is none.
    """
    domain = find_domain(connection, vm)
    deadline = monotonic() + timeout
    with _refusals(vm):
        if domain.isActive() and timeout > 0:
            domain.shutdown()
        while domain.isActive() and monotonic() < deadline:
            sleep(0.1)  # libvirt tells of state changes only to those who run its event loop
        if domain.isActive():
            domain.destroy()


def save(connection: libvirt.virConnect, vm: str) -> None:
    """Write a running guest to the host's disk and switch it off, until it is started again.

    :raise NoSuchGuest: there is none.
    :raise ProvisionError: libvirt could not, and why: it does not run, for example.
    """
    domain = find_domain(connection, vm)
    with _refusals(vm):
        domain.managedSave()


def destroy(connection: libvirt.virConnect, vm: str) -> None:
    """Switch a guest off at once and forget it, with what was saved of it, and with the disks that we made for it.

    :raise NoSuchGuest: there is none.
    """
    import libvirt

    domain = find_domain(connection, vm)
    with _refusals(vm):
        described = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE) if domain.isPersistent() else domain.XMLDesc()
        if domain.isActive():
            domain.destroy()
        if domain.isPersistent():
            flags = libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            if has_nvram(described):
                flags |= libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
            domain.undefineFlags(flags)
        made = made_by_us(described)
        for volume in made.volumes if made else ():
            remove(connection, volume)


def list_guests(connection: libvirt.virConnect) -> list[GuestInfo]:
    """Every guest of that libvirt, by name."""
    with _refusals("list"):
        return sorted((_describe(domain) for domain in connection.listAllDomains()), key=lambda guest: guest.name)


def _describe(domain: libvirt.virDomain) -> GuestInfo:
    state, _, memory, vcpus, _ = domain.info()
    made = made_by_us(domain.XMLDesc())
    return GuestInfo(
        name=domain.name(),
        uuid=UUID(domain.UUIDString()),
        state=_STATES[state] if state < len(_STATES) else str(state),
        vcpus=vcpus,
        memory=memory // 1024,
        image=made.image if made else None,
        introspection=made.method if made else None,
    )


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    import libvirt

    try:
        yield
    except libvirt.libvirtError as error:
        raise ProvisionError(f"{what}: {error}") from error
