# SPDX-License-Identifier: LGPL-2.1-or-later
"""The package kvmi-dkms: what is in it, and what it tells a host on which it cannot build."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kvmi_host import __version__

pytestmark = pytest.mark.integration

PROJECT = Path(__file__).parents[2]
BUILD = PROJECT / "kernel/dkms/build"
SERIES = sorted(folder.name for folder in (PROJECT / "kernel/patches").iterdir())


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built package."""
    return Path(_output(BUILD, tmp_path_factory.mktemp("package")).rstrip().rpartition("\n")[2])


@pytest.fixture(scope="module")
def source(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that dkms builds from, as the package installs it."""
    root = tmp_path_factory.mktemp("root")
    _output("dpkg-deb", "-x", package, root)
    return root / f"usr/src/kvmi-{__version__}"


def _headers(series: str) -> Path:
    """Installed headers of a kernel of this series."""
    return next(Path("/usr/src").glob(f"linux-headers-{series}.*-cloud-amd64"))


def _headers_of(version: str, directory: Path) -> Path:
    """What pre-build looks at in the headers of a kernel that is not installed here: its stable release."""
    (directory / "Makefile").write_text(f"kernelversion:\n\t@echo {version}\n")
    return directory


def _pre_build(source: Path, release: str, headers: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    """What dkms runs before it compiles, where dkms runs it."""
    return subprocess.run([source / "pre-build", release, headers], cwd=directory, capture_output=True, text=True)


def test_the_version_is_that_of_the_project(package: Path) -> None:
    assert _output("dpkg-deb", "-f", package, "Version").strip() == __version__


def test_the_same_commit_makes_the_same_package(package: Path, tmp_path: Path) -> None:
    _output(BUILD, tmp_path)

    assert (tmp_path / package.name).read_bytes() == package.read_bytes()


@pytest.mark.parametrize(
    ("release", "built"),
    [
        ("6.1.0-56-cloud-amd64", True),
        ("6.12.117+deb12-amd64", True),
        ("6.10.11+bpo-amd64", False),
        ("5.10.0-30-amd64", False),
        ("6.16.1-amd64", False),
    ],
)
def test_only_kernels_of_its_series_are_built_for(source: Path, release: str, built: bool) -> None:
    matches = f". {source}/dkms.conf; [[ {release} =~ $BUILD_EXCLUSIVE_KERNEL ]]"

    assert (subprocess.run(["bash", "-c", matches]).returncode == 0) == built


@pytest.mark.parametrize("series", SERIES)
def test_pre_build_makes_the_patched_source_of_each_series(source: Path, tmp_path: Path, series: str) -> None:
    headers = _headers(series)
    done = _pre_build(source, headers.name.removeprefix("linux-headers-"), headers, tmp_path)

    assert done.returncode == 0, done.stderr
    assert "kvmi_check_request" in (tmp_path / "tree/arch/x86/kvm/x86.c").read_text()
    assert (tmp_path / "tree/virt/kvm/kvmi.c").is_file()


def test_a_missing_source_package_is_named(source: Path, tmp_path: Path) -> None:
    done = _pre_build(source, "6.99.0-1-amd64", tmp_path, tmp_path)

    assert done.returncode != 0
    assert "apt-get install linux-source-6.99" in done.stderr


@pytest.mark.parametrize(
    ("version", "remedy"), [("6.1.1", "apt-get upgrade"), ("6.1.9999", "apt-get install linux-source-6.1")]
)
def test_a_source_of_another_stable_release_is_spoken_of(
    source: Path, tmp_path: Path, version: str, remedy: str
) -> None:
    # What is said comes first: the unpacking, which takes long, is left out.
    shutil.copy(source / "pre-build", tmp_path)
    (tmp_path / "prepare").symlink_to("/bin/true")
    done = _pre_build(tmp_path, "6.1.0-1-amd64", _headers_of(version, tmp_path), tmp_path)

    assert version in done.stderr
    assert _output("dpkg-query", "-W", "-f", "${source:Upstream-Version}", "linux-source-6.1") in done.stderr
    assert remedy in done.stderr
