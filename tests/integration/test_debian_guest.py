# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Debian guest, made from here on a host over SSH: the one in a box, whose libvirt gets the image uploaded."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmi_host.lab import Box
from kvmi_host.lab.images import debian_guest

pytestmark = pytest.mark.integration

NAME = "web1"
BOOTS_WITHIN = 900  # seconds; cloud-init alone takes most of a minute of an emulated CPU
UPLOADS_WITHIN = 300

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    with Box("integration") as box:
        yield box


@pytest.fixture(scope="module")
def cli(box: Box) -> Cli:
    """``kvmi-host guest`` on this machine, for the libvirt there."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "kvmi_host.cli", "guest", *map(str, arguments), "-c", box.libvirt_uri]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=UPLOADS_WITHIN)
        assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True, timeout=60)
    return path.with_suffix(".pub")


@pytest.fixture(scope="module")
def guest(box: Box, cli: Cli, key: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A Debian guest that runs, and what was said of it when it was made."""
    settings = tmp_path_factory.mktemp("settings") / "user-data"
    settings.write_text("#!/bin/sh\necho settings-came-through > /dev/ttyS0\n")
    debian_guest()
    made = cli(
        "create", NAME, "--image", "debian", "--memory", 512, "--ssh-key", key, "--user-data", settings, "--start",
        "--json",
    )  # fmt: skip
    assert "uploading" in made.stderr
    yield json.loads(made.stdout)
    cli("destroy", NAME)


def console(box: Box, guest: dict[str, Any], text: str) -> None:
    """Wait until the guest's console shows a text."""
    log = shlex.quote(guest["serial_log"])
    box.run(f"until grep -q {shlex.quote(text)} {log}; do sleep 1; done", deadline=BOOTS_WITHIN)


def test_it_boots_to_login_under_its_name(box: Box, guest: dict[str, Any]) -> None:
    console(box, guest, f"{NAME} login:")


def test_its_settings_are_carried_out(box: Box, guest: dict[str, Any]) -> None:
    console(box, guest, "settings-came-through")


def test_its_user_has_the_key(box: Box, guest: dict[str, Any], key: Path) -> None:
    console(box, guest, key.read_text().split()[2])


def test_a_second_one_needs_no_upload(cli: Cli, guest: dict[str, Any]) -> None:
    try:
        assert "uploading" not in cli("create", "web2", "--image", "debian").stderr
    finally:
        cli("destroy", "web2")


def test_destroying_it_leaves_what_the_next_one_needs(box: Box, cli: Cli, guest: dict[str, Any]) -> None:
    cli("create", "web3", "--image", "debian")
    cli("destroy", "web3")
    names = box.run(["ls", "/var/lib/libvirt/images"]).stdout.split()
    assert not [name for name in names if name.startswith("web3")]
    assert sorted(Path(name).suffix for name in names if name.startswith("kvmi-")) == [".initrd", ".qcow2", ".vmlinuz"]
