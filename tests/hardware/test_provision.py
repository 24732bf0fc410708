# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests through this host's libvirt, confined as Debian confines them: disks, firmware, networks, sessions."""

from __future__ import annotations

import hashlib
import os
import pwd
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path, PurePosixPath
from time import monotonic, sleep

import libvirt
import pytest

from kvmi_host.attach import attach
from kvmi_host.provision import (
    Guest,
    Introspection,
    Method,
    NoImage,
    ProvisionError,
    Settings,
    connect,
    define,
    destroy,
    find_domain,
    find_image,
    list_guests,
    save,
    serial_log,
    start,
)
from kvmi_host.testing.live import DEADLINE
from kvmi_host.testing.rules import UNDEPLOYED

pytestmark = [pytest.mark.hardware, pytest.mark.libvirt, pytest.mark.services]

URI = "qemu:///system"
PATIENCE = 4 * DEADLINE  # an emulated host compiles a profile and starts QEMU for each guest

# Writes its first sector once more as its second, says W on the serial port, and halts: a disk that boots.
BOOT_SECTOR = bytes.fromhex("31c0 8ed8 8ec0 b80103 bb007c b90200 b600 cd13 7206 baf803 b057 ee f4 ebfd").ljust(
    510, b"\0"
)
BOOT_SECTOR += b"\x55\xaa"


@pytest.fixture(scope="module")
def connection() -> Iterator[libvirt.virConnect]:
    connection = connect(URI)
    yield connection
    connection.close()


