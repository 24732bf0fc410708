# SPDX-License-Identifier: LGPL-2.1-or-later
"""Commands on a host over one SSH connection that stays open, to a host whose key is known beforehand."""

from __future__ import annotations

import shlex
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import paramiko

from kvmi_host.host.errors import RemoteError
from kvmi_host.host.remote import KEEPALIVE, execute, said
from kvmi_host.lab.errors import LabError


def configuration(name: str, port: int, key: Path, known_hosts: Path, patience: int) -> str:
    """What OpenSSH needs to reach an emulated host as root.

    :param name: what it is called there, and in `known_hosts`.
    :param port: of 127.0.0.1.
    :param patience: seconds that it may be silent.
    """
    return (
        f"Host {name}\nHostName 127.0.0.1\nPort {port}\nUser root\nHostKeyAlias {name}\n"
        f"IdentityFile {key}\nIdentitiesOnly yes\n"
        f"UserKnownHostsFile {known_hosts}\nGlobalKnownHostsFile /dev/null\nStrictHostKeyChecking yes\n"
        f"ServerAliveInterval {KEEPALIVE}\nServerAliveCountMax {patience // KEEPALIVE}\nLogLevel ERROR\n"
    )


class Shell:
    """An SSH connection.

    :param port: where 127.0.0.1 leads to the host's SSH server.
    :param key: the private key's file.
    :param known_hosts: a file with the host's own key; any other key is refused.
    :param deadline: seconds until the host must have let us in.
    :raise LabError: when it does not.
    """

    def __init__(self, port: int, key: Path, known_hosts: Path, deadline: float = 30) -> None:
        name, kind, blob = known_hosts.read_text().split()[:3]
        until = time.monotonic() + deadline
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=deadline)
            self._transport = paramiko.Transport(connection)
            self._transport.banner_timeout = self._transport.auth_timeout = deadline
            self._transport.start_client(timeout=max(1.0, until - time.monotonic()))
            theirs = self._transport.get_remote_server_key()
            if (theirs.get_name(), theirs.get_base64()) != (kind, blob):
                raise LabError(f"what answers on port {port} is not {name}: its SSH key is another. Not connecting")
            self._transport.auth_publickey("root", paramiko.Ed25519Key.from_private_key_file(str(key)))
            self._transport.set_keepalive(KEEPALIVE)
        except (OSError, EOFError, paramiko.SSHException) as error:
            self.close()
            raise LabError(f"no SSH connection to {name} on port {port} within {deadline:g} s: {error}") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the connection."""
        if hasattr(self, "_transport"):
            self._transport.close()

    def run(
        self,
        argv: Sequence[str] | str,
        *,
        stdin: bytes | None = None,
        deadline: float = 120,
        check: bool = True,
        on_output: Callable[[str], None] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command there and wait until it ends.

        :param argv: program and arguments, or a line for the shell.
        :param stdin: what it reads from standard input.
        :param deadline: seconds that it may take.
        :param check: whether an exit status other than 0 is an error.
        :param on_output: called with each piece of output, of both streams, as it comes.
        :raise LabError: when the connection breaks, the deadline passes, or (with ``check``) the command fails.
        """
        line = argv if isinstance(argv, str) else shlex.join(argv)
        shown = (lambda piece: on_output(piece.decode(errors="replace"))) if on_output else None
        try:
            done = execute(self._transport, line, stdin=stdin, deadline=deadline, on_output=shown)
        except RemoteError as error:
            raise LabError(str(error)) from error
        if check and done.returncode:
            raise LabError(f"`{line}` failed with status {done.returncode}{said(done.stderr or done.stdout)}")
        stdout, stderr = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr))
        return subprocess.CompletedProcess(line, done.returncode, stdout, stderr)
