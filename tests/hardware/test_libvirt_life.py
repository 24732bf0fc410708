# SPDX-License-Identifier: LGPL-2.1-or-later
"""What libvirt does with a VM that is introspected: it is saved, migrated, reset, switched off, and introspected again
where it goes on."""

from __future__ import annotations

import json
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from queue import Queue
from threading import Thread
from time import monotonic, sleep
from typing import Any

import libvirt
import pytest

from kvmi_host.attach import attach, detach, find_target
from kvmi_host.host.footprint import receivers
from kvmi_host.introspect import CR3, Listener
from kvmi_host.testing.linux import PATIENCE, LinuxGuest, linux_guest
from kvmi_host.testing.live import DEADLINE
from kvmi_host.testing.rules import UNDEPLOYED

pytestmark = [pytest.mark.hardware, pytest.mark.libvirt]

HOOKS = Path("/etc/libvirt/hooks/qemu.d")


class Attached:
    """``kvmi-host attach``, as another terminal runs it, watching CR3. What it prints is read all along: a guest waits
    for an introspector that waits for its reader."""

    def __init__(self, guest: LinuxGuest) -> None:
        command = ["kvmi-host", "attach", guest.name, "--json", "--events", "cr3"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._lines: Queue[str] = Queue()
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()
        assert "session" in json.loads(self._lines.get(timeout=PATIENCE))
        assert json.loads(self._lines.get(timeout=PATIENCE))["event"] == "cr"

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._lines.put(line)

    def summary(self) -> dict[str, Any]:
        """Wait for its end; what it says then."""
        assert self._process.wait(PATIENCE) == 0
        self._reader.join()
        *_, last = self._lines.queue
        summary: dict[str, Any] = json.loads(last)["summary"]
        return summary


@pytest.fixture
def others() -> int:
    """How many sessions there are that are not the test's."""
    return receivers()


@pytest.fixture
def linux(others: int) -> Iterator[LinuxGuest]:
    with linux_guest("hwtest-life") as guest:
        yield guest
    await_no_session(others)


def await_no_session(others: int) -> None:
    """Wait until the kernel has no session any more but those of others."""
    deadline = monotonic() + DEADLINE
    while receivers() > others:
        assert monotonic() < deadline, "a session is left behind"
        sleep(0.05)


def save_and_start(guest: LinuxGuest) -> None:
    guest.domain.managedSave()
    guest.domain.create()


def snapshot(guest: LinuxGuest) -> None:
    memory = "/var/lib/libvirt/qemu/save/hwtest-life.memory"
    xml = f"<domainsnapshot><memory snapshot='external' file='{memory}'/></domainsnapshot>"
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_LIVE
    guest.domain.snapshotCreateXML(xml, flags).delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
    Path(memory).unlink()


def reset(guest: LinuxGuest) -> None:
    guest.domain.reset()


@pytest.mark.parametrize("what", [save_and_start, snapshot, reset])
def test_the_introspector_is_asked_to_leave_and_the_guest_goes_on(
    linux: LinuxGuest, what: Callable[[LinuxGuest], None]
) -> None:
    attached = Attached(linux)
    what(linux)
    assert attached.summary()["ended"] == "unhook"
    linux.await_growth()
    again = Attached(linux)
    assert detach(find_target(linux.name, "qemu:///system"), DEADLINE)
    assert again.summary()["ended"] == "unhook"


@pytest.mark.parametrize("flags", [0, libvirt.VIR_DOMAIN_DESTROY_GRACEFUL])
def test_a_guest_that_is_switched_off_ends_its_session_and_leaves_nothing(
    linux: LinuxGuest, others: int, flags: int
) -> None:
    attached = Attached(linux)
    linux.domain.destroyFlags(flags)
    assert attached.summary()["ended"] == "the VM or its session ended"
    await_no_session(others)


# -- the hook


@pytest.fixture
def autoattach(in_the_systems_path: None) -> Iterator[Path]:
    """The folder of links, with our hook in its place."""
    links = Path("/etc/kvmi-host/autoattach")
    links.mkdir(parents=True, exist_ok=True)
    HOOKS.mkdir(parents=True, exist_ok=True)
    hook = HOOKS / "kvmi-host"
    hook.write_bytes((files("kvmi_host.provision") / "hooks/kvmi-host").read_bytes())
    hook.chmod(0o755)
    subprocess.run(["systemctl", "restart", "libvirtd"], check=True)
    yield links
    hook.unlink()
    for link in links.iterdir():
        link.unlink()
    subprocess.run(["systemctl", "restart", "libvirtd"], check=True)


@pytest.mark.services
@pytest.mark.needs(UNDEPLOYED)
def test_the_hook_brings_a_guest_that_was_saved_back_to_its_introspector(
    autoattach: Path, tmp_path: Path, linux: LinuxGuest
) -> None:
    tmp_path.chmod(0o700)
    with Listener(tmp_path / "introspector.sock") as listener:
        (autoattach / linux.name).symlink_to(tmp_path / "introspector.sock")
        save_and_start(linux)
        with listener.accept(PATIENCE) as session:
            assert session.peer is not None
            assert session.peer.name == linux.name
        linux.await_growth()


# -- migration, to another libvirt of this host


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[libvirt.virConnect]:
    """A second libvirtd, which takes itself for that of another host."""
    for name in ("etc", "lib", "log/qemu", "run", "sock"):
        (tmp_path / name).mkdir(parents=True)
    guests_and_networks = shutil.ignore_patterns("*.xml")  # are the other one's
    shutil.copytree("/etc/libvirt", tmp_path / "etc", ignore=guests_and_networks, dirs_exist_ok=True)
    with (tmp_path / "etc/qemu.conf").open("a") as file:
        file.write('stdio_handler = "file"\n')  # virtlogd is the other one's
    conf = tmp_path / "libvirtd.conf"
    conf.write_text(f'host_uuid = "{uuid.uuid4()}"\nunix_sock_dir = "{tmp_path}/sock"\n')
    mounts = [
        ("run", "/run/libvirt"),
        ("etc", "/etc/libvirt"),
        ("lib", "/var/lib/libvirt"),
        ("log", "/var/log/libvirt"),
    ]
    script = ["mount --make-rprivate /"]
    script += [f"mount --bind {tmp_path}/{ours} {place}" for ours, place in mounts]
    script += [f"exec libvirtd -f {conf} -p {tmp_path}/pid"]
    daemon = subprocess.Popen(["unshare", "--mount", "sh", "-ec", "\n".join(script)])
    try:
        deadline = monotonic() + PATIENCE
        while not (tmp_path / "sock/libvirt-sock").exists():
            assert daemon.poll() is None, "the second libvirtd has ended"
            assert monotonic() < deadline
            sleep(0.1)
        connection = libvirt.open(f"qemu+unix:///system?socket={tmp_path}/sock/libvirt-sock")
        yield connection
        for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
            domain.destroy()
        connection.close()
    finally:
        daemon.terminate()
        daemon.wait(DEADLINE)


def test_a_guest_that_is_migrated_is_left_before_and_can_be_attached_where_it_went(
    linux: LinuxGuest, elsewhere: libvirt.virConnect, tmp_path: Path
) -> None:
    attached = Attached(linux)
    destination = {
        libvirt.VIR_MIGRATE_PARAM_URI: "tcp://127.0.0.1",
        libvirt.VIR_MIGRATE_PARAM_DEST_NAME: "hwtest-there",
    }
    there = linux.domain.migrate3(elsewhere, destination, libvirt.VIR_MIGRATE_LIVE)
    assert attached.summary()["ended"] == "unhook"
    assert there.isActive()
    pid = (tmp_path / "run/qemu/hwtest-there.pid").read_text()
    with attach(f"pid:{pid}", timeout=DEADLINE) as vm:
        assert len(vm.vcpus) == linux.vcpus
        assert next(vm.events(CR3)).mode == 8
