# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest that UEFI starts, in a user's own libvirt on this machine.

Without KVM: the CPU that the host in a box emulates has a defect that the firmware meets (docs/emulators.md). So this
is about what libvirt and OVMF make of the XML.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest

from kvmi_host.host.kernels import Series
from kvmi_host.lab.images import guest_images, host_image
from kvmi_host.provision import Firmware, Guest, Image, connect, destroy, domain_xml, find_domain, start

pytestmark = pytest.mark.integration

NAME = "integration-uefi"
BOOTS_WITHIN = 240  # seconds


@pytest.fixture
def linux(libvirt_home: Path) -> Image:
    """The small Linux guest, with the kernel of the host in a box."""
    for name, file in (("k", host_image().kernel(Series.V6_1).image), ("i", guest_images()["linux.initrd"])):
        shutil.copyfile(file, libvirt_home / name)
        (libvirt_home / name).chmod(0o444)
    kernel, initrd = (PurePosixPath(libvirt_home / name) for name in ("k", "i"))
    return Image("linux", kernel, initrd, "console=ttyS0 mitigations=off")


def test_uefi_starts_a_kernel_and_its_variables_go_with_the_guest(
    linux: Image,
    libvirt_home: Path,
    libvirt_uri: str,
    without_kvm: Callable[[str], str],
    wait_serial: Callable[[Path, str, float], str],
) -> None:
    log = libvirt_home / "serial.log"
    guest = Guest(NAME, linux, memory=256, firmware=Firmware.UEFI)
    connection = connect(libvirt_uri)
    connection.defineXML(without_kvm(domain_xml(guest, serial_log=PurePosixPath(log))))
    start(connection, NAME)
    try:
        variables = re.search(r"<nvram[^>]*>([^<]+)</nvram>", find_domain(connection, NAME).XMLDesc())
        assert variables
        assert Path(variables[1]).exists()
        text = wait_serial(log, "kvmi-guest: userspace", BOOTS_WITHIN)
        assert re.search(r"efi: EFI v\S+ by EDK II", text)
    finally:
        destroy(connection, NAME)
    assert not Path(variables[1]).exists()
    connection.close()
