# SPDX-License-Identifier: LGPL-2.1-or-later
"""What has our kernel part answer in another dialect keeps up with it."""

import shutil
import subprocess
from pathlib import Path

import pytest

KERNEL = Path(__file__).parents[3] / "kernel"
PATCHES = sorted((KERNEL / "dialects").glob("*.patch"))


def test_there_is_one_of_v7() -> None:
    assert [patch.name for patch in PATCHES] == ["v7.patch"]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_it_applies_as_it_stands(patch: Path, tmp_path: Path) -> None:
    source = shutil.copytree(KERNEL / "src", tmp_path / "src")
    argv = ["patch", "-p1", "-F0", "--no-backup-if-mismatch", "-d", source, "-i", patch]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
