# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt's hook, with stand-ins for what it starts: it attaches guests that have a link, and stops none."""

from __future__ import annotations

import os
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

HOOK = files("kvmi_host.provision") / "hooks/kvmi-host"


class Around:
    """A host's programs and links."""

    def __init__(self, folder: Path) -> None:
        self._programs, self._links, self._calls = folder / "bin", folder / "autoattach", folder / "calls"
        self._programs.mkdir()
        self._links.mkdir()
        self._calls.touch()
        self.program("systemd-run")
        self.program("logger")
        self.program("kvmi-host")

    def program(self, name: str, status: int = 0) -> None:
        path = self._programs / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> {self._calls}\nexit {status}\n')
        path.chmod(0o755)

    def without(self, name: str) -> None:
        (self._programs / name).unlink()

    def link(self, guest: str, introspector: str) -> None:
        (self._links / guest).symlink_to(introspector)

    def hook(self, *arguments: str) -> list[str]:
        """What the hook calls; it must not fail, for that would fail the guest."""
        env = {"PATH": f"{self._programs}:{os.defpath}", "KVMI_AUTOATTACH": str(self._links)}
        subprocess.run(["sh", str(HOOK), *arguments], env=env, check=True)
        return self._calls.read_text().splitlines()


@pytest.fixture
def around(tmp_path: Path) -> Around:
    return Around(tmp_path)


def test_a_guest_with_a_link_is_attached_to_its_introspector(around: Around) -> None:
    around.link("web", "/run/introspector.sock")
    (call,) = around.hook("web", "started", "begin", "-")
    assert call.startswith("systemd-run ")
    assert call.endswith("/kvmi-host attach web --wait 600 --to /run/introspector.sock")


@pytest.mark.parametrize("what", [("db", "started"), ("web", "prepare"), ("web", "stopped")])
def test_other_guests_and_what_else_happens_are_left_alone(around: Around, what: tuple[str, str]) -> None:
    around.link("web", "/run/introspector.sock")
    assert around.hook(*what, "begin", "-") == []


def test_a_guest_that_cannot_be_attached_to_runs_and_the_journal_says_so(around: Around) -> None:
    around.link("web", "/run/introspector.sock")
    around.program("systemd-run", status=1)
    assert around.hook("web", "started", "begin", "-")[-1].startswith("logger -t kvmi-autoattach web is not attached")


def test_a_program_that_is_not_in_the_path_is_where_it_is_installed(around: Around) -> None:
    around.link("web", "/run/introspector.sock")
    around.without("kvmi-host")
    (call,) = around.hook("web", "started", "begin", "-")
    assert " -- /opt/kvmi-host/bin/kvmi-host attach" in call
