# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ``make packages`` leaves: well-formed, the same each time, and a Debian package that comes and goes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from kvmi_host import __version__

pytestmark = pytest.mark.integration

PROJECT = Path(__file__).parents[2]
DEBIAN = f"kvmi-host_{__version__}_amd64.deb"
WHEEL = f"kvmi_host-{__version__}-py3-none-any.whl"
SOURCE = f"kvmi_host-{__version__}.tar.gz"
SBOM = f"kvmi-host-{__version__}.cdx.json"
MOUNT = "/usr/share/mmdebstrap/hooks/file-mirror-automount"


def output(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with all files of a release of this commit."""
    return Path(output(PROJECT / "ci/release", tmp_path_factory.mktemp("release") / "dist").strip())


def test_a_release_is_complete(release: Path) -> None:
    files = {DEBIAN, f"kvmi-dkms_{__version__}_all.deb", WHEEL, SOURCE, SBOM}
    assert {file.name for file in release.iterdir()} == {*files, "SHA256SUMS"}
    sums = dict(reversed(line.split("  ")) for line in (release / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: hashlib.sha256((release / name).read_bytes()).hexdigest() for name in files}


def test_another_clone_makes_the_same_bytes(release: Path, tmp_path: Path) -> None:
    clone = tmp_path / "of another name"
    output("git", "clone", "--quiet", "--no-hardlinks", PROJECT, clone)
    output(clone / "ci/release", tmp_path / "dist")
    assert (tmp_path / "dist/SHA256SUMS").read_text() == (release / "SHA256SUMS").read_text()


def test_lintian_has_nothing_to_say(release: Path) -> None:
    user = ["--allow-root"] if os.geteuid() == 0 else []
    assert output("lintian", *user, "--fail-on", "error,warning", *release.glob("*.deb")) == ""


def test_the_wheel_has_all_that_is_not_python(release: Path) -> None:
    with zipfile.ZipFile(release / WHEEL) as wheel:
        files = set(wheel.namelist())
    package = {str(file.relative_to(PROJECT)) for file in (PROJECT / "kvmi_host").rglob("*") if file.is_file()}
    left_out = {file for file in package if "__pycache__" in file or "/_roundtrip.cpython" in file}
    assert package - left_out <= files
    assert {"kvmi_host/py.typed", "kvmi_host/services/kvmi-agent.service", "kvmi_host/hwtest/conftest.py"} <= files


def test_the_source_is_what_git_has(release: Path) -> None:
    with tarfile.open(release / SOURCE) as source:
        files = {name.partition("/")[2] for name in source.getnames()}
    tracked = set(output("git", "-C", PROJECT, "ls-tree", "-r", "--name-only", "HEAD").splitlines())
    assert {file for file in tracked - files if not file.startswith(".git")} <= {
        "kvmi_host/hwtest"
    }  # there as a folder


def test_the_sbom_has_what_the_package_needs(release: Path) -> None:
    names = {component["name"].lower() for component in json.loads((release / SBOM).read_text())["components"]}
    assert {"typer", "rich", "paramiko", "qemu.qmp", "prometheus_client", "pycdlib", "jinja2"} <= names
    assert "pytest" not in names


# -- on a host


class Host:
    """A bare Debian 12 in a folder, with man-db and our package. What is run there has /proc, and ends with it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        script = 'mount -t proc proc "$0/proc" && exec chroot "$0" "$@"'
        argv = ["unshare", "--mount", "--pid", "--fork", "sh", "-c", script, self.root, *command]
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8",
            "DEBIAN_FRONTEND": "noninteractive",
        }
        return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=100)

    def says(self, *command: str) -> str:
        done = self.run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def host(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Host:
    assert os.geteuid() == 0, "a chroot is made as root"
    root = tmp_path_factory.mktemp("host")
    root.chmod(0o755)
    sources = output(PROJECT / "vm-images/apt-sources", "bookworm")
    argv = [
        "mmdebstrap", "--mode=root", "--variant=apt", "--format=directory", "--quiet",
        "--dpkgopt=force-unsafe-io", f"--include=man-db,{release / DEBIAN}", f"--hook-dir={MOUNT}",
        "bookworm", root, "-",
    ]  # fmt: skip
    made = subprocess.run(argv, input=sources, capture_output=True, text=True, timeout=150)
    assert made.returncode == 0, made.stderr
    return Host(root)


def test_the_command_is_installed(host: Host) -> None:
    assert host.says("kvmi-host", "--version").strip() == __version__


def test_the_doctor_looks_at_its_host(host: Host) -> None:
    findings = [json.loads(line) for line in host.run("kvmi-host", "doctor", "--json").stdout.splitlines()]
    assert [found["evidence"] for found in findings if found["subject"] == "kvmi-host"] == [f"version {__version__}"]


def test_what_debian_has_too_old_is_there(host: Host) -> None:
    done = host.run("kvmi-host", "doctor", "root@127.0.0.1:9")
    assert "Traceback" not in done.stderr
    assert "127.0.0.1" in done.stderr + done.stdout


def test_the_library_is_pythons_own_with_its_compiled_part(host: Host) -> None:
    code = "import kvmi_host, kvmi_host.introspect._roundtrip as part; print(kvmi_host.__version__, part.__file__)"
    version, part = host.says("python3", "-c", code).split()
    assert version == __version__
    assert part.startswith("/usr/lib/python3/dist-packages/kvmi_host/introspect/_roundtrip.cpython-311-")


@pytest.mark.parametrize("page", ["kvmi-host", "kvmi-host-attach", "kvmi-policy", "kvmi-agent.toml"])
def test_its_manual_is_read_there(host: Host, page: str) -> None:
    assert page in host.says("man", "--pager=cat", page)


def test_the_services_take_the_installed_command(host: Host) -> None:
    for unit in ("kvmi-agent.service", "kvmi-attach@.service"):
        programs = [
            line for line in (host.root / "lib/systemd/system" / unit).read_text().splitlines() if "kvmi-host " in line
        ]
        assert programs
        assert all("=/usr/bin/kvmi-host " in line or "=-/usr/bin/kvmi-host " in line for line in programs)
    assert "kvmi-agent" in (host.root / "etc/passwd").read_text()


def test_purged_it_leaves_nothing(host: Host) -> None:
    files = [host.root / line.lstrip("/") for line in host.says("dpkg", "-L", "kvmi-host").splitlines()]
    assert host.root / "usr/lib/kvmi-host" in files
    host.says("dpkg", "--purge", "kvmi-host")
    assert [file for file in files if file.is_file()] == []
    left = {file.relative_to(host.root) for file in host.root.rglob("*kvmi*")}
    assert {
        file for file in left if not file.is_relative_to("var/cache/man")
    } == set()  # man's, of pages that were read
