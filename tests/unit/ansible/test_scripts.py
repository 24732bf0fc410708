# SPDX-License-Identifier: LGPL-2.1-or-later
"""The small programs that the roles run on a host."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from jinja2 import Environment

from kvmi_host.agent.config import load
from kvmi_host.attach import policy_file
from kvmi_host.protocol import EventId

ROLES = Path(__file__).parents[3] / "ansible/roles"


def says(*argv: str | Path) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=30).stdout


def test_where_there_is_room_nothing_is_said(tmp_path: Path) -> None:
    assert says(ROLES / "kvmi_base/files/room", f"{tmp_path}=0") == ""


def test_a_file_system_without_room_is_named_with_what_it_lacks(tmp_path: Path) -> None:
    said = says(ROLES / "kvmi_base/files/room", f"{tmp_path}=99999999")
    assert re.fullmatch(r"/\S* has \d+ MiB free, and 99999999 are needed\n", said)


def test_what_folders_of_one_file_system_need_is_added_up(tmp_path: Path) -> None:
    said = says(ROLES / "kvmi_base/files/room", f"{tmp_path}=99999999", f"{tmp_path}/not/yet=1")
    assert "and 100000000 are needed" in said
    assert said.count("\n") == 1


def test_where_no_vm_runs_none_is_named() -> None:
    running = subprocess.run(["find", "/proc", "-maxdepth", "3", "-lname", "anon_inode:kvm-vm"], capture_output=True)
    if running.stdout:
        assert re.fullmatch(r"(\S+ \(pid \d+\)\n)+", says(ROLES / "kvmi_kernel/files/vms"))
    else:
        assert says(ROLES / "kvmi_kernel/files/vms") == ""


def test_what_is_loaded_is_told_as_json() -> None:
    told = json.loads(says(ROLES / "kvmi_kernel/files/modules"))
    assert sorted(told) == ["built", "disk", "introspection", "kvm", "vendor"]


@pytest.mark.parametrize(
    ("release", "series", "flavour"),
    [
        ("6.1.0-56-cloud-amd64", "6.1", "cloud-amd64"),
        ("6.1.0-56-amd64", "6.1", "amd64"),
        ("6.1.0-56-rt-amd64", "6.1", "rt-amd64"),
        ("6.12.117+deb12-cloud-amd64", "6.12", "cloud-amd64"),
        ("6.12.117+deb12-amd64", "6.12", "amd64"),
        ("5.10.0-30-amd64", "5.10", "amd64"),
    ],
)
def test_series_and_flavour_are_read_off_a_release(release: str, series: str, flavour: str) -> None:
    expressions = yaml.safe_load((ROLES / "kvmi_kernel/vars/main.yml").read_text())
    environment = Environment(autoescape=True)
    environment.filters["regex_search"] = lambda text, pattern: (found := re.search(pattern, text)) and found[0]
    known = {"ansible_facts": {"kernel": release}}
    read = [
        environment.from_string(expressions[f"kvmi_kernel_{name}"]).render(known) for name in ("running", "flavour")
    ]
    assert read == [series, flavour]


def rendered(template: str, **variables: object) -> str:
    environment = Environment(trim_blocks=True, keep_trailing_newline=True, autoescape=False)  # TOML
    environment.filters["to_json"] = json.dumps
    return environment.from_string((ROLES / "kvmi_host/templates" / template).read_text()).render(variables)


def test_the_agent_takes_what_the_variables_become(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(
        rendered(
            "agent.toml.j2",
            kvmi_host_socket="/run/kvmi-agent/agent.sock",
            kvmi_host_agent_users=["root"],
            kvmi_host_agent_metrics="127.0.0.1:9477",
            kvmi_host_agent_log_level="debug",
            kvmi_host_agent_vms=[{"match": "web*", "handlers": {"log": {"events": ["cr3"]}}}, {"match": "*"}],
        )
    )
    config = load(file)
    assert [rule.match for rule in config.rules] == ["web*", "*"]
    assert list(config.rules[0].handlers) == ["log"]
    assert (config.metrics, config.level) == (("127.0.0.1", 9477), "debug")


def test_the_agent_takes_what_the_defaults_become(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    defaults = yaml.safe_load((ROLES / "kvmi_host/defaults/main.yml").read_text())
    file.write_text(rendered("agent.toml.j2", kvmi_host_socket="/run/kvmi-agent/agent.sock", **defaults))
    assert load(file).rules == ()


def test_a_policy_is_what_the_variables_say(tmp_path: Path) -> None:
    policies = {"web": {"allow": "observe", "events": ["unhook", "cr"]}}
    file = tmp_path / "web.toml"
    file.write_text(rendered("policy.toml.j2", item="web", kvmi_host_policies=policies))
    file.chmod(0o644)
    assert policy_file.read_policy(file).events == frozenset({EventId.UNHOOK, EventId.CR})
