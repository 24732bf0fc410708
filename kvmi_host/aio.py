# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attaching for asyncio: ``async with await kvmi_host.aio.attach("webserver") as vm``."""

from __future__ import annotations

import asyncio
import os

from kvmi_host.attach.policy import Allow
from kvmi_host.attach.session import connect_kernel
from kvmi_host.introspect.async_session import AsyncSession
from kvmi_host.introspect.async_vm import AsyncVm


async def attach(
    vm: str,
    *,
    uri: str | None = None,
    allow: Allow | None = None,
    policy: str | os.PathLike[str] | None = None,
    method: str = "auto",
    wait: float = 0.0,
    timeout: float = 10.0,
) -> AsyncVm:
    """Attach to a running VM of this host, as :func:`kvmi_host.attach` does. libvirt and QEMU are asked in a thread."""
    connected = await asyncio.to_thread(connect_kernel, vm, uri, allow, policy, method, wait)
    session = await AsyncSession.open(connected.sock, peer=connected.peer, timeout=timeout)
    return AsyncVm(session, leave=connected.leave)
