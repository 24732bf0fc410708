# SPDX-License-Identifier: LGPL-2.1-or-later
"""A night on two hosts in a box, reached by SSH as any host; one of them dies in the middle. Ansible's hosts."""

from __future__ import annotations

import html
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvmi_host.lab import Box
from kvmi_host.lab.ansible import import_inventory
from kvmi_host.lab.fleet import box_name
from kvmi_host.lab.inventory import parse_inventory, read_inventory
from kvmi_host.lab.night import Night, State

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
DEADLINE = 1500.0
"""Seconds, for two boxes that may have to be built and booted, on a machine that does more than that."""
LAB = """
[defaults]
kind = "box"
deadline = 1800
[hosts.stays]
kernel = "6.1"
[hosts.dies]
kernel = "6.12"
"""
CHOSEN = "test_hook and hooked"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("night")


@pytest.fixture(scope="module")
def night(folder: Path) -> Night:
    """What came of it, by the script that every nightly runs. A host is killed when its first test has passed."""
    (folder / "lab.toml").write_text(LAB)
    doomed = Box(box_name(read_inventory(folder / "lab.toml")[1]))
    log = folder / "hosts/dies/pytest.log"
    variables = {"INVENTORY": str(folder / "lab.toml"), "REPORT": str(folder), "HISTORY": str(folder / "nights.sqlite")}
    variables |= {"K": CHOSEN, "MINUTES": "0", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with subprocess.Popen([ROOT / "ci/nightly"], env={**os.environ, **variables}) as nightly:
        try:
            deadline = time.monotonic() + DEADLINE
            while not (log.exists() and "PASSED" in log.read_text(errors="replace")):
                assert nightly.poll() is None, "the night was over before a test had passed on the host that dies"
                assert time.monotonic() < deadline, "no test has passed on the host that dies"
                time.sleep(0.2)
            os.kill(doomed.status().pid, signal.SIGKILL)
            assert nightly.wait(DEADLINE) == 1
        finally:
            nightly.terminate()
    return Night.from_json((folder / "night.json").read_text())


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
    assert {file.name for file in stays.iterdir()} >= {"junit.xml", "suite.json", "pytest.log", "console.log"}
    assert "collected" in (dies / "pytest.log").read_text()


def test_the_page_says_which_host_has_died(night: Night, folder: Path) -> None:
    _, dies = night.hosts
    assert html.escape(dies.reason) in (folder / "index.html").read_text()


def test_ansible_says_who_the_hosts_are(tmp_path: Path) -> None:
    (tmp_path / "hosts.ini").write_text("[zen]\nlab[7:8] ansible_user=root kvmi_kernel=6.1\n[other]\nlab9\n")
    text, _ = import_inventory(tmp_path / "hosts.ini", "zen")
    hosts = parse_inventory(text, tmp_path)
    assert [host.address for host in hosts] == ["root@lab7", "root@lab8"]
    assert hosts[0].tags == {"zen": "yes", "kernel": "6.1"}
