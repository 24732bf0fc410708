# SPDX-License-Identifier: LGPL-2.1-or-later
"""The introspection of a VM through the object that the KVM-VMI project's QEMU has for it, over its monitor.

Three things are made in QEMU, under names of ours: a character device, which connects to the introspector's socket; a
secret, where there is a cookie; and the object, which does the handshake there and hands the socket to KVM. What goes
wrong in the middle is undone in reverse order.
"""

from __future__ import annotations

import os
import socket
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep

from kvmi_host.attach.errors import (
    AlreadyHooked,
    AttachError,
    AttachRefused,
    MonitorRefused,
    MonitorUnreachable,
    NotHooked,
)
from kvmi_host.attach.monitor import Monitor, open_monitor
from kvmi_host.attach.target import Target
from kvmi_host.introspect.greeting import greet
from kvmi_host.introspect.listener import check_user, listen_at, peer_of

TYPE = "introspection"
OBJECT = "kvmi-host-session"
CHARDEV = "kvmi-host-socket"
SECRET = "kvmi-host-cookie"

RECONNECT = 10
"""Seconds after which QEMU connects again to an introspector that went away."""

_RUN = Path("/run/kvmi-host")
_PROC = Path("/proc")
_FLAT_SINCE = (6, 0)  # object-add takes an object's properties beside its id; before, in "props"
_SETTLED = 1.0  # seconds that a connection lasts which QEMU has not dropped at once, for a wrong cookie
_POLL = 0.05  # seconds between two looks: QEMU tells nobody of these things


def require_object(target: Target) -> None:
    """Look whether this VM's QEMU knows the object.

    :raise AttachRefused: it does not.
    :raise MonitorUnreachable: it cannot be asked.
    """
    with open_monitor(target) as monitor:
        _require_object(monitor)


def connect_object(target: Target, timeout: float = 10.0) -> socket.socket:
    """Have QEMU connect to us; the socket has KVM at its other end. Remove the object when it is closed.

    :param timeout: seconds that QEMU has to connect, and again for its side of the handshake.
    :raise AlreadyHooked: QEMU has such an object already.
    :raise AttachRefused: QEMU does not know the object, or may not reach our socket.
    :raise AttachError: see its branches.
    :raise HandshakeError: QEMU connected and did not say which VM it is.
    """
    cookie = os.urandom(32).hex().encode()  # as text: QEMU takes no other secrets
    with open_monitor(target) as monitor, _listening_for(target) as (path, listening):
        _require_free(monitor)
        with _added(monitor, path, cookie) as keep:
            sock = _accept(listening, target, path, timeout)
            try:
                greet(sock, cookie, timeout)
                sock.setblocking(True)
            except BaseException:
                sock.close()
                raise
            keep.pop_all()
    return sock


def hand_over_object(target: Target, path: str, cookie: bytes | None, timeout: float = 10.0) -> None:
    """Have QEMU connect to an introspector that listens on the UNIX socket `path`, now and whenever it went away.

    What passes between them is not seen here: the cookie is wrong, too, if QEMU drops the connection at once.

    :param timeout: seconds until the connection must stand.
    :raise AlreadyHooked: QEMU has such an object already.
    :raise AttachError: nobody listens there, QEMU may not reach it, or drops the connection; or see its branches.
    """
    with open_monitor(target) as monitor:
        _require_free(monitor)
        with _added(monitor, os.path.abspath(path), cookie) as keep:
            _await_connection(monitor, target, path, timeout)
            keep.pop_all()


def remove_object(target: Target, timeout: float) -> None:
    """Take the object away, and what belongs to it. QEMU first asks the introspector, by the UNHOOK event, to close.

    :param timeout: seconds that it has for that. Nobody but it, or QEMU's end, can end the session.
    :raise NotHooked: QEMU has no object of ours.
    :raise AttachError: the introspector does not close; or see its branches.
    """
    with open_monitor(target) as monitor:
        if OBJECT not in _objects(monitor):
            raise NotHooked(f"{target.name} is not being introspected: its QEMU has no object {OBJECT}")
        _remove(monitor, timeout)


