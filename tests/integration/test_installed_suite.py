# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hardware suite as a package, of a wheel and of the source tree: the same tests as in the folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEADLINE = 120

pytestmark = pytest.mark.integration


def run(*argv: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(argv, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Python's path with what a wheel of this tree brings."""
    folder = tmp_path_factory.mktemp("wheel")
    # Without what is compiled: nothing is to change in this tree.
    build = (sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder))
    run(*build, cwd=ROOT, HATCH_BUILD_NO_HOOKS="1")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def collect(*arguments: str, cwd: Path, path: Path) -> list[str]:
    """The names of the tests that pytest collects, without their folders."""
    argv = [sys.executable, "-m", "pytest", "--collect-only", "-q", *arguments]
    ids = (line.partition("::") for line in run(*argv, cwd=cwd, PYTHONPATH=str(path)).splitlines() if "::" in line)
    return [f"{Path(file).name}::{name}" for file, _, name in ids]


@pytest.fixture(scope="module")
def here() -> list[str]:
    """The tests of the folder."""
    return collect("tests/hardware", cwd=ROOT, path=ROOT)


def test_a_wheel_has_the_tests_of_the_folder(installed: Path, here: list[str], tmp_path: Path) -> None:
    assert collect("--pyargs", "kvmi_host.hwtest", cwd=tmp_path, path=installed) == here


def test_the_source_tree_has_them_as_a_package_too(here: list[str]) -> None:
    assert collect("--pyargs", "kvmi_host.hwtest", cwd=ROOT, path=ROOT) == here


def test_the_files_of_the_tests_come_along(installed: Path) -> None:
    files = {file.name for file in (ROOT / "tests/hardware").iterdir() if file.is_file()}
    assert files - {file.name for file in (installed / "kvmi_host/hwtest").iterdir()} == set()
