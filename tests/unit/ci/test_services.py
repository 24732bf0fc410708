# SPDX-License-Identifier: LGPL-2.1-or-later
"""What starts the night: each file is what its service takes, by the service's own rules."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
UNITS = ROOT / "ci/systemd"


@pytest.mark.parametrize(
    ("schema", "file"),
    [("vendor.github-workflows", ".github/workflows/nightly.yml"), ("vendor.gitlab-ci", ".gitlab-ci.yml")],
)
def test_the_pipeline_is_what_its_schema_says(schema: str, file: str) -> None:
    argv = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, ROOT / file]
    checked = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def verify(folder: Path) -> str:
    """What systemd has to say about the units in a folder."""
    units = sorted(folder.glob("kvmi-nightly.*[er]"))
    verified = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, timeout=60)
    return verified.stderr + f"status {verified.returncode}"


def test_systemd_finds_no_fault_with_the_units() -> None:
    assert verify(UNITS) == "status 0"


def test_systemd_finds_no_fault_with_what_hosts_in_a_box_need(tmp_path: Path) -> None:
    shutil.copytree(UNITS, tmp_path, dirs_exist_ok=True)
    (tmp_path / "kvmi-nightly.service.d").mkdir()
    shutil.move(tmp_path / "boxes.conf", tmp_path / "kvmi-nightly.service.d")
    assert verify(tmp_path) == "status 0"


def test_the_service_is_confined() -> None:
    argv = ["systemd-analyze", "security", "--offline=true", "--threshold=20", UNITS / "kvmi-nightly.service"]
    checked = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout
