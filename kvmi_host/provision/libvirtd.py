# SPDX-License-Identifier: LGPL-2.1-or-later
"""A connection to libvirt, local or over SSH, with a deadline and without libvirt's own printing.

libvirt's Python binding is imported when a connection is opened: it is not needed to attach by process id.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from threading import Thread
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from kvmi_host.provision.errors import LibvirtUnreachable, NoSuchGuest, ProvisionError

if TYPE_CHECKING:
    import libvirt

LOCAL_URI = "qemu:///system"


def default_uri() -> str:
    """The URI that virsh would take from its environment, or the local system's QEMU driver."""
    return os.environ.get("LIBVIRT_DEFAULT_URI") or LOCAL_URI


def is_remote(uri: str) -> bool:
    """Whether the guests of this URI run on another machine: it names a host."""
    return bool(urlsplit(uri).hostname)


def is_session(uri: str) -> bool:
    """Whether that libvirt is a user's own."""
    return urlsplit(uri).path == "/session"


def serial_log(uri: str, name: str) -> PurePosixPath | None:
    """The file on the VM's host that is to keep what a guest writes to its serial port: beside libvirt's own log of it.

    None for a session on another machine, of whose home nothing is known here.
    """
    if not is_session(uri):
        return PurePosixPath("/var/log/libvirt/qemu", f"{name}-serial.log")
    if is_remote(uri):
        return None
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return PurePosixPath(cache, "libvirt/qemu/log", f"{name}-serial.log")


def connect(uri: str | None = None, timeout: float = 30.0) -> libvirt.virConnect:
    """Open a connection to libvirt. The caller closes it.

    :param uri: as virsh takes it; None for :func:`default_uri`.
    :param timeout: seconds. The attempt cannot be cancelled: it goes on behind us until the process ends.
    :raise LibvirtUnreachable: no daemon, no host, no permission, or no answer in time.
    """
    try:
        import libvirt
    except ImportError as error:
        raise LibvirtUnreachable(f"libvirt's Python binding is missing ({error}): install python3-libvirt") from None
    wanted = uri or default_uri()
    libvirt.registerErrorHandler(_keep_quiet, None)
    result: list[libvirt.virConnect | Exception] = []

    def attempt() -> None:
        try:
            result.append(libvirt.open(wanted))
        except libvirt.libvirtError as error:
            result.append(error)

    thread = Thread(target=attempt, name="libvirt-open", daemon=True)
    thread.start()
    thread.join(timeout)
    if not result:
        raise LibvirtUnreachable(f"{wanted}: no answer in {timeout:g} s: is the host up?")
    if isinstance(result[0], Exception):
        raise LibvirtUnreachable(_unreachable(wanted, str(result[0]))) from result[0]
    return result[0]


def find_domain(connection: libvirt.virConnect, vm: str) -> libvirt.virDomain:
    """The domain with this name or UUID.

    :raise NoSuchGuest: there is none.
    """
    import libvirt

    for lookup in (connection.lookupByName, connection.lookupByUUIDString):
        try:
            return lookup(vm)
        except libvirt.libvirtError as error:
            if error.get_error_code() not in {libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_INVALID_ARG}:
                raise ProvisionError(f"{vm}: {error}") from error
    raise NoSuchGuest(f"libvirt at {connection.getURI()} has no guest {vm!r}: see kvmi-host guest list")


def _keep_quiet(_context: object, _error: object) -> None:
    """In place of libvirt's handler, which prints to standard error what it also raises."""


def _unreachable(uri: str, reason: str) -> str:
    parts = urlsplit(uri)
    if "+ssh" in parts.scheme:
        return f"{uri}: the SSH host {parts.hostname} cannot be reached, or has no libvirtd for us: {reason}"
    if is_remote(uri):
        return f"{uri}: the host {parts.hostname} cannot be reached: {reason}"
    return f"{uri}: no connection to libvirt: {reason}: is libvirtd running, and may this user talk to it?"
