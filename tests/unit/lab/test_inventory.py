# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lab's hosts as they are written down, and which of them are meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvmi_host.host.kernels import Series
from kvmi_host.host.vendor import Vendor
from kvmi_host.lab.errors import InventoryError
from kvmi_host.lab.inventory import DEADLINE, LabHost, chosen, read_inventory

LAB = """
[hosts.lab7]
address = "root@lab7.example.org"
tags = { vendor = "intel", kernel = "6.1" }
[hosts.lab8]
address = "lab8"
tags = { vendor = "amd", kernel = "6.12" }
[hosts.box-amd]
kind = "box"
"""


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str], list[LabHost]]:
    """The hosts of an inventory with that text."""

    def read(text: str) -> list[LabHost]:
        (tmp_path / "lab.toml").write_text(text)
        return read_inventory(tmp_path / "lab.toml")

    return read


def test_a_host_is_reached_by_ssh(read: Callable[[str], list[LabHost]], tmp_path: Path) -> None:
    (host,) = read('[hosts.lab7]\naddress = "root@lab7:2222"\nssh-config = "lab.ssh"\ntags = { rack = "3" }\n')
    assert host == LabHost("lab7", "ssh", "root@lab7:2222", tmp_path / "lab.ssh", {"rack": "3"}, deadline=DEADLINE)


def test_a_box_has_a_cpu_and_a_kernel(read: Callable[[str], list[LabHost]]) -> None:
    (host,) = read('[hosts.b]\nkind = "box"\ncpu = "intel"\nkernel = "6.12"\n')
    assert (host.kind, host.cpu, host.kernel) == ("box", Vendor.INTEL, Series.V6_12)


def test_a_box_is_tagged_with_what_it_is(read: Callable[[str], list[LabHost]]) -> None:
    (host,) = read('[hosts.b]\nkind = "box"\ntags = { generation = "zen3" }\n')
    assert host.tags == {"vendor": "amd", "generation": "zen3", "kernel": "6.1"}


def test_a_hosts_own_setting_comes_before_the_default(read: Callable[[str], list[LabHost]]) -> None:
    defaults = '[defaults]\ndeadline = 10\ntags = { site = "a", rack = "1" }\n'
    first, second = read(f'{defaults}[hosts.a]\naddress = "a"\n[hosts.b]\naddress = "b"\ndeadline = 5\ntags.rack = "2"')
    assert (first.deadline, first.tags) == (10, {"site": "a", "rack": "1"})
    assert (second.deadline, second.tags) == (5, {"site": "a", "rack": "2"})


def test_defaults_of_the_other_kind_are_passed_over(read: Callable[[str], list[LabHost]]) -> None:
    box, other = read('[defaults]\nssh-config = "x"\n[hosts.b]\nkind = "box"\n[hosts.o]\naddress = "o"\n')
    assert box.ssh_config is None
    assert other.ssh_config is not None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "hosts: none is there"),
        ("hosts = 3", r"hosts = 3: a table belongs there"),
        ("[host.a]", r"host: there is no such key; there are defaults, hosts"),
        ("[hosts.a]", r"hosts\.a\.address is missing"),
        ("[hosts]\na = 1", r"hosts\.a = 1: a table"),
        ('[hosts."../a"]\naddress = "a"', "a host's name is letters"),
        ('[hosts.a]\naddress = ""', r'hosts\.a\.address = \'\': "\[user@\]host'),
        ('[hosts.a]\nadress = "a"', r"hosts\.a\.adress: there is no such key; there are kind, address"),
        ('[hosts.a]\naddress = "a"\ncpu = "amd"', r"hosts\.a\.cpu: a host of this kind has none"),
        ('[hosts.a]\nkind = "box"\naddress = "a"', r"hosts\.a\.address: a host of this kind has none"),
        ('[hosts.a]\nkind = "box"\nkernel = 6.1', r"hosts\.a\.kernel = 6\.1: one of 6\.1, 6\.12, debug, as a text"),
        ('[hosts.a]\nkind = "box"\ncpu = "arm"', r"hosts\.a\.cpu = 'arm': one of amd, intel"),
        ('[hosts.a]\nkind = "box"\ncpu = "intel"\nkernel = "debug"', "no driver"),
        ('[hosts.a]\naddress = "a"\ntags = { kernel = 6.1 }', r"hosts\.a\.tags = .*a table of texts"),
        ('[hosts.a]\naddress = "a"\ndeadline = 0', r"hosts\.a\.deadline = 0: seconds, up to"),
        ('[hosts.a]\naddress = "a"\ndeadline = true', r"hosts\.a\.deadline = True: seconds"),
        ("[defaults]\ndeadline = nan\n[hosts.a]", r"defaults\.deadline = nan: seconds"),
        ('[defaults]\nname = "x"\n[hosts.a]', r"defaults\.name: there is no such key"),
        ("[hosts", "it is no TOML"),
        ("#" * (1 << 20) + "#", "more than 1048576 bytes"),
    ],
)
def test_what_cannot_be_used_is_named(read: Callable[[str], list[LabHost]], text: str, said: str) -> None:
    with pytest.raises(InventoryError, match=rf"lab\.toml: .*{said}"):
        read(text)


def test_an_inventory_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(InventoryError, match="No such file"):
        read_inventory(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("limits", "names"),
    [
        ([], ["lab7", "lab8", "box-amd"]),
        (["lab8"], ["lab8"]),
        (["lab*", "box-amd"], ["lab7", "lab8", "box-amd"]),
        (["kernel=6.1"], ["lab7", "box-amd"]),
        (["kernel=6.1", "kernel=6.12", "vendor=amd"], ["lab8", "box-amd"]),
        (["lab*", "vendor=amd"], ["lab8"]),
    ],
)
def test_names_widen_and_tags_narrow_the_choice(
    read: Callable[[str], list[LabHost]], limits: list[str], names: list[str]
) -> None:
    assert [host.name for host in chosen(read(LAB), limits)] == names


@pytest.mark.parametrize("limits", [["lab9"], ["kernel=5.10"], ["lab7", "vendor=amd"], ["lab7", "lab9"]])
def test_a_limit_that_leaves_nobody_is_an_error(read: Callable[[str], list[LabHost]], limits: list[str]) -> None:
    with pytest.raises(InventoryError, match=r"there are lab7, lab8, box-amd"):
        chosen(read(LAB), limits)