@pytest.fixture
def create(connection: libvirt.virConnect) -> Iterator[Callable[..., str]]:
    """Defines a guest, and starts it unless told otherwise; its name. All are destroyed at the end."""
    with ExitStack() as stack:

        def make(name: str, image: str, *, run: bool = True, **settings: object) -> str:
            define(connection, Guest(name, find_image(image), **settings))
            stack.callback(destroy, connection, name)
            if run:
                start(connection, name)
            return name

        yield make


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A qcow2 of the user's that boots, where QEMU's user can read it, and nobody writes to it."""
    raw, path = tmp_path / "disk.raw", Path("/var/tmp/hwtest-disk.qcow2")
    raw.write_bytes(BOOT_SECTOR.ljust(1 << 20, b"\0"))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path], check=True, timeout=60)
    path.chmod(0o444)
    yield path
    path.unlink()


def said(name: str, pattern: str, uri: str = URI) -> str:
    """What the guest wrote, once it matches."""
    log = Path(str(serial_log(uri, name)))
    deadline = monotonic() + PATIENCE
    while not re.search(pattern, text := log.read_text(errors="replace") if log.exists() else ""):
        assert monotonic() < deadline, f"no {pattern!r} in {PATIENCE:g} s:\n{text[-2000:]}"
        sleep(0.1)  # the deadline decides, not this
    return text


def volumes(connection: libvirt.virConnect) -> set[str]:
    pools = connection.listAllStoragePools()
    for pool in pools:
        pool.refresh()
    return {volume.name() for pool in pools for volume in pool.listAllVolumes()}


def fingerprint(path: Path) -> tuple[object, ...]:
    """What must not change: contents, owner, mode, time of the last change."""
    facts = path.stat()
    return hashlib.sha256(path.read_bytes()).hexdigest(), facts.st_uid, facts.st_gid, facts.st_mode, facts.st_mtime_ns


def test_guests_are_confined_and_introspected_all_the_same(
    connection: libvirt.virConnect, create: Callable[..., str]
) -> None:
    models = re.findall(r"<model>(apparmor|dac)</model>", connection.getCapabilities())
    assert models == ["apparmor", "dac"]
    name = create("hwtest-confined", "modewalk")
    pid = Path(f"/run/libvirt/qemu/{name}.pid").read_text().strip()
    assert Path(f"/proc/{pid}/attr/current").read_text().startswith("libvirt-")
    assert Path(f"/proc/{pid}/attr/current").read_text().rstrip("\0\n").endswith("(enforce)")
    assert Path(f"/proc/{pid}").stat().st_uid == pwd.getpwnam("libvirt-qemu").pw_uid
    with attach(name, uri=URI, timeout=DEADLINE) as attached:
        assert attached.session.guest_info() == 1


def test_a_disk_of_the_users_is_booted_and_not_written(
    connection: libvirt.virConnect, create: Callable[..., str], disk: Path
) -> None:
    before = fingerprint(disk)
    name = create("hwtest-disk", str(disk))
    said(name, "W")
    domain = find_domain(connection, name)
    assert domain.blockStats("vda")[2] > 0  # requests to write
    assert fingerprint(disk) == before
    (guest,) = [guest for guest in list_guests(connection) if guest.name == name]
    assert (guest.image, guest.introspection) == (disk.name, "vm-fd")
    destroy(connection, name)
    assert fingerprint(disk) == before
    define(connection, Guest(name, find_image(str(disk))))  # for the fixture, which destroys it


def test_destroying_leaves_the_copy_of_the_image_alone(connection: libvirt.virConnect, disk: Path) -> None:
    image = replace(find_image(str(disk)), copied=True)
    define(connection, Guest("hwtest-gone", image, settings=Settings("gone")))
    before = volumes(connection)
    assert {"hwtest-gone.qcow2", "hwtest-gone-seed.iso"} <= before
    destroy(connection, "hwtest-gone")
    assert before - volumes(connection) == {"hwtest-gone.qcow2", "hwtest-gone-seed.iso"}
    (copy,) = [name for name in volumes(connection) if name.startswith("kvmi-")]
    volume = connection.storagePoolLookupByName("default").storageVolLookupByName(copy)
    assert Path(volume.path()).read_bytes() == disk.read_bytes()
    volume.delete()


def test_a_disk_that_qemu_cannot_reach_is_refused_before_it_starts(connection: libvirt.virConnect, disk: Path) -> None:
    private = Path("/root/hwtest.qcow2")
    private.write_bytes(disk.read_bytes())
    try:
        with pytest.raises(NoImage, match=r"libvirt-qemu.*/root keeps it out"):
            define(connection, Guest("hwtest-private", find_image(str(private))))
    finally:
        private.unlink()
    assert "hwtest-private.qcow2" not in volumes(connection)


def test_a_name_whose_volume_is_taken_leaves_that_alone(
    connection: libvirt.virConnect, create: Callable[..., str], disk: Path
) -> None:
    create("hwtest-first", str(disk), run=False)
    find_domain(connection, "hwtest-first").rename("hwtest-second")
    try:
        with pytest.raises(ProvisionError, match=r"hwtest-first\.qcow2"):
            define(connection, Guest("hwtest-first", find_image(str(disk))))
        assert "hwtest-first.qcow2" in volumes(connection)
    finally:
        find_domain(connection, "hwtest-second").rename("hwtest-first")


def test_a_guest_is_on_libvirts_network(connection: libvirt.virConnect, create: Callable[..., str]) -> None:
    network = connection.networkLookupByName("default")
    if not network.isActive():
        network.create()
    name = create("hwtest-network", "modewalk", network="default")
    (interface,) = re.findall(r"<target dev='(vnet\d+)'/>", find_domain(connection, name).XMLDesc())
    master = Path(f"/sys/class/net/{interface}/master").resolve().name
    assert master == network.bridgeName()


def test_a_saved_guest_goes_on_where_it_was(connection: libvirt.virConnect, create: Callable[..., str]) -> None:
    name = create("hwtest-saved", "linux")  # not modewalk: docs/emulators.md, virtual-8086 mode
    said(name, "alive")
    save(connection, name)
    domain = find_domain(connection, name)
    assert (domain.isActive(), domain.hasManagedSaveImage()) == (0, 1)
    start(connection, name)
    assert not domain.hasManagedSaveImage()
    # The log begins anew; a guest that booted anew would say so.
    assert "userspace" not in said(name, "alive")


def test_stock_qemu_says_that_it_has_no_object(connection: libvirt.virConnect, create: Callable[..., str]) -> None:
    how = Introspection(Method.QEMU_OBJECT, PurePosixPath("/run/hwtest.sock"))
    name = create("hwtest-object", "modewalk", run=False, introspection=how)
    with pytest.raises(ProvisionError, match="introspection"):
        start(connection, name)


@pytest.fixture
def introspector() -> Iterator[socket.socket]:
    """What listens where docs/guests.md has AppArmor let QEMU through."""
    address = Path("/run/kvmi-agent/agent.sock")
    address.parent.mkdir(exist_ok=True)
    address.parent.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        shutil.chown(address, "libvirt-qemu")
        listener.listen()
        listener.settimeout(PATIENCE)
        yield listener
    address.unlink()


@pytest.mark.needs(UNDEPLOYED)
def test_a_confined_qemu_reaches_its_introspector(
    connection: libvirt.virConnect, create: Callable[..., str], introspector: socket.socket
) -> None:
    how = Introspection(Method.QEMU_OBJECT, PurePosixPath(introspector.getsockname()))
    name = create("hwtest-reaches", "modewalk", run=False, introspection=how)
    # Stock QEMU knows all of it but the object, which is what would use the connection.
    xml = find_domain(connection, name).XMLDesc()
    xml, dropped = re.subn(r"<qemu:arg value='-object'/>\s*<qemu:arg value='introspection,[^']*'/>", "", xml)
    assert dropped == 1
    connection.defineXML(xml)
    start(connection, name)
    introspector.accept()[0].close()


SESSION = """
import sys
from kvmi_host.provision import *
uri, disk = "qemu:///session", sys.argv[1]
connection = connect(uri)
define(connection, Guest("hwtest-session", find_image(disk)))
start(connection, "hwtest-session")
print(serial_log(uri, "hwtest-session"))
print(*[(guest.name, guest.state, guest.image) for guest in list_guests(connection)])
"""


def test_a_user_has_guests_of_their_own(tmp_path: Path, disk: Path) -> None:
    user = "hwtest"
    subprocess.run(["useradd", "--create-home", "--groups", "kvm", user], check=True, timeout=60)
    home = pwd.getpwnam(user).pw_dir
    runtime = Path(f"/run/{user}")
    runtime.mkdir(mode=0o700, exist_ok=True)
    os.chown(runtime, pwd.getpwnam(user).pw_uid, -1)

    def run(code: str) -> str:
        environment = {"HOME": home, "XDG_RUNTIME_DIR": str(runtime), "PATH": os.environ["PATH"]}
        environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
        argv = ["python3", "-c", code, str(disk)]
        done = subprocess.run(
            argv, user=user, group=user, extra_groups=["kvm"], cwd=home, env=environment, capture_output=True,
            text=True, timeout=PATIENCE,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    before = fingerprint(disk)
    try:
        log, guests = run(SESSION).splitlines()
        assert guests == f"('hwtest-session', 'running', '{disk.name}')"
        deadline = monotonic() + PATIENCE
        while "W" not in Path(log).read_text():
            assert monotonic() < deadline
            sleep(0.1)  # the deadline decides, not this
        assert Path(home, ".local/share/libvirt/images/hwtest-session.qcow2").exists()
        run("from kvmi_host.provision import *; destroy(connect('qemu:///session'), 'hwtest-session')")
        assert not Path(home, ".local/share/libvirt/images/hwtest-session.qcow2").exists()
        assert fingerprint(disk) == before
    finally:
        subprocess.run(["pkill", "-KILL", "--uid", user], check=False, timeout=60)
        subprocess.run(["userdel", "--remove", user], check=False, capture_output=True, timeout=60)
