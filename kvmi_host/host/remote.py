# SPDX-License-Identifier: LGPL-2.1-or-later
"""Commands on another host by SSH, with the user's own configuration, keys, agent and known hosts.

    with connect("root@lab7") as remote:
        remote.run("uname -r")

A host whose key is not known is not connected to: nothing is asked, and nothing is learned.
"""

from __future__ import annotations

import logging
import select
import socket
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import paramiko

from kvmi_host.host.errors import RemoteError
from kvmi_host.host.printable import printable
from kvmi_host.host.ssh_config import Destination, read_config, resolve

KEEPALIVE = 5
"""Seconds after which a connection that is silent says something: what forgets idle connections keeps it, and an
emulated host that waits for a lost interrupt of its timer gets another (docs/emulators.md)."""

_MOST_JUMPS = 8
_TICK = 1.0  # seconds between two looks at the clock
# It would write what it raises to standard error, too.
logging.getLogger("paramiko").addHandler(logging.NullHandler())


class Remote:
    """An SSH connection, and those that lead to it. Made by :func:`connect`."""

    def __init__(self, client: paramiko.SSHClient, stack: ExitStack) -> None:
        self._client = client
        self._stack = stack

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection. May be called again."""
        self._stack.close()

    def run(
        self, line: str, *, stdin: bytes = b"", deadline: float = 120, most: int = 1 << 20
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a line of the shell there, and wait until it ends, however it does.

        :param stdin: what it reads from standard input.
        :param deadline: seconds that it may take.
        :param most: bytes that it may write to either stream.
        :raise RemoteError: the connection broke, the deadline passed, or it wrote more.
        """
        return execute(self._transport(line), line, stdin=stdin, deadline=deadline, most=most)

    def stream(self, line: str, *, stdin: bytes = b"", tick: float = 1) -> Generator[Piece, None, None]:
        """Run a line of the shell there, and give what it writes as it comes: see :func:`stream`."""
        return stream(self._transport(line), line, stdin=stdin, tick=tick)

    def _transport(self, line: str) -> paramiko.Transport:
        transport = self._client.get_transport()
        if transport is None:
            raise RemoteError(f"`{line}`: the SSH connection is closed")
        return transport


class Piece(NamedTuple):
    """What came of a command since the last piece; nothing, if nothing came for a while. The last one has its exit
    status."""

    stdout: bytes
    stderr: bytes
    status: int | None = None


