# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's monitor on a UNIX socket of its own: the blocking side of the ``qemu.qmp`` library."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar

from qemu.qmp import ExecuteError, QMPClient, QMPError

from kvmi_host.attach.errors import MonitorRefused, MonitorUnreachable

T = TypeVar("T")

TIMEOUT = 10.0
"""Seconds that a monitor has for one answer, the greeting included. A busy host's QEMU takes tens of milliseconds."""


class QmpMonitor:
    """QMP on a UNIX socket."""

    def __init__(self, path: str, timeout: float = TIMEOUT) -> None:
        """
        :param path: where QEMU listens.
        :param timeout: seconds that each answer may take.
        :raise MonitorUnreachable: nobody listens there, or QEMU serves someone else.
        """
        self._path = path
        self._timeout = timeout
        self._runner = asyncio.Runner()
        self._client = QMPClient("kvmi-host")
        # What it logs, it raises, too.
        self._client.logger = logging.Logger("kvmi_host.attach.qmp", logging.CRITICAL + 1)
        try:
            self._run(self._client.connect(path), "its greeting")
        except BaseException:
            self._runner.close()
            raise

    def close(self) -> None:
        """Leave the monitor to others. May be called again."""
        try:
            self._runner.run(asyncio.wait_for(self._client.disconnect(), self._timeout))
        except (OSError, EOFError, QMPError):
            pass  # it is gone, and that is what is wanted
        finally:
            self._runner.close()

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """See :meth:`kvmi_host.attach.monitor.Monitor.execute`."""
        try:
            return self._run(self._client.execute(command, dict(arguments or {})), command)
        except ExecuteError as error:
            raise MonitorRefused(command, error.error_class, str(error)) from error

    def _run(self, awaitable: Awaitable[T], what: str) -> T:
        async def in_time() -> T:
            async with asyncio.timeout(self._timeout):
                return await awaitable

        try:
            return self._runner.run(in_time())
        except ExecuteError:
            raise
        except TimeoutError:
            raise MonitorUnreachable(
                f"QEMU's monitor at {self._path}: no answer to {what} in {self._timeout:g} s: it serves one client at a"
                " time: end the other one (libvirt, qmp-shell)"
            ) from None
        except (OSError, EOFError, QMPError) as error:
            why = str(error) or "it hung up"
            raise MonitorUnreachable(f"QEMU's monitor at {self._path}: {why}: does QEMU listen there?") from error
