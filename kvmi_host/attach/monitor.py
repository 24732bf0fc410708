# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's monitor (QMP) of a running VM: on a UNIX socket of its own, or through the libvirt that runs the VM.

A monitor serves one client at a time, and libvirt keeps those of its domains: a domain is asked through libvirt, other
QEMUs on the socket that their command line names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from kvmi_host.attach.errors import MonitorRefused, MonitorUnreachable
from kvmi_host.attach.monitor_address import monitor_sockets
from kvmi_host.attach.target import Target, command_line
from kvmi_host.provision import connect, find_domain

if TYPE_CHECKING:
    import libvirt


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
    from kvmi_host.attach.qmp import QmpMonitor  # here: it loads asyncio, and most who attach need no monitor

    with closing(QmpMonitor(sockets[0])) as monitor:
        yield monitor


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