def execute(
    transport: paramiko.Transport,
    line: str,
    *,
    stdin: bytes | None = None,
    deadline: float,
    most: int | None = None,
    on_output: Callable[[bytes], None] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a line of the shell on a connection, and wait until it ends: see :meth:`Remote.run`.

    :param on_output: called with each piece of output, of both streams, as it comes.
    """
    until = time.monotonic() + deadline
    stdout, stderr = bytearray(), bytearray()
    status = None
    with closing(stream(transport, line, stdin=stdin, opening=deadline, tick=min(_TICK, deadline))) as pieces:
        for piece in pieces:
            stdout += piece.stdout
            stderr += piece.stderr
            status = piece.status
            if most is not None and max(len(stdout), len(stderr)) > most:
                raise RemoteError(f"`{line}` wrote more than {most} bytes")
            for part in filter(None, (piece.stdout, piece.stderr)):
                if on_output:
                    on_output(part)
            if status is None and time.monotonic() >= until:
                raise RemoteError(f"`{line}` did not end within {deadline:g} s{said(stderr)}")
    assert status is not None  # the last piece has it
    return subprocess.CompletedProcess(line, status, bytes(stdout), bytes(stderr))


def stream(
    transport: paramiko.Transport, line: str, *, stdin: bytes | None = None, opening: float = 30, tick: float = 1
) -> Generator[Piece, None, None]:
    """Run a line of the shell on a connection, and give what it writes as it comes. Closing the generator leaves it.

    :param stdin: what it reads from standard input.
    :param opening: seconds until it must have been started.
    :param tick: seconds after which there is a piece in any case.
    :raise RemoteError: the connection broke.
    """
    try:
        with transport.open_session(timeout=opening) as channel:
            channel.settimeout(opening)
            channel.exec_command(line)
            if stdin is not None:
                channel.sendall(stdin)
            channel.shutdown_write()
            while True:
                # Asked before reading: what came before the end is read below.
                ended = channel.eof_received
                stdout = stderr = b"nothing yet"
                while stdout or stderr:
                    stdout = channel.recv(65536) if channel.recv_ready() else b""
                    stderr = channel.recv_stderr(65536) if channel.recv_stderr_ready() else b""
                    if stdout or stderr:
                        yield Piece(stdout, stderr)
                if ended and channel.status_event.wait(tick):
                    break
                if not transport.is_active():
                    raise RemoteError(f"the SSH connection ended during `{line}`: the host is gone, or its sshd")
                yield Piece(b"", b"")
                select.select([channel], [], [], tick)
            yield Piece(b"", b"", channel.recv_exit_status())
    except (OSError, EOFError, paramiko.SSHException) as error:
        raise RemoteError(f"the SSH connection broke during `{line}`: {type(error).__name__}: {error}") from error


def said(stream: bytes | bytearray) -> str:
    """The end of a command's output for an error message."""
    text = printable(stream.decode(errors="replace"))
    return ": " + "\n".join(text.splitlines()[-20:]) if text else ", and it said nothing"


def connect(name: str, config: Path | None = None, deadline: float = 30) -> Remote:
    """Connect to a host, through others if its configuration says so.

    :param name: ``[USER@]HOST[:PORT]``, or a name of the configuration.
    :param config: a file instead of ~/.ssh/config, as ``ssh -F``.
    :param deadline: seconds until the host, and those before it, must have let us in.
    :raise RemoteError: and why not, and what to do.
    """
    settings = read_config(config)
    stack = ExitStack()
    try:
        route = _Route(settings, stack, time.monotonic() + deadline, deadline)
        return Remote(route.client(resolve(name, settings)), stack)
    except BaseException:
        stack.close()
        raise


class _Route:
    """The connections that lead to a host, all in one time."""

    def __init__(self, config: str, stack: ExitStack, until: float, deadline: float) -> None:
        self._config, self._stack, self._until, self._deadline = config, stack, until, deadline
        self._clients = 0

    def _left(self) -> float:
        """Seconds, and never none: whatever takes them says that the deadline has passed."""
        return max(0.1, self._until - time.monotonic())

    def client(self, to: Destination, before: paramiko.SSHClient | None = None) -> paramiko.SSHClient:
        """A connection to a host that let us in.

        :param before: the host to go through; by default what its configuration says.
        """
        self._clients += 1
        if self._clients > _MOST_JUMPS:
            raise RemoteError(f"{to.name}: more than {_MOST_JUMPS} jumps: does ProxyJump lead in a circle?")
        if before is None:
            for jump in to.jumps:
                before = self.client(resolve(jump, self._config), before)
        client = paramiko.SSHClient()
        _load_known_hosts(client, to)
        client.set_missing_host_key_policy(_Refuse(to))
        way = self._way(to, before)
        self._stack.callback(client.close)
        self._log_in(client, to, way)
        _check_revoked(client, to)
        transport = client.get_transport()
        assert transport is not None  # it let us in
        transport.set_keepalive(KEEPALIVE)
        return client

    def _way(self, to: Destination, before: paramiko.SSHClient | None) -> paramiko.Channel | socket.socket:
        """What leads to a host's SSH server."""
        if before is not None:
            transport = before.get_transport()
            assert transport is not None  # it let us in
            try:
                return transport.open_channel(
                    "direct-tcpip", (to.host, to.port), ("127.0.0.1", 0), timeout=self._left()
                )
            except (EOFError, OSError, paramiko.SSHException) as error:
                raise RemoteError(f"{to}: the host before it does not lead there: {printable(str(error))}") from error
        try:
            if to.command is not None:
                return self._proxy(to.command)
            way = socket.create_connection((to.host, to.port), timeout=self._left())
        except socket.gaierror as error:
            raise RemoteError(f"{to.name}: no address of {to.host}: {error.strerror}: is the name right?") from error
        except ConnectionRefusedError as error:
            raise RemoteError(f"{to}: connection refused: does sshd run there, on that port?") from error
        except TimeoutError as error:
            raise RemoteError(
                f"{to}: no answer within {self._deadline:g} s: is it up, or a firewall before it?"
            ) from error
        except OSError as error:
            raise RemoteError(f"{to}: {error.strerror or error}") from error
        self._stack.callback(way.close)
        return way

    def _proxy(self, command: str) -> socket.socket:
        """A program whose standard streams are the connection, run as ssh runs it."""
        ours, its = socket.socketpair()
        self._stack.callback(ours.close)
        with its:
            process = subprocess.Popen(["/bin/sh", "-c", f"exec {command}"], stdin=its.fileno(), stdout=its.fileno())
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return ours

    def _log_in(self, client: paramiko.SSHClient, to: Destination, way: paramiko.Channel | socket.socket) -> None:
        """Check the host's key, and show ours."""
        identities = [path for path in to.identities if path.is_file()]
        left = self._left()
        try:
            client.connect(
                # The name that its key is looked up by: the connection is there.
                to.key_name,
                sock=way,
                username=to.user,
                pkey=_from_agent(identities) if to.agent and to.identities_only else None,
                key_filename=[str(path) for path in identities],  # type: ignore[arg-type]  # a list may be given, too
                allow_agent=to.agent and not to.identities_only,
                look_for_keys=not to.identities,
                timeout=left,
                banner_timeout=left,
                auth_timeout=left,
                channel_timeout=left,
            )
        except paramiko.BadHostKeyException as error:
            raise RemoteError(
                f"THE KEY OF {to} HAS CHANGED: it shows {error.key.fingerprint}, and known is"
                f" {error.expected_key.fingerprint}. Someone may be in between: ask the host's owner. If it was made"
                f" anew, ssh-keygen -R '{to.key_name}'. Not connecting"
            ) from error
        except (EOFError, OSError, ValueError, paramiko.SSHException) as error:
            # Whatever it was that waited in vain: paramiko has another error for each.
            if time.monotonic() >= self._until:
                raise RemoteError(f"{to}: no answer within {self._deadline:g} s: is that an SSH server?") from error
            if isinstance(error, paramiko.AuthenticationException) or "No authentication methods" in str(error):
                raise RemoteError(_not_let_in(to, identities)) from error
            raise RemoteError(f"{to}: no SSH connection: {printable(str(error))}") from error


def _check_revoked(client: paramiko.SSHClient, to: Destination) -> None:
    """sshd(8): a line ``@revoked NAMES KIND KEY``. paramiko passes it over, and so does this its names."""
    transport = client.get_transport()
    assert transport is not None  # it let us in
    key = transport.get_remote_server_key().get_base64()
    for file in filter(Path.exists, to.known_hosts):
        for line in file.read_text(errors="replace").splitlines():
            if line.startswith("@revoked") and key in line.split():
                raise RemoteError(f"THE KEY OF {to} WAS REVOKED, says {file}: ask the host's owner. Not connecting")


class _Refuse(paramiko.MissingHostKeyPolicy):
    """Takes no key that is not known."""

    def __init__(self, to: Destination) -> None:
        self._to = to

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        to = self._to
        raise RemoteError(
            f"{to}: its key is not known ({key.get_name()} {key.fingerprint}): compare that with the host's own, and"
            f" connect once with `ssh {to.name}`, or add what ssh-keyscan -p {to.port} {to.host} says to"
            f" {to.known_hosts[0]}"
        )


def _load_known_hosts(client: paramiko.SSHClient, to: Destination) -> None:
    keys = client.get_host_keys()
    for file in to.known_hosts:
        try:
            keys.load(str(file))
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError, paramiko.hostkeys.InvalidHostKey) as error:
            raise RemoteError(f"the keys of known hosts cannot be read: {file}: {error}") from error


