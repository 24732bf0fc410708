# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a host that keeps us gets."""

from __future__ import annotations

import tarfile
from pathlib import Path

from kvmi_host.lab import installation

PROJECT = (Path(__file__).parents[3] / "pyproject.toml").read_text()


def test_what_debian_brings_is_not_fetched() -> None:
    wanted = installation.requirements('[project]\ndependencies = ["libvirt-python>=9.0", "rich>=13", "qemu.qmp"]')
    assert wanted == ["rich>=13", "qemu.qmp"]


def test_all_else_that_the_package_needs_is_fetched() -> None:
    names = {one.partition(">")[0] for one in installation.requirements(PROJECT)}
    assert {"typer", "rich", "paramiko", "qemu.qmp", "prometheus-client", "pycdlib", "jinja2"} <= names


def test_the_same_content_is_the_same_archive() -> None:
    one, other = tarfile.TarInfo("share/man"), tarfile.TarInfo("share/man")
    one.mtime, one.uid, one.mode, other.uname = 1234567890, 1000, 0o600, "somebody"
    assert installation._anonymous(one).tobuf() == installation._anonymous(other).tobuf()


def test_every_shell_gets_its_completion() -> None:
    for shell in installation._COMPLETIONS:
        assert "kvmi-host" in installation._completion(shell)
