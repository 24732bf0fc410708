# SPDX-License-Identifier: LGPL-2.1-or-later
"""Giving a VM's session to someone else: an introspector that listens, or a program started for it."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress

from kvmi_host.attach.errors import AlreadyHooked, AttachError
from kvmi_host.attach.methods import choose, require_full
from kvmi_host.attach.policy import Policy
from kvmi_host.attach.qemu_object import hand_over_object
from kvmi_host.attach.session import connect_target, hand_to_kernel
from kvmi_host.attach.target import Target
from kvmi_host.attach.vmfd import VmHandle
from kvmi_host.introspect.greeting import introduce
from kvmi_host.protocol import Hello
from kvmi_host.provision import Method

_FIRST_PASSED_FD = 3  # SD_LISTEN_FDS_START of sd_listen_fds(3)
_PASSED_ON = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
_SI_KERNEL = 0x80  # <asm-generic/siginfo.h>: from the terminal, which tells the whole foreground


def hand_over(
    target: Target,
    path: str,
    rules: Policy,
    *,
    cookie: bytes | None = None,
    timeout: float = 10.0,
    method: str = "auto",
) -> Method:
    """Connect to an introspector that listens on the UNIX socket `path`, as KVM-VMI's QEMU would, and leave them alone.
    Or have that QEMU do it.

    :param cookie: the secret that the introspector must know; None where none is set.
    :param timeout: seconds for its side of the handshake.
    :param method: as :func:`kvmi_host.attach.methods.choose` takes it.
    :return: the one that was used.
    :raise AttachError: nobody listens there; or see its branches.
    :raise HandshakeError: the introspector is silent or has another secret.
    """
    chosen = choose(target, method)
    if chosen is Method.QEMU_OBJECT:
        require_full(rules)
        hand_over_object(target, path, cookie, timeout)
        return chosen
    with VmHandle(target.pid) as vm:
        if vm.hooked():  # looked at before someone is told of a session that then is none
            raise AlreadyHooked(f"{target.name} is being introspected already: detach first")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        try:
            sock.connect(path)
        except OSError as error:
            raise AttachError(f"{path}: no introspector listens there: {error}") from error
        introduce(sock, Hello(target.uuid, target.start_time, target.name), cookie, timeout)
        sock.setblocking(True)
        hand_to_kernel(target, sock, rules)
    return chosen


def run_with_session(target: Target, command: Sequence[str], rules: Policy, *, method: str = "auto") -> int:
    """Run a program with the connected socket passed as in systemd's socket activation, and wait for it.

    The program finds LISTEN_FDS=1, LISTEN_FDNAMES=kvmi, its own LISTEN_PID, and the socket as descriptor 3. No
    handshake takes place there: KVM speaks at once. Signals that ask us to do something are passed on to it.

    :param method: as :func:`kvmi_host.attach.methods.choose` takes it.
    :return: its exit status, or minus the number of the signal that ended it.
    :raise AttachError: see its branches.
    """
    connected = connect_target(target, rules, method)
    try:
        # Blocked from before there is a child: none is lost, and each is taken in its turn.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON | {signal.SIGCHLD})
        try:
            with connected.sock as theirs:
                child = os.fork()
                if child == 0:
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)
                    _become(command, theirs.fileno())
            return _wait_for(child)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    finally:
        if connected.leave:
            connected.leave()


def _wait_for(child: int) -> int:
    us = threading.get_ident()

    def tell() -> None:
        # The SIGCHLD of the process may go to a thread that does not block it, and be lost.
        with suppress(ChildProcessError):  # it went where it should
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
            signal.pthread_kill(us, signal.SIGCHLD)

    # It blocks what we do.
    threading.Thread(target=tell, daemon=True).start()
    while True:
        got = signal.sigwaitinfo(_PASSED_ON | {signal.SIGCHLD})
        if got.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
        elif got.si_code != _SI_KERNEL:
            os.kill(child, got.si_signo)


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
