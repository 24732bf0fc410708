# SPDX-License-Identifier: LGPL-2.1-or-later
"""The collection in ansible/: what its parts say of each other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import kvmi_host
from kvmi_host.host.kernels import Series

ROOT = Path(__file__).parents[3]
COLLECTION = ROOT / "ansible"
ROLES = sorted(path.name for path in (COLLECTION / "roles").iterdir())
GROUPS = {"kvmi_hosts", "kvmi_vmi_hosts", "kvmi_controllers"}
GUIDE = (ROOT / "docs/deploying.md").read_text()


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def options(role: str) -> dict[str, Any]:
    """What the role's own specification has."""
    found: dict[str, Any] = load(COLLECTION / "roles" / role / "meta/argument_specs.yml")["argument_specs"]["main"]
    return dict(found["options"])


def defaults(role: str) -> dict[str, Any]:
    file = COLLECTION / "roles" / role / "defaults/main.yml"
    return dict(load(file)) if file.exists() else {}


def role_vars(role: str) -> dict[str, Any]:
    file = COLLECTION / "roles" / role / "vars/main.yml"
    return dict(load(file)) if file.exists() else {}


def tasks(role: str) -> Iterator[dict[str, Any]]:
    """Each task of a role, those in blocks too."""

    def inner(found: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for task in found:
            yield task
            yield from inner(task.get("block", []))

    for file in sorted((COLLECTION / "roles" / role).glob("*/*.yml")):
        if file.parent.name in {"tasks", "handlers"}:
            yield from inner(load(file))


def put_by(role: str) -> Iterator[str]:
    """Where its tasks put files, with Ansible's expressions as they stand."""
    for task in tasks(role):
        for module in ("copy", "template", "file", "git", "lineinfile"):
            call = task.get(f"ansible.builtin.{module}", {})
            if call.get("state") != "absent" and (place := call.get("dest") or call.get("path")):
                yield str(place)


def test_its_version_is_that_of_the_package() -> None:
    assert load(COLLECTION / "galaxy.yml")["version"] == kvmi_host.__version__


def test_it_needs_no_newer_ansible_than_is_locked() -> None:
    needed = load(COLLECTION / "meta/runtime.yml")["requires_ansible"]
    locked = re.search(r"^ansible-core==([\d.]+)", (ROOT / "ci/requirements.lock").read_text(), re.MULTILINE)
    assert locked is not None
    assert [*map(int, needed.removeprefix(">=").split("."))] <= [*map(int, locked[1].split("."))]


@pytest.mark.parametrize("role", ROLES)
def test_every_default_is_specified_and_says_the_same(role: str) -> None:
    specified = {name: option["default"] for name, option in options(role).items() if "default" in option}
    assert defaults(role) == specified


@pytest.mark.parametrize("role", ROLES)
def test_every_variable_has_a_default_or_is_required(role: str) -> None:
    assert [name for name, one in options(role).items() if "default" not in one and not one.get("required")] == []


@pytest.mark.parametrize("role", ROLES)
def test_every_variable_is_described_and_has_a_type(role: str) -> None:
    assert [name for name, one in options(role).items() if not (one.get("description") and one.get("type"))] == []


@pytest.mark.parametrize("role", ROLES)
def test_the_guide_has_every_variable(role: str) -> None:
    assert [name for name in options(role) if f"`{name}`" not in GUIDE] == []


def test_the_guide_has_no_other_variables() -> None:
    known = {name for role in ROLES for name in options(role)}
    mentioned = set(re.findall(r"`(kvmi_(?:base|kernel|host|guests|ci|vmi)_[a-z_]+)`", GUIDE))
    assert mentioned - known - GROUPS == set()


@pytest.mark.parametrize("role", ROLES)
def test_nothing_but_ansibles_own_modules_is_used(role: str) -> None:
    known = {"name", "when", "loop", "register", "vars", "block", "notify", "environment", "become", "delegate_to"}
    known |= {"changed_when", "failed_when", "check_mode", "loop_control", "run_once", "ignore_errors", "diff"}
    modules = {key for task in tasks(role) for key in task} - known
    assert {module for module in modules if not module.startswith("ansible.builtin.")} == set()


def test_the_kernels_that_there_are_patches_for_are_those_that_are_taken() -> None:
    supported = role_vars("kvmi_kernel")["kvmi_kernel_supported"]
    assert supported == [str(series) for series in Series.packaged()]
    assert options("kvmi_kernel")["kvmi_kernel_series"]["choices"] == ["", *supported]


def test_every_unit_that_is_named_exists() -> None:
    there = {path.name for path in (ROOT / "kvmi_host/services").iterdir()}
    there |= {path.name for path in (ROOT / "ci/systemd").iterdir()}
    of_debian = {"libvirtd.service"}
    named = {
        task["ansible.builtin.systemd_service"].get("name")
        for role in ROLES
        for task in tasks(role)
        if "ansible.builtin.systemd_service" in task
    } - {None, "{{ item }}"}
    named |= set(role_vars("kvmi_host")["kvmi_host_units"])
    assert named - there - of_debian == set()


def test_what_is_copied_from_the_tree_is_there() -> None:
    settings = role_vars("kvmi_host")["kvmi_host_settings"]
    assert [one["src"] for one in settings if not (ROOT / "kvmi_host" / one["src"]).is_file()] == []


def test_uninstalling_covers_every_file_of_the_host() -> None:
    removed = role_vars("kvmi_host")["kvmi_host_files"]
    gone = [*removed, "{{ kvmi_base_state }}", "{{ kvmi_host_top }}", "/etc/libvirt/hooks/qemu.d", "/usr/local/"]
    puts = {*put_by("kvmi_host"), *(one["dest"] for one in role_vars("kvmi_host")["kvmi_host_settings"])}
    puts -= {"{{ item.dest }}", "{{ item }}", "{{ kvmi_host_made_folders }}"}
    assert role_vars("kvmi_host")["kvmi_host_made_folders"].startswith(tuple(gone))
    assert [place for place in puts if not place.startswith(tuple(gone))] == []
    assert role_vars("kvmi_host")["kvmi_host_top"] in removed


def test_uninstalling_covers_what_the_archive_puts_into_usr_local() -> None:
    from kvmi_host.lab.installation import _COMPLETIONS

    removed = set(role_vars("kvmi_host")["kvmi_host_files"])
    assert {f"/usr/local/{place}" for place in _COMPLETIONS.values()} <= removed
    patterns = next(
        task["ansible.builtin.find"] for task in tasks("kvmi_host") if task["name"] == "Look for manual pages"
    )["patterns"]
    pages = {path.name for path in (ROOT / "docs/man").glob("*.5")}
    assert pages <= set(patterns)


def test_uninstalling_covers_every_file_of_the_kernels_part() -> None:
    removed = role_vars("kvmi_kernel")["kvmi_kernel_files"]
    puts = {place for place in put_by("kvmi_kernel") if not place.startswith("{{")}
    assert puts == set(removed)


def test_uninstalling_covers_every_file_of_the_controller() -> None:
    removed = role_vars("kvmi_ci")["kvmi_ci_files"]
    gone = (*removed, "{{ kvmi_ci_home }}", "/etc/systemd/system/{{ item }}", "/etc/kvmi-host")
    assert [place for place in put_by("kvmi_ci") if not place.startswith(gone)] == []
    units = next(task["loop"] for task in tasks("kvmi_ci") if task["name"] == "There are its units")
    assert {f"/etc/systemd/system/{unit}" for unit in units} <= set(removed)


@pytest.mark.parametrize("playbook", ["site.yml", "uninstall.yml", "playbooks/site.yml"])
def test_a_playbook_is_sound(playbook: str, tmp_path: Path) -> None:
    if playbook.startswith("playbooks/"):  # as a collection, where roles are found by its name
        place = tmp_path / "ansible_collections/kvmi/host"
        place.parent.mkdir(parents=True)
        place.symlink_to(COLLECTION)
        named = "kvmi.host.site"
    else:
        named = str(COLLECTION / playbook)
    program = Path(sys.executable).with_name("ansible-playbook")
    argv = [program, "-i", COLLECTION / "inventory.example.yml", "--syntax-check", named]
    env = {**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(tmp_path), "ANSIBLE_HOME": str(tmp_path)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_example_sets_nothing_that_no_role_knows() -> None:
    text = (COLLECTION / "inventory.example.yml").read_text()
    known = {name for role in ROLES for name in options(role)}
    assert set(re.findall(r"^\s*(kvmi_\w+):", text, re.MULTILINE)) - GROUPS <= known