def leave_object(target: Target, timeout: float = 10.0) -> None:
    """The same, for who has closed the session. A QEMU that has ended, or whose object someone else removed, will do.

    :raise AttachError: the object stays: someone else has connected.
    """
    with suppress(NotHooked, MonitorUnreachable):
        remove_object(target, timeout)


@contextmanager
def _understood() -> Iterator[None]:
    """What QEMU returns has the shape that QMP says. As a decorator, for all that a function makes of it."""
    try:
        yield
    except (LookupError, TypeError, AttributeError) as error:
        raise MonitorUnreachable(f"QEMU's monitor returns what QMP does not know: {error!r}: is it a QEMU?") from error


@_understood()
def _require_object(monitor: Monitor) -> None:
    types = monitor.execute("qom-list-types", {"implements": "user-creatable", "abstract": False})
    if TYPE not in {item.get("name") for item in types}:
        raise AttachRefused(
            f"QEMU {'.'.join(map(str, _version(monitor)))} has no {TYPE!r} object: start the VM with KVM-VMI's QEMU, or"
            " load the kvmi modules, which need no such QEMU"
        )


def _require_free(monitor: Monitor) -> None:
    """QEMU knows the object, and has none; what is left of a session whose introspector has gone is removed."""
    _require_object(monitor)
    for name in _objects(monitor):
        chardev = str(monitor.execute("qom-get", {"path": f"/objects/{name}", "property": "chardev"}))
        leads_to, connected = _connection(monitor, chardev)
        if name != OBJECT:
            raise AlreadyHooked(f"QEMU was started with an introspection object ({name}): it connects to {leads_to!r}")
        if connected:
            raise AlreadyHooked(f"the VM is being introspected already, over {leads_to!r}: detach first")
        _remove(monitor, timeout=1.0)


@_understood()
def _objects(monitor: Monitor) -> list[str]:
    """The ids of QEMU's introspection objects."""
    try:
        children = monitor.execute("qom-list", {"path": "/objects"})
    except MonitorRefused as error:
        if error.kind == "DeviceNotFound":  # the folder is made with the first object
            return []
        raise
    return [child["name"] for child in children if child.get("type") == f"child<{TYPE}>"]


@_understood()
def _connection(monitor: Monitor, chardev: str) -> tuple[str, bool]:
    """Where a character device leads to, and whether it is connected."""
    for known in monitor.execute("query-chardev"):
        if known.get("label") == chardev:
            leads_to = str(known.get("filename"))
            return leads_to.removeprefix("disconnected:"), not leads_to.startswith("disconnected:")
    return f"character device {chardev}", False


@_understood()
def _version(monitor: Monitor) -> tuple[int, int, int]:
    version = monitor.execute("query-version")["qemu"]
    return version["major"], version["minor"], version["micro"]


@contextmanager
def _added(monitor: Monitor, path: str, cookie: bytes | None) -> Iterator[ExitStack]:
    """The object, connecting to `path`. It is removed at the end unless the block empties the stack."""
    flat = _version(monitor) >= _FLAT_SINCE

    def add(kind: str, name: str, **properties: str) -> None:
        rest: dict[str, object] = {**properties} if flat else {"props": properties}
        monitor.execute("object-add", {"qom-type": kind, "id": name, **rest})

    address = {"type": "unix", "data": {"path": path}}
    backend = {"type": "socket", "data": {"addr": address, "server": False, "reconnect": RECONNECT}}
    with ExitStack() as undo:
        monitor.execute("chardev-add", {"id": CHARDEV, "backend": backend})
        undo.callback(_undo, monitor, "chardev-remove", CHARDEV)
        if cookie is not None:
            add("secret", SECRET, data=b64encode(cookie).decode(), format="base64")
            undo.callback(_undo, monitor, "object-del", SECRET)
        add(TYPE, OBJECT, chardev=CHARDEV, **({"key": SECRET} if cookie is not None else {}))
        undo.callback(_undo, monitor, "object-del", OBJECT)
        yield undo


