# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Debian guest, made from here on a host over SSH: the one in a box, whose libvirt gets the image uploaded."""

from __future__ import annotations

import json
import re
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
UPLOADS_WITHIN = 300  # seconds

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
def guest(box: Box, cli: Cli, public_key: Path) -> Iterator[dict[str, Any]]:
    """A Debian guest that runs, and what was said of it when it was made."""
    debian_guest()
    made = cli(
        "create", NAME, "--image", "debian", "--memory", 512, "--ssh-key", public_key, "--start",
        "--json",
    )  # fmt: skip
    assert "uploading" in made.stderr
    yield json.loads(made.stdout)
    cli("destroy", NAME)


def test_it_is_started_from_what_was_uploaded(box: Box, guest: dict[str, Any]) -> None:
    running = box.run(["virsh", "dumpxml", NAME]).stdout
    assert len(set(re.findall(r"/var/lib/libvirt/images/kvmi-[0-9a-f]{16}\.(?:vmlinuz|initrd|qcow2)", running))) == 3
    assert box.run(["virsh", "domstate", NAME]).stdout.strip() == "running"


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
