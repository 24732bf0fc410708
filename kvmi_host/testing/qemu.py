# SPDX-License-Identifier: LGPL-2.1-or-later
"""A simulated QEMU of the KVM-VMI project: a monitor, its ``introspection`` object, and a simulated kernel behind it.

The object does what QEMU's does: it connects to the introspector, says which VM it is, drops one that does not know the
secret or takes too long, hands the others to the kernel, and connects again after a while when the connection ends.
What it refuses, it refuses in QEMU's words. ``python -m kvmi_host.testing.qemu -qmp unix:PATH,server=on ...`` is a
process of its own, with QEMU's command line.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from uuid import UUID

from kvmi_host.introspect.greeting import introduce
from kvmi_host.protocol import EventId, Hello, ProtocolError
from kvmi_host.testing.peer import SimulatedKernel

_TYPES = ("secret", "tls-creds-x509", "iothread")
_OBJECT = "introspection"
_FLAT_SINCE = (6, 0, 0)
_UUID = UUID(int=7)


class Refusal(Exception):
    """A command's error; its class is GenericError unless said."""

    def __init__(self, description: str, kind: str = "GenericError") -> None:
        super().__init__(description)
        self.kind = kind


@dataclass
class Chardev:
    """A character device that connects to a UNIX socket."""

    path: str
    reconnect: float
    user: Introspection | None = None

    @property
    def filename(self) -> str:
        connected = self.user is not None and self.user.connected
        return ("" if connected else "disconnected:") + f"unix:{self.path}"


