# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest that UEFI starts, in a user's own libvirt on this machine.

Without KVM: the CPU that the host in a box emulates has a defect that the firmware meets (docs/emulators.md). So this
is about what libvirt and OVMF make of the XML.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from time import monotonic, sleep

import libvirt
import pytest

from kvmi_host.host.kernels import Series
from kvmi_host.lab.images import guest_images, host_image
from kvmi_host.provision import Firmware, Guest, Image, connect, destroy, domain_xml, find_domain, start

pytestmark = pytest.mark.integration

NAME = "integration-uefi"
USER = os.getuid() or 65534  # nobody
STARTS_WITHIN = 60  # seconds
BOOTS_WITHIN = 240


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder of the user who runs libvirtd, with a path that a socket's address has room for."""
    with tempfile.TemporaryDirectory(prefix="kvmi-uefi-", dir="/var/tmp") as name:
        os.chown(name, USER, -1)
        yield Path(name)


@pytest.fixture
def connection(home: Path) -> Iterator[libvirt.virConnect]:
    """A libvirt with folders of its own and nothing in it. As root it would be the system's: so it is nobody's then."""
    libvirtd = shutil.which("libvirtd", path="/usr/sbin")
    assert libvirtd, "apt-get install libvirt-daemon libvirt-daemon-driver-qemu"
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(home), "XDG_RUNTIME_DIR": str(home)}
    socket = home / "libvirt/libvirt-sock"
    with subprocess.Popen([libvirtd], user=USER, extra_groups=[], cwd=home, env=environment) as daemon:
        try:
            deadline = monotonic() + STARTS_WITHIN
            while not socket.exists():
                assert monotonic() < deadline
                assert daemon.poll() is None
                sleep(0.1)  # the deadline decides, not this
            connection = connect(f"qemu+unix:///session?socket={socket}", STARTS_WITHIN)
            yield connection
            connection.close()
        finally:
            daemon.terminate()


@pytest.fixture
def linux(home: Path) -> Image:
    """The small Linux guest, with the kernel of the host in a box."""
    for name, file in (("k", host_image().kernel(Series.V6_1).image), ("i", guest_images()["linux.initrd"])):
        shutil.copyfile(file, home / name)
        (home / name).chmod(0o444)
    return Image("linux", PurePosixPath(home / "k"), PurePosixPath(home / "i"), "console=ttyS0 mitigations=off")


def test_uefi_starts_a_kernel_and_its_variables_go_with_the_guest(
    linux: Image, connection: libvirt.virConnect, home: Path
) -> None:
    log = home / "serial.log"
    xml = domain_xml(Guest(NAME, linux, memory=256, firmware=Firmware.UEFI), serial_log=PurePosixPath(log))
    xml = re.sub(r"<cpu [^>]*/>", "<cpu mode='maximum'/>", xml.replace('type="kvm"', 'type="qemu"', 1))
    connection.defineXML(xml)
    start(connection, NAME)
    try:
        variables = re.search(r"<nvram[^>]*>([^<]+)</nvram>", find_domain(connection, NAME).XMLDesc())
        assert variables
        assert Path(variables[1]).exists()
        deadline = monotonic() + BOOTS_WITHIN
        while "kvmi-guest: userspace" not in (text := log.read_text(errors="replace") if log.exists() else ""):
            assert monotonic() < deadline, text[-2000:]
            sleep(0.1)  # the deadline decides, not this
        assert re.search(r"efi: EFI v\S+ by EDK II", text)
    finally:
        destroy(connection, NAME)
    assert not Path(variables[1]).exists()
