# SPDX-License-Identifier: LGPL-2.1-or-later
"""What of Ansible's hosts becomes an inventory of ours. What Ansible says is written down here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmi_host.lab.ansible import import_inventory
from kvmi_host.lab.errors import InventoryError
from kvmi_host.lab.inventory import LabHost, parse_inventory

SAYS: dict[str, Any] = {
    "_meta": {
        "hostvars": {
            "a": {"ansible_host": "10.0.0.1", "ansible_user": "root", "ansible_port": 2222, "kvmi_vendor": "amd"},
            "b": {"ansible_host": "2001:db8::1", "ansible_port": 22, "kvmi_deadline": 60},
        }
    },
    "all": {"children": ["ungrouped", "rack1"]},
    "ungrouped": {"hosts": ["c"]},
    "rack1": {"hosts": ["a"], "children": ["zen"]},
    "zen": {"hosts": ["b"]},
}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    (tmp_path / "hosts.ini").touch()
    return tmp_path / "hosts.ini"


@pytest.fixture
def says(source: Path) -> Callable[[object], None]:
    """Sets what Ansible says."""

    def write(answer: object) -> None:
        program = source.parent / "bin/ansible-inventory"
        program.write_text(f"#!/bin/sh\n/bin/cat << 'END'\n{json.dumps(answer)}\nEND\n")
        program.chmod(0o755)

    write(SAYS)
    return write


def hosts(source: Path, *arguments: Any) -> dict[str, LabHost]:
    text, _ = import_inventory(source, *arguments)
    return {host.name: host for host in parse_inventory(text, Path("/"))}


@pytest.mark.usefixtures("says")
def test_addresses_tags_and_deadlines_are_taken_over(source: Path) -> None:
    found = hosts(source)
    assert {name: host.address for name, host in found.items()} == {
        "a": "root@10.0.0.1:2222",
        "b": "[2001:db8::1]:22",
        "c": "c",
    }
    assert found["a"].tags == {"rack1": "yes", "vendor": "amd"}
    assert (found["b"].tags, found["b"].deadline) == ({"rack1": "yes", "zen": "yes"}, 60)


@pytest.mark.usefixtures("says")
def test_a_group_has_the_hosts_of_those_in_it(source: Path) -> None:
    assert list(hosts(source, "rack1")) == ["a", "b"]
    assert list(hosts(source, "zen")) == ["b"]


@pytest.mark.usefixtures("says")
def test_a_group_that_is_not_there_is_said(source: Path) -> None:
    with pytest.raises(InventoryError, match="there is no group zen4; there are rack1, zen"):
        import_inventory(source, "zen4")


def test_a_hosts_own_key_goes_to_a_configuration_of_ssh(source: Path, says: Callable[[object], None]) -> None:
    own = {"ansible_host": "10.0.0.1", "ansible_user": "root", "ansible_ssh_private_key_file": "~/key"}
    says({"_meta": {"hostvars": {"a": own}}, "all": {"hosts": ["a"]}})
    with pytest.raises(InventoryError, match="--ssh-config"):
        import_inventory(source)
    text, config = import_inventory(source, "all", Path("/lab.ssh"))
    (host,) = parse_inventory(text, Path("/"))
    assert (host.address, host.ssh_config) == ("a", Path("/lab.ssh"))
    assert config.startswith("Host a\nHostName 10.0.0.1\nUser root\nIdentityFile ~/key\n")


@pytest.mark.parametrize("value", ["~/key\nProxyCommand sh", "a b", 'a"b'])
def test_nothing_else_gets_into_a_configuration_of_ssh(
    source: Path, says: Callable[[object], None], value: str
) -> None:
    says({"_meta": {"hostvars": {"a": {"ansible_ssh_private_key_file": value}}}, "all": {"hosts": ["a"]}})
    with pytest.raises(InventoryError, match="cannot stand in a configuration"):
        import_inventory(source, "all", Path("/lab.ssh"))


@pytest.mark.parametrize("answer", [[], {"all": {"hosts": ["../a"]}}, {"_meta": {"hostvars": 3}}, {"all": 1}])
def test_an_answer_that_makes_no_inventory_is_an_error(
    source: Path, says: Callable[[object], None], answer: object
) -> None:
    says(answer)
    with pytest.raises(InventoryError):
        import_inventory(source)


def test_text_stays_text(source: Path, says: Callable[[object], None]) -> None:
    text = 'quote " backslash \\ del \x7f line\n ümlaut'
    says({"_meta": {"hostvars": {"a": {"kvmi_note": text}}}, "all": {"hosts": ["a"]}})
    assert hosts(source)["a"].tags == {"note": text}


def test_without_ansible_it_is_said_what_to_install(source: Path) -> None:
    with pytest.raises(Exception, match="apt-get install ansible-core"):
        import_inventory(source)
