# SPDX-License-Identifier: LGPL-2.1-or-later
"""VMs that announce themselves to a listening introspector, with the kernel simulated."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID, uuid4

from kvmi_host.introspect.greeting import introduce
from kvmi_host.protocol import Hello
from kvmi_host.testing.peer import SimulatedKernel


@contextmanager
def announced(
    path: str | os.PathLike[str],
    name: str = "webserver",
    uuid: UUID | None = None,
    *,
    cookie: bytes | None = None,
    timeout: float = 10.0,
    vcpus: int = 1,
    **settings: object,
) -> Iterator[SimulatedKernel]:
    """The kernel end of a VM whose handshake on the UNIX socket `path` is done.

    :param uuid: a new one by default.
    :param timeout: seconds for the handshake.
    :param settings: see :class:`SimulatedKernel`.
    :raise HandshakeError: it failed.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(os.fspath(path))
        introduce(sock, Hello(uuid or uuid4(), 1_700_000_000, name), cookie, timeout)
        sock.setblocking(True)
        kernel = SimulatedKernel(sock, vcpus, **settings)  # type: ignore[arg-type]
    with kernel:
        yield kernel
