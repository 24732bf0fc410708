# SPDX-License-Identifier: LGPL-2.1-or-later
"""What goes to a host, and when it goes again."""

import io
import tarfile
from pathlib import Path

import pytest

from kvmi_host import __version__
from kvmi_host.lab import deploy


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A source tree in small."""
    (tmp_path / "kvmi_host").mkdir()
    (tmp_path / "kvmi_host" / "__init__.py").write_text("ONE = 1\n")
    (tmp_path / "tests" / "hardware").mkdir(parents=True)
    (tmp_path / "tests" / "hardware" / "test_x.py").write_text("def test_x(): pass\n")
    (tmp_path / "kvmi_host" / "hwtest").symlink_to("../tests/hardware")
    (tmp_path / "pyproject.toml").write_text('[project]\nentry-points.handlers.log = "x:y"\n')
    return tmp_path


@pytest.fixture
def guests(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "image").write_bytes(b"\x7fELF")
    return {"modewalk.elf": tmp_path / "image"}


def members(root: Path, guests: dict[str, Path]) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(deploy.archive(root, guests))) as tar:
        return {member.name: member for member in tar.getmembers()}


def test_everything_has_its_place(root: Path, guests: dict[str, Path]) -> None:
    assert set(members(root, guests)) == {
        "usr/local/bin/kvmi-host",
        "opt/kvmi-host/lib/kvmi_host/__init__.py",
        "opt/kvmi-host/lib/kvmi_host/__pycache__/__init__.cpython-311.pyc",
        "opt/kvmi-host/lib/kvmi_host/hwtest/test_x.py",
        "opt/kvmi-host/lib/kvmi_host/hwtest/__pycache__/test_x.cpython-311.pyc",
        f"opt/kvmi-host/lib/kvmi_host-{__version__}.dist-info/METADATA",
        f"opt/kvmi-host/lib/kvmi_host-{__version__}.dist-info/entry_points.txt",
        "opt/kvmi-host/images/modewalk.elf",
    }


def test_plugins_are_found_there(root: Path, guests: dict[str, Path]) -> None:
    with tarfile.open(fileobj=io.BytesIO(deploy.archive(root, guests))) as tar:
        points = tar.extractfile(f"opt/kvmi-host/lib/kvmi_host-{__version__}.dist-info/entry_points.txt")
        assert points
        assert points.read() == b"[handlers]\nlog = x:y\n"


def test_launcher_can_be_run(root: Path, guests: dict[str, Path]) -> None:
    assert members(root, guests)["usr/local/bin/kvmi-host"].mode == 0o755


def test_file_that_does_not_compile_goes_as_source(root: Path, guests: dict[str, Path]) -> None:
    (root / "kvmi_host" / "broken.py").write_text("def (:\n")
    names = set(members(root, guests))
    assert "opt/kvmi-host/lib/kvmi_host/broken.py" in names
    assert "opt/kvmi-host/lib/kvmi_host/__pycache__/broken.cpython-311.pyc" not in names


def test_same_tree_is_not_sent_again(root: Path, guests: dict[str, Path]) -> None:
    assert deploy.fingerprint(root, guests) == deploy.fingerprint(root, guests)


@pytest.mark.parametrize("part", ["kvmi_host/__init__.py", "tests/hardware/test_x.py", "pyproject.toml", "image"])
def test_any_change_is_sent(root: Path, guests: dict[str, Path], part: str) -> None:
    before = deploy.fingerprint(root, guests)
    (root / part).write_text("# changed\n")
    assert deploy.fingerprint(root, guests) != before
