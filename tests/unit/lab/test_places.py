# SPDX-License-Identifier: LGPL-2.1-or-later
"""A place is a host if it has one SSH server; what an exporter says of it goes nowhere unread."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmi_host.host.ssh_config import read_config, resolve
from kvmi_host.lab import LabError
from kvmi_host.lab.inventory import LabHost
from kvmi_host.lab.places import lab_host

SERVICE = {"address": "lab1.example.org", "username": "root", "extra": {"proxy": "shelf", "proxy_required": False}}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a configuration of SSH for every host."""
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/config").write_text("Host *\nUser nobody\nIdentityFile ~/.ssh/lab\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def host(folder: Path, **service: object) -> LabHost:
    return lab_host("lab1", {"vendor": "amd"}, {"NetworkService": {**SERVICE, **service}}, folder)


def test_it_is_reached_as_the_service_says(tmp_path: Path) -> None:
    expected = LabHost("lab1", "ssh", "root@lab1.example.org", tags={"vendor": "amd"})
    assert host(tmp_path) == expected


@pytest.mark.parametrize(
    ("address", "port", "expected"),
    [
        ("10.0.0.7", 2222, "root@10.0.0.7:2222"),
        ("10.0.0.7", 22, "root@10.0.0.7"),
        ("fd00::7", 2222, "root@[fd00::7]:2222"),
        ("fd00::7", 22, "root@[fd00::7]"),
    ],
)
def test_the_address_is_one_that_ssh_takes(tmp_path: Path, address: str, port: int, expected: str) -> None:
    found = host(tmp_path, address=address, port=port).address
    destination = resolve(found, "")
    assert (found, destination.host, destination.port) == (expected, address, port)


def test_a_host_behind_its_exporter_is_reached_through_it(home: Path) -> None:
    found = host(home, port=2222, extra={"proxy": "shelf.example.org", "proxy_required": True})
    assert found.ssh_config is not None
    destination = resolve(found.address, read_config(found.ssh_config))
    assert str(destination) == "root@lab1.example.org port 2222"
    assert destination.jumps == ("shelf.example.org",)
    assert destination.identities == (home / ".ssh/lab",)


def test_what_the_user_configured_is_the_exporters_and_not_the_hosts(home: Path) -> None:
    found = host(home, extra={"proxy": "shelf.example.org", "proxy_required": True})
    proxy = resolve("shelf.example.org", read_config(found.ssh_config))
    assert (proxy.user, proxy.jumps) == ("nobody", ())


def test_of_several_services_the_default_one_counts(tmp_path: Path) -> None:
    services = {"other": {**SERVICE, "address": "other"}, "default": SERVICE}
    assert lab_host("lab1", {}, services, tmp_path).address == "root@lab1.example.org"


def test_several_services_without_a_default_are_an_error_that_names_them(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="several NetworkServices, a, b: call the one to take `default`"):
        lab_host("lab1", {}, {"b": SERVICE, "a": SERVICE}, tmp_path)


@pytest.mark.parametrize("name", ["../lab1", "a/b", ".hidden", "", "a" * 65, "a\nb"])
def test_a_name_that_is_no_folders_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(LabError, match="rename it"):
        lab_host(name, {}, {"NetworkService": SERVICE}, tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("address", "-oProxyCommand=touch /tmp/x"),
        ("address", "a\nProxyCommand touch /tmp/x"),
        ("address", "fe80::7%eth1"),
        ("address", None),
        ("username", "root x"),
        ("username", 7),
        ("port", 0),
        ("port", 65536),
        ("port", "22"),
        ("port", True),
        ("extra", {"proxy": "a\nProxyCommand touch /tmp/x", "proxy_required": True}),
        ("extra", {"proxy": None, "proxy_required": True}),
    ],
)
def test_what_ssh_cannot_take_is_an_error(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(LabError, match="labgrid's place lab1: its NetworkService has the"):
        host(tmp_path, **{key: value})
    assert list(tmp_path.iterdir()) == []
