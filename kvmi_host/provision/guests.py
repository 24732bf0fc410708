# SPDX-License-Identifier: LGPL-2.1-or-later
"""The life of a guest through libvirt: define, start, stop, destroy, list."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING
from uuid import UUID

from kvmi_host.provision.domain import Guest, domain_xml, image_of
from kvmi_host.provision.errors import GuestExists, NoImage, ProvisionError
from kvmi_host.provision.libvirtd import find_domain, is_remote

if TYPE_CHECKING:
    import libvirt

# libvirt's virDomainState, by number.
_STATES = ("no state", "running", "blocked", "paused", "shutting down", "shut off", "crashed", "suspended")


@dataclass(frozen=True, slots=True)
class GuestInfo:
    """One line of the list. ``memory`` in MiB; ``image`` is None for guests that we did not make."""

    name: str
    uuid: UUID
    state: str
    vcpus: int
    memory: int
    image: str | None


def define(connection: libvirt.virConnect, guest: Guest) -> UUID:
    """Define a guest, without starting it; its UUID.

    :raise GuestExists: the name is taken.
    :raise NoImage: the image's files are not on this host (for a remote host, starting tells).
    """
    if not is_remote(connection.getURI()):
        for path in filter(None, (guest.image.kernel, guest.image.initrd)):
            if not Path(path).is_file():
                raise NoImage(f"no file {path}: build the guest images, or say where they are with --image-dir")
    if any(domain.name() == guest.name for domain in connection.listAllDomains()):
        raise GuestExists(f"there is a guest {guest.name!r} already: kvmi-host guest destroy {guest.name}")
    with _refusals(guest.name):
        return UUID(connection.defineXML(domain_xml(guest)).UUIDString())


def start(connection: libvirt.virConnect, vm: str) -> None:
    """Start a guest that is defined.

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


def destroy(connection: libvirt.virConnect, vm: str) -> None:
    """Switch a guest off at once and forget it.

    :raise NoSuchGuest: there is none.
    """
    domain = find_domain(connection, vm)
    with _refusals(vm):
        if domain.isActive():
            domain.destroy()
        domain.undefine()


def list_guests(connection: libvirt.virConnect) -> list[GuestInfo]:
    """Every guest of that libvirt, by name."""
    with _refusals("list"):
        return sorted((_describe(domain) for domain in connection.listAllDomains()), key=lambda guest: guest.name)


def _describe(domain: libvirt.virDomain) -> GuestInfo:
    state, _, memory, vcpus, _ = domain.info()
    return GuestInfo(
        name=domain.name(),
        uuid=UUID(domain.UUIDString()),
        state=_STATES[state] if state < len(_STATES) else str(state),
        vcpus=vcpus,
        memory=memory // 1024,
        image=image_of(domain.XMLDesc()),
    )


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    import libvirt

    try:
        yield
    except libvirt.libvirtError as error:
        raise ProvisionError(f"{what}: {error}") from error
