# SPDX-License-Identifier: LGPL-2.1-or-later
"""The small Linux guest under libvirt, for live tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING

from kvmi_host.provision import Guest, connect, define, destroy, find_domain, find_image, serial_log, start
from kvmi_host.testing.live import DEADLINE, LiveError

if TYPE_CHECKING:
    import libvirt

PATIENCE = 5 * DEADLINE
"""Seconds that a boot may take: of a guest in a host that is emulated itself, on a machine that has more to do."""


class LinuxGuest:
    """A guest that runs, and its serial log."""

    def __init__(self, connection: libvirt.virConnect, name: str, vcpus: int) -> None:
        self.name = name
        self.vcpus = vcpus
        self.connection = connection
        self.log = Path(str(serial_log("qemu:///system", name)))

    @property
    def domain(self) -> libvirt.virDomain:
        """What libvirt knows it as."""
        return find_domain(self.connection, self.name)

    def await_growth(self, word: str = "alive") -> None:
        """Wait for a line with `word` that is not there yet, in a new log if there comes to be one.

        :raise LiveError: none came in time.
        """
        before = self._text()
        deadline = monotonic() + PATIENCE
        while word not in (text := self._text()).removeprefix(before):
            if monotonic() > deadline:
                raise LiveError(f"no {word!r} came:\n{text[-2000:]}")
            sleep(0.05)  # the deadline decides, not this

    def _text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


@contextmanager
def linux_guest(name: str, vcpus: int = 2) -> Iterator[LinuxGuest]:
    """A guest of the system's libvirt, once its userspace runs; at the end it is destroyed."""
    connection = connect("qemu:///system")
    guest = LinuxGuest(connection, name, vcpus)
    guest.log.unlink(missing_ok=True)
    try:
        define(connection, Guest(name=name, image=find_image("linux"), vcpus=vcpus))
        try:
            start(connection, name)
            guest.await_growth("userspace")
            yield guest
        finally:
            destroy(connection, name)
    finally:
        connection.close()
