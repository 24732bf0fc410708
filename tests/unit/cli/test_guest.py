# SPDX-License-Identifier: LGPL-2.1-or-later
"""``kvmi-host guest``: what its options come to, in front of provisioning that only notes what it is asked for."""

import json
from pathlib import PurePosixPath
from uuid import UUID

import pytest
from typer.testing import CliRunner

from kvmi_host import provision
from kvmi_host.cli import app
from kvmi_host.provision import Firmware, GuestInfo, Introspection, Method, Settings

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI me@here"


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setenv("KVMI_IMAGES", str(tmp_path))
    (tmp_path / "debian.qcow2").touch()
    return lambda *arguments: CliRunner().invoke(app, ["guest", *map(str, arguments), "-c", "test:///default"])


@pytest.fixture
def made(run, monkeypatch):
    """The guest that ``create`` makes of these options."""
    guests = []

    def define(connection, guest, tell):
        guests.append(guest)
        return UUID(int=7)

    monkeypatch.setattr(provision, "define", define)

    def make(*options):
        result = run("create", "web", *options)
        assert result.exit_code == 0, result.output
        return guests[-1]

    return make


def test_a_guest_is_small_alone_and_attached_to_while_it_runs_unless_told_otherwise(made):
    guest = made()
    assert (guest.image.name, guest.vcpus, guest.memory) == ("linux", 1, 128)
    assert (guest.network, guest.firmware, guest.settings) == (None, Firmware.BIOS, None)
    assert guest.introspection == Introspection()


def test_a_guest_with_a_disk_has_memory_for_it(made):
    assert made("--image", "/some/disk.qcow2").memory == 1024
    assert made("--image", "/some/disk.qcow2", "--memory", 512).memory == 512


@pytest.mark.parametrize("network", ["default", "bridge=br0"])
def test_a_network_is_what_was_named(made, network):
    assert made("--network", network).network == network


def test_debian_is_called_what_its_guest_is_called(made):
    assert made("--image", "debian").settings == Settings("web")
    assert made("--image", "debian", "--hostname", "db").settings == Settings("db")


def test_a_disk_of_the_users_gets_settings_when_there_are_some(made, tmp_path):
    (tmp_path / "key.pub").write_text(f"{KEY}\n")
    (tmp_path / "data").write_bytes(b"#!/bin/sh\n")
    disk = ("--image", "/some/disk.qcow2")
    assert made(*disk).settings is None
    assert made(*disk, "--ssh-key", tmp_path / "key.pub", "--ssh-key", tmp_path / "key.pub").settings == Settings(
        ssh_keys=(KEY, KEY)
    )
    assert made(*disk, "--user-data", tmp_path / "data").settings == Settings(user_data=b"#!/bin/sh\n")


def test_the_object_is_told_where_the_introspector_is(made):
    options = ("--introspection", "qemu-object", "--introspector", "/run/i.sock", "--cookie-file", "/cookie")
    how = Introspection(Method.QEMU_OBJECT, PurePosixPath("/run/i.sock"), PurePosixPath("/cookie"))
    assert made(*options).introspection == how


@pytest.mark.parametrize(
    "options",
    [
        ("--introspection", "qemu-object"),
        ("--introspector", "/run/i.sock"),
        ("--cookie-file", "/cookie"),
        ("--introspection", "magic"),
        ("--firmware", "coreboot"),
        ("--memory", "0"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(run, options):
    assert run("create", "web", *options).exit_code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--image", "modewalk", "--firmware", "uefi"), "--firmware bios"),
        (("--hostname", "web"), "no cloud-init"),
        (("--image", "debian", "--ssh-key", "/nowhere/key.pub"), "/nowhere/key.pub cannot be read"),
    ],
)
def test_what_an_image_cannot_do_is_said_in_a_line(run, options, message):
    result = run("create", "web", *options)
    assert result.exit_code == 1
    assert message in result.stderr


def test_a_list_has_these_keys(run, monkeypatch):
    guest = GuestInfo("web", UUID(int=7), "running", 2, 512, "debian", "vm-fd")
    monkeypatch.setattr(provision, "list_guests", lambda connection: [guest])
    assert json.loads(run("list", "--json").stdout) == {
        "name": "web",
        "uuid": str(UUID(int=7)),
        "state": "running",
        "vcpus": 2,
        "memory": 512,
        "image": "debian",
        "introspection": "vm-fd",
    }


def test_saving_is_a_verb(run):
    assert run("save", "test").exit_code == 0
