# SPDX-License-Identifier: LGPL-2.1-or-later
"""Giving a VM's session to someone else: an introspector that listens, or a program started for it."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from kvmi_host.attach.errors import AttachError
from kvmi_host.attach.policy import Policy
from kvmi_host.attach.session import hand_to_kernel
from kvmi_host.attach.target import Target
from kvmi_host.introspect.greeting import introduce
from kvmi_host.protocol import Hello

_FIRST_PASSED_FD = 3  # SD_LISTEN_FDS_START of sd_listen_fds(3)


def hand_over(target: Target, path: str, rules: Policy, *, cookie: bytes | None = None, timeout: float = 10.0) -> None:
    """Connect to an introspector that listens on the UNIX socket `path`, as KVM-VMI's QEMU would, and leave them alone.

    :param cookie: the secret that the introspector must know; None where none is set.
    :param timeout: seconds for its side of the handshake.
    :raise AttachError: nobody listens there; or see its branches.
    :raise HandshakeError: the introspector is silent or has another secret.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        try:
            sock.connect(path)
        except OSError as error:
            raise AttachError(f"{path}: no introspector listens there: {error}") from error
        introduce(sock, Hello(target.uuid, target.start_time, target.name), cookie, timeout)
        sock.setblocking(True)
        hand_to_kernel(target, sock, rules)


def run_with_session(target: Target, command: Sequence[str], rules: Policy) -> int:
    """Run a program with the connected socket passed as in systemd's socket activation, and wait for it.

    The program finds LISTEN_FDS=1, LISTEN_FDNAMES=kvmi, its own LISTEN_PID, and the socket as descriptor 3. No
    handshake takes place: KVM speaks at once.

    :return: its exit status, or minus the number of the signal that ended it.
    :raise AttachError: see its branches.
    """
    theirs, kernels = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        with kernels:
            hand_to_kernel(target, kernels, rules)
        child = os.fork()
        if child == 0:
            _become(command, theirs.fileno())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _become(command: Sequence[str], fd: int) -> None:
    environment = {**os.environ, "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "kvmi"}
    try:
        if fd == _FIRST_PASSED_FD:
            os.set_inheritable(fd, True)
        else:
            os.dup2(fd, _FIRST_PASSED_FD)
        os.execvpe(command[0], list(command), environment)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)
