# SPDX-License-Identifier: LGPL-2.1-or-later
"""The life of a guest, against libvirt's built-in test driver, and libvirts that cannot be reached.

The test driver has pools and volumes, but no files: what is uploaded is for real libvirts, in the other suites.
"""

import os
import socket
import subprocess
from pathlib import Path, PurePosixPath

import pytest

from kvmi_host.provision import (
    Guest,
    GuestExists,
    LibvirtUnreachable,
    NoImage,
    NoSuchGuest,
    ProvisionError,
    Settings,
    connect,
    define,
    destroy,
    find_image,
    is_remote,
    list_guests,
    save,
    serial_log,
    start,
    stop,
)


@pytest.fixture
def connection():
    """libvirt's test driver: one guest, "test", which runs."""
    connection = connect("test:///default")
    yield connection
    connection.close()


@pytest.fixture
def kernel(tmp_path):
    path = tmp_path / "kernel.elf"
    path.touch()
    return os.fspath(path)


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "7M"], check=True, timeout=60)
    return path


def volumes(connection):
    return {volume.name(): volume for pool in connection.listAllStoragePools() for volume in pool.listAllVolumes()}


def states(connection):
    return {guest.name: guest.state for guest in list_guests(connection)}


def test_guests_are_listed_with_what_they_are(connection):
    (guest,) = list_guests(connection)
    assert (guest.name, guest.state, guest.vcpus, guest.memory) == ("test", "running", 2, 2048)
    assert (guest.image, guest.introspection) == (None, None)


def test_a_guest_is_stopped_and_started(connection):
    stop(connection, "test")
    assert states(connection) == {"test": "shut off"}
    stop(connection, "test")
    start(connection, "test")
    assert states(connection) == {"test": "running"}


def test_a_guest_that_does_not_shut_down_is_switched_off(connection):
    stop(connection, "test", timeout=0)
    assert states(connection) == {"test": "shut off"}


def test_destroying_leaves_nothing(connection):
    destroy(connection, "test")
    assert states(connection) == {}


def test_a_saved_guest_is_off_until_it_is_started(connection):
    save(connection, "test")
    assert states(connection) == {"test": "shut off"}
    start(connection, "test")
    assert states(connection) == {"test": "running"}


def test_a_saved_guest_is_destroyed_with_what_was_saved(connection):
    save(connection, "test")
    destroy(connection, "test")
    assert states(connection) == {}


@pytest.mark.parametrize("action", [start, stop, save, destroy])
def test_a_guest_that_is_not_there_is_told_apart(connection, action):
    with pytest.raises(NoSuchGuest, match="'webserver'"):
        action(connection, "webserver")


def test_starting_a_guest_that_runs_is_refused_in_libvirts_words(connection):
    with pytest.raises(ProvisionError, match=r"test: .*running"):
        start(connection, "test")


def test_a_name_that_is_taken_is_refused(connection, kernel):
    with pytest.raises(GuestExists, match="guest destroy test"):
        define(connection, Guest("test", find_image(kernel)))


def test_an_image_that_is_not_there_is_refused(connection, tmp_path):
    with pytest.raises(NoImage, match=r"linux\.vmlinuz.*--image-dir"):
        define(connection, Guest("web", find_image("linux", os.fspath(tmp_path))))


def test_a_guest_is_defined_with_our_settings_and_then_started(connection, kernel):
    uuid = define(connection, Guest("web", find_image(kernel), vcpus=3, memory=64))
    web = next(guest for guest in list_guests(connection) if guest.name == "web")
    assert (web.uuid, web.state, web.vcpus, web.memory) == (uuid, "shut off", 3, 64)
    assert (web.image, web.introspection) == ("kernel.elf", "vm-fd")
    start(connection, str(uuid))
    assert states(connection)["web"] == "running"


def test_what_libvirt_cannot_define_it_refuses_in_its_own_words(connection, kernel):
    with pytest.raises(ProvisionError, match=r"web\n: .*name"):
        define(connection, Guest("web\n", find_image(kernel)))