def _undo(monitor: Monitor, command: str, name: str) -> None:
    """Undo a step. What went wrong before is what counts: a refusal is passed over, and a lost monitor, too."""
    with suppress(MonitorRefused, MonitorUnreachable):
        _delete(monitor, command, name, timeout=2.0)


def _remove(monitor: Monitor, timeout: float) -> None:
    _delete(monitor, "object-del", OBJECT, timeout)
    _delete(monitor, "object-del", SECRET, timeout)
    _delete(monitor, "chardev-remove", CHARDEV, timeout)


def _delete(monitor: Monitor, command: str, name: str, timeout: float) -> None:
    """Remove something that may be in use for a while; what is not there is removed."""
    deadline = monotonic() + timeout
    while True:
        try:
            monitor.execute(command, {"id": name})
        except MonitorRefused as error:
            if "not found" in error.description:
                return
            if monotonic() >= deadline:
                raise AttachError(
                    f"{name} is still in use after {timeout:g} s ({error.description}): the introspector has not closed"
                    " the session: end it"
                ) from error
        else:
            return
        sleep(_POLL)


def _await_connection(monitor: Monitor, target: Target, path: str, timeout: float) -> None:
    now = monotonic()
    deadline, since = now + timeout, now
    while True:
        if not _connection(monitor, CHARDEV)[1]:
            since = monotonic()
        if monotonic() - since >= _SETTLED:
            return
        if monotonic() >= deadline + _SETTLED:
            raise AttachError(
                f"QEMU has no connection to {path} after {timeout:g} s: nobody listens there, the introspector dropped"
                f" it, or its cookie is wrong{_confinement(target, path)}"
            )
        sleep(_POLL)


@contextmanager
def _listening_for(target: Target) -> Iterator[tuple[str, socket.socket]]:
    """A socket of ours that this VM's QEMU can connect to, and nobody else but root."""
    user = _user_of(target.pid)
    folder = _RUN if os.geteuid() == 0 else Path(os.environ.get("XDG_RUNTIME_DIR") or "/tmp") / "kvmi-host"
    folder.mkdir(mode=0o755, exist_ok=True)
    path = folder / f"{target.pid}-{os.urandom(4).hex()}.sock"
    listening = listen_at(path)
    try:
        if user != os.geteuid():
            try:
                os.chown(path, user, -1)
            except PermissionError:
                raise AttachRefused(f"QEMU runs as user {user}, who cannot reach our socket: run as root") from None
        yield os.fspath(path), listening
    finally:
        listening.close()
        path.unlink(missing_ok=True)


def _accept(listening: socket.socket, target: Target, path: str, timeout: float) -> socket.socket:
    listening.settimeout(timeout)
    try:
        sock, _ = listening.accept()
    except TimeoutError:
        raise AttachRefused(
            f"QEMU (process {target.pid}) did not connect to {path} in {timeout:g} s{_confinement(target, path)}"
        ) from None
    try:
        check_user(sock, {_user_of(target.pid)})
        pid, _ = peer_of(sock)
        if pid != target.pid:
            raise AttachError(f"process {pid} connected to {path}, not QEMU's ({target.pid}): try again")
    except BaseException:
        sock.close()
        raise
    return sock


def _user_of(pid: int) -> int:
    try:
        status = (_PROC / str(pid) / "status").read_text()
    except OSError:
        raise AttachError(f"process {pid} has ended") from None
    return int(next(line for line in status.splitlines() if line.startswith("Uid:")).split()[2])


def _confinement(target: Target, path: str) -> str:
    """What to do where AppArmor may be what keeps QEMU from the socket; empty where QEMU is not confined."""
    try:
        label = (_PROC / str(target.pid) / "attr/current").read_text().strip(" \n\0")
    except OSError:
        return ""
    if not label or label.startswith("unconfined"):
        return ""
    return (
        f": AppArmor confines QEMU ({label}): if the kernel's log has a denial, allow it with the line `{path} rw,` in"
        " /etc/apparmor.d/local/abstractions/libvirt-qemu"
    )
