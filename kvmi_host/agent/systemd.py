# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a service and systemd tell each other: sd_notify(3), sd_watchdog_enabled(3) and sd_listen_fds(3). All of it does
nothing where the service was started by someone else."""

from __future__ import annotations

import logging
import os
import socket
from time import CLOCK_MONOTONIC, clock_gettime_ns

from kvmi_host.agent.errors import ConfigError

_FIRST_PASSED_FD = 3  # SD_LISTEN_FDS_START

_log = logging.getLogger(__name__)


def notify(*assignments: str) -> None:
    """Tell systemd: ``READY=1``, ``STATUS=...``, ``STOPPING=1``, ``WATCHDOG=1``. Does not wait, and does not fail."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # unix(7): the abstract namespace
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.setblocking(False)
            sock.sendto("\n".join(assignments).encode(), address)
        except OSError as error:
            _log.warning("systemd cannot be told %s: %s", " ".join(assignments), error.strerror)


def notify_reloading() -> None:
    """Tell systemd that a reload has begun; ``READY=1`` ends it."""
    notify("RELOADING=1", f"MONOTONIC_USEC={clock_gettime_ns(CLOCK_MONOTONIC) // 1000}")


def watchdog_interval() -> float | None:
    """Seconds after which ``WATCHDOG=1`` is due again: half of what systemd waits. None: it does not wait."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 2e6 if microseconds.isdigit() and int(microseconds) else None


def passed_socket() -> socket.socket | None:
    """The listening socket of the service's socket unit; None: there is none.

    :raise ConfigError: what was passed is something else.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    if os.environ.get("LISTEN_FDS") != "1":
        raise ConfigError(f"systemd passes LISTEN_FDS={os.environ.get('LISTEN_FDS')}: one socket is wanted")
    os.set_inheritable(_FIRST_PASSED_FD, False)
    sock = socket.socket(fileno=_FIRST_PASSED_FD)
    listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM or not listening:
        raise ConfigError("the socket that systemd passes is no UNIX stream socket that listens: see its socket unit")
    return sock