# -- disks


def test_a_guests_disk_is_an_overlay_as_large_as_the_image(connection, disk):
    define(connection, Guest("web", find_image(str(disk))))
    volume = volumes(connection)["web.qcow2"]
    assert volume.info()[1] == 7 << 20
    assert f"<path>{disk}</path>" in volume.XMLDesc()


def test_the_pool_for_it_is_made_once_and_started(connection, disk):
    define(connection, Guest("one", find_image(str(disk))))
    connection.storagePoolLookupByName("default").destroy()
    define(connection, Guest("two", find_image(str(disk))))
    pool = connection.storagePoolLookupByName("default")
    assert (pool.isActive(), pool.autostart()) == (1, 1)


def test_destroying_a_guest_deletes_its_disk_and_no_other(connection, disk):
    for name in ("web", "db"):
        define(connection, Guest(name, find_image(str(disk))))
    destroy(connection, "web")
    assert set(volumes(connection)) == {"db.qcow2"}
    assert disk.exists()


def test_a_disk_that_is_gone_already_does_not_keep_its_guest(connection, disk):
    define(connection, Guest("web", find_image(str(disk))))
    volumes(connection)["web.qcow2"].delete()
    destroy(connection, "web")
    assert "web" not in states(connection)


def test_a_guest_that_cannot_be_defined_leaves_no_disk(connection, disk):
    with pytest.raises(ProvisionError):
        define(connection, Guest("web", find_image(str(disk)), vcpus=0))
    assert volumes(connection) == {}


def test_a_seed_that_cannot_be_written_leaves_nothing(connection, disk):
    with pytest.raises(ProvisionError):  # the test driver takes no uploads
        define(connection, Guest("web", find_image(str(disk)), settings=Settings("web")))
    assert volumes(connection) == {}
    assert "web" not in states(connection)


@pytest.mark.parametrize(
    ("uri", "log"),
    [
        ("qemu:///system", PurePosixPath("/var/log/libvirt/qemu/web-serial.log")),
        ("qemu+ssh://root@lab1/system", PurePosixPath("/var/log/libvirt/qemu/web-serial.log")),
        ("qemu:///session", PurePosixPath(Path.home(), ".cache/libvirt/qemu/log/web-serial.log")),
        ("qemu+ssh://me@lab1/session", None),
    ],
)
def test_the_serial_log_is_where_that_libvirt_has_its_own(monkeypatch, uri, log):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert serial_log(uri, "web") == log


# -- no libvirt


def test_an_ssh_host_that_is_down_is_told_so():
    with pytest.raises(LibvirtUnreachable, match=r"SSH host 127\.0\.0\.1 cannot be reached"):
        connect("qemu+ssh://root@127.0.0.1:1/system?no_tty=1")


def test_a_daemon_that_does_not_run_is_told_so(tmp_path):
    with pytest.raises(LibvirtUnreachable, match="is libvirtd running"):
        connect(f"qemu+unix:///system?socket={tmp_path}/none")


def test_a_daemon_that_does_not_answer_is_given_up(tmp_path):
    path = os.fspath(tmp_path / "libvirt.sock")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(path)
        silent.listen()
        with pytest.raises(LibvirtUnreachable, match=r"no answer in 0\.1 s"):
            connect(f"qemu+unix:///system?socket={path}", timeout=0.1)


def test_a_uri_that_is_none_is_told_so():
    with pytest.raises(LibvirtUnreachable, match="no-such-driver"):
        connect("no-such-driver:///system")


def test_libvirt_prints_nothing_itself(capfd, tmp_path):
    with pytest.raises(LibvirtUnreachable):
        connect(f"qemu+unix:///system?socket={tmp_path}/none")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("uri", "remote"),
    [("qemu:///system", False), ("qemu+unix:///system?socket=/x", False), ("qemu+ssh://root@lab1/system", True)],
)
def test_a_uri_with_a_host_is_remote(uri, remote):
    assert is_remote(uri) is remote