class Introspection:
    """The object, with its VM's kernel. A thread of its own connects, again and again.

    :ivar kernel: the kernel end of the session, if there is one.
    :ivar drops: why connections ended before there was a session.
    """

    def __init__(self, chardev: Chardev, hello: Hello, cookie: bytes | None, timeout: float) -> None:
        self.chardev = chardev
        self.kernel: SimulatedKernel | None = None
        self.drops: list[str] = []
        self.connected = False
        self._hello = hello
        self._cookie = cookie
        self._timeout = timeout
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._connect, name="qemu-introspection", daemon=True)
        self._thread.start()

    def await_session(self, after: SimulatedKernel | None = None, timeout: float = 10.0) -> SimulatedKernel:
        """The kernel end of a session; of another one than `after`.

        :raise TimeoutError: there is none.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.kernel not in {None, after}, timeout):
                raise TimeoutError(f"no session; dropped: {self.drops}")
            assert self.kernel
            return self.kernel

    def await_drop(self, timeout: float = 10.0) -> str:
        """Why the first connection was dropped.

        :raise TimeoutError: none was.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.drops, timeout):
                raise TimeoutError("no connection was dropped")
            return self.drops[0]

    def unhook(self) -> bool:
        """Ask the introspector to close. False: there is none."""
        with self._changed:
            kernel = self.kernel
        if kernel is None or kernel.why:
            return self.connected
        if kernel.enabled(EventId.UNHOOK):
            kernel.fire(EventId.UNHOOK)
        return True

    def end(self) -> None:
        """No more connections."""
        with self._changed:
            self._over.set()
            self._end_if_over(self.kernel)
        self._thread.join(10)

    def _end_if_over(self, kernel: SimulatedKernel | None) -> None:
        if kernel and self._over.is_set():
            kernel.end("QEMU removed the object")

    def _connect(self) -> None:
        while not self._over.is_set():
            with socket.socket(socket.AF_UNIX) as sock:
                try:
                    sock.connect(self.chardev.path)
                    self.connected = True
                    introduce(sock, self._hello, self._cookie, self._timeout)
                except (OSError, ProtocolError) as error:
                    self._note(str(error))
                else:
                    self._serve(sock)
                self.connected = False
            self._over.wait(self.chardev.reconnect)

    def _serve(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        with SimulatedKernel(sock, vcpus=2) as kernel:
            with self._changed:
                self.kernel = kernel
                self._changed.notify_all()
                self._end_if_over(kernel)  # that came while the handshake was under way
            kernel.wait_ended(threading.TIMEOUT_MAX)
            with self._changed:
                self.kernel = None
                self._changed.notify_all()

    def _note(self, why: str) -> None:
        with self._changed:
            self.drops.append(why)
            self._changed.notify_all()


@dataclass
class SimulatedQemu:
    """QEMU's monitor at a UNIX socket, one client at a time.

    :ivar version: decides how object-add takes its arguments.
    :ivar knows_object: without, it is a stock QEMU.
    :ivar handshake_timeout: seconds that an introspector has for its answer.
    :ivar refuse: by command (and, after a blank, what ``id`` it is for), the words with which it fails.
    :ivar commands: those that were carried out or refused, in order.
    :ivar reconnect: seconds, in place of what the character device is told.
    """

    path: str
    uuid: UUID = _UUID
    name: str = "webserver"
    version: tuple[int, int, int] = (4, 2, 1)
    knows_object: bool = True
    handshake_timeout: float = 10.0
    reconnect: float | None = None
    refuse: dict[str, str] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    chardevs: dict[str, Chardev] = field(default_factory=dict)
    secrets: dict[str, bytes] = field(default_factory=dict)
    objects: dict[str, Introspection] = field(default_factory=dict)
    _had_objects: bool = False

    def __enter__(self) -> Self:
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(self.path)
        self._listening.listen(1)
        self._thread = threading.Thread(target=self.serve, name="qemu-monitor", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """End, and with it the session. May be called again."""
        if self._listening.fileno() < 0:
            return
        self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listening.close()
        for introspection in self.objects.values():
            introspection.end()

    @property
    def introspection(self) -> Introspection:
        """The object there is."""
        (only,) = self.objects.values()
        return only

    def serve(self) -> None:
        """Serve one client after the other, until the socket is shut down."""
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            with client:
                try:
                    self._converse(client)
                except OSError:
                    continue  # the client went away

    # -- QMP

    def _converse(self, client: socket.socket) -> None:
        def say(message: Mapping[str, object]) -> None:
            client.sendall(json.dumps(message).encode() + b"\r\n")

        say({"QMP": {"version": self._version(), "capabilities": []}})
        for request in _requests(client):
            reference = {"id": request["id"]} if "id" in request else {}
            try:
                say({"return": self._execute(request["execute"], request.get("arguments", {})), **reference})
            except Refusal as refusal:
                say({"error": {"class": refusal.kind, "desc": str(refusal)}, **reference})

    def _execute(self, command: str, arguments: dict[str, Any]) -> object:
        name = arguments.get("id")
        self.commands.append(f"{command} {name}" if name else command)
        for key in (command, f"{command} {name}"):
            if key in self.refuse:
                raise Refusal(self.refuse[key])
        commands: dict[str, Callable[..., object]] = {
            "qmp_capabilities": lambda **_: {},
            "query-version": lambda: self._version(),
            "query-status": lambda: {"status": "running", "singlestep": False, "running": True},
            "qom-list-types": self._types,
            "qom-list": self._children,
            "qom-get": self._property,
            "query-chardev": self._query_chardev,
            "chardev-add": self._chardev_add,
            "chardev-remove": self._chardev_remove,
            "object-add": self._object_add,
            "object-del": self._object_del,
        }
        if command not in commands:
            raise Refusal(f"The command {command} has not been found", "CommandNotFound")
        return commands[command](**{key.replace("-", "_"): value for key, value in arguments.items()})

    def _version(self) -> dict[str, object]:
        return {"qemu": dict(zip(("major", "minor", "micro"), self.version, strict=True)), "package": "simulated"}

    def _types(self, implements: str, abstract: bool) -> list[dict[str, str]]:
        assert (implements, abstract) == ("user-creatable", False)
        return [{"name": name} for name in (*_TYPES, *([_OBJECT] if self.knows_object else []))]

    def _children(self, path: str) -> list[dict[str, str]]:
        assert path == "/objects"
        if not self._had_objects:
            raise Refusal("Device '/objects' not found", "DeviceNotFound")
        children = {**dict.fromkeys(self.secrets, "secret"), **dict.fromkeys(self.objects, _OBJECT)}
        listed = [{"name": name, "type": f"child<{kind}>"} for name, kind in children.items()]
        return [{"name": "type", "type": "string"}, *listed]

    def _property(self, path: str, property: str) -> str:  # noqa: A002 - QMP's name
        assert property == "chardev"
        chardev = self.objects[path.removeprefix("/objects/")].chardev
        return next(name for name, known in self.chardevs.items() if known is chardev)

    def _query_chardev(self) -> list[dict[str, object]]:
        return [
            {"label": name, "filename": chardev.filename, "frontend-open": chardev.user is not None}
            for name, chardev in self.chardevs.items()
        ]

    def _chardev_add(self, id: str, backend: dict[str, Any]) -> object:  # noqa: A002 - QMP's name
        if id in self.chardevs:
            raise Refusal(f"Chardev with id '{id}' already exists")
        data = backend["data"]
        assert (backend["type"], data["addr"]["type"], data["server"]) == ("socket", "unix", False)
        reconnect = data["reconnect"] if self.reconnect is None else self.reconnect
        self.chardevs[id] = Chardev(data["addr"]["data"]["path"], reconnect)
        return {}

    def _chardev_remove(self, id: str) -> object:  # noqa: A002 - QMP's name
        if id not in self.chardevs:
            raise Refusal(f"Chardev '{id}' not found")
        if self.chardevs[id].user:
            raise Refusal(f"Chardev '{id}' is busy")
        del self.chardevs[id]
        return {}

    def _object_add(self, qom_type: str, id: str, **properties: Any) -> object:  # noqa: A002 - QMP's name
        flat = self.version >= _FLAT_SINCE
        if flat and "props" in properties:
            raise Refusal("Parameter 'props' is unexpected")
        if not flat and (unexpected := set(properties) - {"props"}):
            raise Refusal(f"Parameter '{min(unexpected)}' is unexpected")
        values = properties if flat else properties.get("props", {})
        if qom_type not in (*_TYPES, *([_OBJECT] if self.knows_object else [])):
            raise Refusal(
                f"Parameter 'qom-type' does not accept value '{qom_type}'"
                if flat
                else f"invalid object type: {qom_type}"
            )
        if id in self.secrets or id in self.objects:
            raise Refusal(f"attempt to add duplicate property '{id}' to object (type 'container')")
        self._had_objects = True
        if qom_type == "secret":
            assert values["format"] == "base64"
            self.secrets[id] = b64decode(values["data"])
            return {}
        self._add_introspection(id, **values)
        return {}

    def _add_introspection(self, name: str, chardev: str, key: str | None = None) -> None:
        if chardev not in self.chardevs:
            raise Refusal(f"Chardev '{chardev}' not found")
        if key is not None and key not in self.secrets:
            raise Refusal(f"No secret with id '{key}'")
        backend = self.chardevs[chardev]
        cookie = self.secrets[key] if key is not None else None
        hello = Hello(self.uuid, 1_700_000_000, self.name)
        backend.user = self.objects[name] = Introspection(backend, hello, cookie, self.handshake_timeout)

    def _object_del(self, id: str) -> object:  # noqa: A002 - QMP's name
        if self.secrets.pop(id, None) is not None:
            return {}
        if id not in self.objects:
            raise Refusal(f"object '{id}' not found")
        introspection = self.objects[id]
        if introspection.unhook():
            raise Refusal(f"object '{id}' is in use, can not be deleted")
        del self.objects[id]
        introspection.chardev.user = None
        introspection.end()
        return {}


def _requests(client: socket.socket) -> Iterator[dict[str, Any]]:
    """JSON objects one after the other: nothing has to be between them."""
    text = ""
    while data := client.recv(65536):
        text = (text + data.decode()).lstrip()
        while text:
            try:
                request, end = json.JSONDecoder().raw_decode(text)
            except ValueError:
                break  # the rest is to come
            text = text[end:].lstrip()
            yield request


def _value(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def main(words: list[str]) -> None:
    """Be a QEMU with this command line, until standard input ends. Says "ready" when its monitor listens."""
    path = _value(words, "-qmp").removeprefix("unix:").split(",")[0]
    name = _value(words, "-name").removeprefix("guest=")
    with SimulatedQemu(path, UUID(_value(words, "-uuid")), name, knows_object="-stock" not in words):
        os.write(1, b"ready\n")
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1:])
