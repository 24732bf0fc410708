# SPDX-License-Identifier: LGPL-2.1-or-later
"""What starts the night, and what runs on a host: each file is what its service takes, by the service's own rules."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvmi_host.attach import policy_file
from kvmi_host.host.doctor import agent as doctor

ROOT = Path(__file__).parents[3]
UNITS = ROOT / "ci/systemd"
SERVICES = ROOT / "kvmi_host/services"
HOOK = ROOT / "kvmi_host/provision/hooks/kvmi-host"


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


def confinement(unit: Path, threshold: float) -> subprocess.CompletedProcess[str]:
    """systemd's own score of how exposed a service is: 10 at worst."""
    argv = ["systemd-analyze", "security", "--offline=true", f"--threshold={threshold * 10:.0f}", unit]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60)


def test_the_night_is_confined() -> None:
    checked = confinement(UNITS / "kvmi-nightly.service", 2.0)
    assert checked.returncode == 0, checked.stdout


# -- of a host


@pytest.fixture
def services(tmp_path: Path) -> Path:
    """A folder with the units, whose program is where the README installs it, which is not here."""
    for unit in SERVICES.glob("*.service"):
        (tmp_path / unit.name).write_text(unit.read_text().replace("/opt/kvmi-host/bin/kvmi-host", "/bin/true"))
    (tmp_path / "kvmi-attach@web.service").symlink_to("kvmi-attach@.service")
    return tmp_path


@pytest.mark.parametrize("unit", ["kvmi-agent.service", "kvmi-attach@web.service"])
def test_systemd_finds_no_fault_with_a_hosts_units(services: Path, unit: str) -> None:
    argv = ["systemd-analyze", "verify", "--man=no", services / unit]
    verified = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert (verified.returncode, verified.stderr) == (0, "")


@pytest.mark.parametrize("unit", sorted(file.name for file in SERVICES.glob("*.service")))
def test_a_hosts_services_are_confined(unit: str) -> None:
    checked = confinement(SERVICES / unit, 3.0)
    assert checked.returncode == 0, checked.stdout


def test_the_agents_user_is_the_one_that_is_made(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    argv = ["systemd-sysusers", f"--root={tmp_path}", SERVICES / "kvmi-host.sysusers"]
    subprocess.run(argv, check=True, capture_output=True, timeout=60)
    users = [line.split(":")[0] for line in (tmp_path / "etc/passwd").read_text().splitlines()]
    assert f"User={users.pop()}\n" in (SERVICES / "kvmi-agent.service").read_text()
    assert users == []


def test_the_folders_of_a_host_are_those_that_are_looked_into(tmp_path: Path) -> None:
    argv = ["systemd-tmpfiles", "--create", f"--root={tmp_path}", SERVICES / "kvmi-host.tmpfiles"]
    subprocess.run(argv, check=True, capture_output=True, timeout=60)
    folders = {
        f"/{folder.relative_to(tmp_path)}" for folder in tmp_path.rglob("*") if folder.stat().st_mode == 0o040755
    }
    assert {policy_file.FOLDER, str(Path(doctor.CONFIG).parent)} <= folders
    assert "${KVMI_AUTOATTACH:-/etc/kvmi-host/autoattach}" in HOOK.read_text()
    assert "/etc/kvmi-host/autoattach" in folders


def test_attach_finds_the_agent_where_its_unit_puts_it() -> None:
    assert f"--to {doctor.SOCKET}\n" in (SERVICES / "kvmi-attach@.service").read_text()
    assert f"RuntimeDirectory={Path(doctor.SOCKET).parent.name}\n" in (SERVICES / "kvmi-agent.service").read_text()


def test_pre_commit_takes_its_configuration_and_runs_the_checks_of_lint() -> None:
    configuration = ROOT / ".pre-commit-config.yaml"
    argv = [sys.executable, "-m", "pre_commit", "validate-config", configuration]
    checked = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout
    assert "entry: ci/lint --quick\n" in configuration.read_text()
