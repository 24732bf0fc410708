# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's monitor (QMP) of a running VM: on a UNIX socket of its own, or through the libvirt that runs the VM.

A monitor serves one client at a time, and libvirt keeps those of its domains: a domain is asked through libvirt, other
QEMUs on the socket that their command line names.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from kvmi_host.attach.errors import MonitorRefused, MonitorUnreachable
from kvmi_host.attach.monitor_address import monitor_sockets
from kvmi_host.attach.target import Target, command_line
from kvmi_host.provision import connect, find_domain

if TYPE_CHECKING:
    import libvirt

T = TypeVar("T")

TIMEOUT = 10.0
"""Seconds that a monitor has for one answer, the greeting included. A busy host's QEMU takes tens of milliseconds."""


class Monitor(Protocol):
    """What both ways have."""

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """What QEMU returns for a command.

        :raise MonitorRefused: an error is what it returns.
        :raise MonitorUnreachable: the monitor does not answer, or not in time.
        """


@contextmanager
def open_monitor(target: Target) -> Iterator[Monitor]:
    """The monitor of a VM, as long as the block runs; others cannot have it meanwhile, so be brief.

    :raise MonitorUnreachable: it has none that can be reached, or someone else has it.
    :raise ProvisionError: libvirt could not be asked.
    """
    if target.uri is not None:
        connection = connect(target.uri)
        try:
            yield LibvirtMonitor(find_domain(connection, str(target.uuid)))
        finally:
            connection.close()
        return
    sockets = monitor_sockets(target.pid, command_line(target.pid))
    if not sockets:
        raise MonitorUnreachable(
            f"process {target.pid}: its command line names no QMP socket (-qmp unix:PATH,server=on): use its libvirt"
            " name, if it has one"
        )
    monitor = QmpMonitor(sockets[0])
    try:
        yield monitor
    finally:
        monitor.close()


class QmpMonitor:
    """QMP on a UNIX socket."""

    def __init__(self, path: str, timeout: float = TIMEOUT) -> None:
        """
        :param path: where QEMU listens.
        :param timeout: seconds that each answer may take.
        :raise MonitorUnreachable: nobody listens there, or QEMU serves someone else.
        """
        from qemu.qmp import QMPClient  # here: most who attach need no monitor

        self._path = path
        self._timeout = timeout
        self._runner = asyncio.Runner()
        self._client = QMPClient("kvmi-host")
        # What it logs, it raises, too.
        self._client.logger = logging.Logger("kvmi_host.attach.monitor", logging.CRITICAL + 1)
        try:
            self._run(self._client.connect(path), "its greeting")
        except BaseException:
            self._runner.close()
            raise

    def close(self) -> None:
        """Leave the monitor to others. May be called again."""
        from qemu.qmp import QMPError

        try:
            self._runner.run(asyncio.wait_for(self._client.disconnect(), self._timeout))
        except (OSError, EOFError, QMPError):
            pass  # it is gone, and that is what is wanted
        finally:
            self._runner.close()

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """See :meth:`Monitor.execute`."""
        from qemu.qmp import ExecuteError

        try:
            return self._run(self._client.execute(command, dict(arguments or {})), command)
        except ExecuteError as error:
            raise MonitorRefused(command, error.error_class, str(error)) from error

    def _run(self, awaitable: Awaitable[T], what: str) -> T:
        from qemu.qmp import ExecuteError, QMPError

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


class LibvirtMonitor:
    """The monitor of a libvirt domain, which libvirt passes commands to. libvirt marks the domain as tainted by that,
    in its log, for it cannot know what was changed."""

    def __init__(self, domain: libvirt.virDomain) -> None:
        self._domain = domain

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """See :meth:`Monitor.execute`."""
        import libvirt
        import libvirt_qemu

        request = {"execute": command, "arguments": dict(arguments)} if arguments else {"execute": command}
        try:
            answer = json.loads(libvirt_qemu.qemuMonitorCommand(self._domain, json.dumps(request), 0))
        except libvirt.libvirtError as error:
            raise MonitorUnreachable(f"{self._domain.name()}: libvirt passes {command} on in vain: {error}") from error
        if refusal := answer.get("error"):
            raise MonitorRefused(command, str(refusal.get("class")), str(refusal.get("desc")))
        return answer.get("return")