def _from_agent(identities: list[Path]) -> paramiko.PKey | None:
    """The first of these keys that the agent holds, by the file of the public one that is beside it."""
    wanted = set()
    for path in identities:
        with suppress(OSError, IndexError):
            wanted.add(Path(f"{path}.pub").read_text().split()[1])
    if not wanted:
        return None
    return next((key for key in paramiko.Agent().get_keys() if key.get_base64() in wanted), None)


def _not_let_in(to: Destination, identities: list[Path]) -> str:
    """Why a host did not take our keys."""
    defaults = (path for path in Path("~/.ssh").expanduser().glob("id_*") if path.suffix != ".pub")
    candidates = identities or sorted(defaults)
    locked = [path for path in candidates if _is_encrypted(path)]
    tried = [str(path) for path in candidates if path not in locked] + ["the agent's"] * to.agent
    advice = "".join(f"; {path} has a passphrase: ssh-add {path}" for path in locked)
    keys = ", ".join(tried) or "none"
    advice = advice or f"; is one of them in its authorized_keys? ssh-copy-id {to.name}"
    return f"{to} does not let us in with these keys: {keys}{advice}"


def _is_encrypted(path: Path) -> bool:
    try:
        paramiko.PKey.from_path(path)
    except (TypeError, paramiko.PasswordRequiredException):  # a TypeError is cryptography's way to say it
        return True
    except (OSError, ValueError, paramiko.SSHException):
        return False
    return False
