# SPDX-License-Identifier: LGPL-2.1-or-later
"""A night on two hosts in a box, reached by SSH as any host; one of them dies in the middle. Ansible's hosts."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest

from kvmi_host import report
from kvmi_host.lab import Box
from kvmi_host.lab.ansible import import_inventory
from kvmi_host.lab.fleet import box_name, run_fleet
from kvmi_host.lab.inventory import parse_inventory, read_inventory
from kvmi_host.lab.night import Night, State
from kvmi_host.lab.part import Part

pytestmark = pytest.mark.integration

LAB = """
[defaults]
kind = "box"
deadline = 1800
[hosts.stays]
kernel = "6.1"
[hosts.dies]
kernel = "6.12"
"""
CHOSEN = "test_hook and not test_out_of_memory"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("night")


@pytest.fixture(scope="module")
def night(folder: Path) -> Night:
    """What came of it."""
    (folder / "lab.toml").write_text(LAB)
    hosts = read_inventory(folder / "lab.toml")
    doomed = Box(box_name(hosts[1]))
    killed = threading.Event()

    def watch(part: Part) -> None:
        if part.host == hosts[1] and part.tally.current and not killed.is_set():
            killed.set()
            os.kill(doomed.status().pid, signal.SIGKILL)

    return run_fleet(hosts, folder, ["-k", CHOSEN], watch=watch)


def test_the_other_host_comes_to_its_end(night: Night) -> None:
    stays, _ = night.hosts
    assert (stays.state, stays.status, stays.reason, stays.warnings) == (State.FINISHED, 0, "", ())
    assert list(stays.phases) == ["boot", "connect", "deploy", "suite", "collect"]


def test_the_killed_host_has_died_and_says_so(night: Night) -> None:
    _, dies = night.hosts
    assert (dies.state, dies.dirty) == (State.DIED, False)
    assert "its machine has ended" in dies.reason


def test_what_the_hosts_left_is_there(night: Night, folder: Path) -> None:
    stays, dies = (folder / "hosts" / host.name for host in night.hosts)
    results = json.loads((stays / "suite.json").read_text())
    assert results["host"]["name"] == "stays"
    assert results["host"]["kernel"].startswith("6.1.")
    assert {test["outcome"] for test in results["tests"] if "test_hook" in test["id"]} == {"passed"}
    assert {file.name for file in stays.iterdir()} == {
        *("junit.xml", "suite.json", "pytest.log", "dmesg.log", "console.log")
    }
    assert "collected" in (dies / "pytest.log").read_text()


def test_the_night_has_its_page(night: Night, folder: Path) -> None:
    assert report.write(folder) == 1
    assert "dies" in (folder / "index.html").read_text()


def test_ansible_says_who_the_hosts_are(tmp_path: Path) -> None:
    (tmp_path / "hosts.ini").write_text("[zen]\nlab[7:8] ansible_user=root kvmi_kernel=6.1\n[other]\nlab9\n")
    text, _ = import_inventory(tmp_path / "hosts.ini", "zen")
    hosts = parse_inventory(text, tmp_path)
    assert [host.address for host in hosts] == ["root@lab7", "root@lab8"]
    assert hosts[0].tags == {"zen": "yes", "kernel": "6.1"}
