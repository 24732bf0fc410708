# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a name leads to: ssh_config(5), as ssh reads it."""

from __future__ import annotations

import getpass
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmi_host.host.errors import RemoteError
from kvmi_host.host.ssh_config import Destination, read_config, resolve


@pytest.fixture
def lead(home: Path) -> Callable[..., Destination]:
    """Where a name leads to with that configuration."""

    def find(name: str, config: str = "") -> Destination:
        file = home / "config"
        file.write_text(config)
        return resolve(name, read_config(file))

    return find


@pytest.mark.parametrize(
    ("name", "user", "host", "port"),
    [
        ("lab7", None, "lab7", 22),
        ("root@lab7", "root", "lab7", 22),
        ("root@Lab7.Example.org:2222", "root", "lab7.example.org", 2222),
        ("192.0.2.1:2222", None, "192.0.2.1", 2222),
        ("::1", None, "::1", 22),
        ("root@[2001:db8::1]:2222", "root", "2001:db8::1", 2222),
        ("ssh://root@lab7:2222", "root", "lab7", 2222),
    ],
)
def test_a_name_has_user_host_and_port(
    lead: Callable[..., Destination], name: str, user: str | None, host: str, port: int
) -> None:
    to = lead(name)
    assert (to.user, to.host, to.port) == (user or getpass.getuser(), host, port)


@pytest.mark.parametrize("name", ["", "-oProxyCommand=sh", "a b", "root@", "lab7:port", "lab7:", "a/b", "[::1"])
def test_what_is_no_name_is_refused(lead: Callable[..., Destination], name: str) -> None:
    with pytest.raises(RemoteError, match="is no host"):
        lead(name)


def test_the_configuration_says_the_rest(lead: Callable[..., Destination]) -> None:
    to = lead("lab", "Host lab\n HostName lab7.example.org\n Port 2222\n User root\n IdentityFile ~/key\n")
    assert (to.user, to.host, to.port) == ("root", "lab7.example.org", 2222)
    assert to.identities == (Path("~/key").expanduser(),)


def test_what_the_name_says_comes_first(lead: Callable[..., Destination]) -> None:
    to = lead("alice@lab:22", "Host lab\n Port 2222\n User root\n")
    assert (to.user, to.port) == ("alice", 22)


def test_a_port_is_part_of_the_keys_name(lead: Callable[..., Destination]) -> None:
    assert lead("lab7").key_name == "lab7"
    assert lead("lab7:2222").key_name == "[lab7]:2222"
    assert lead("lab7:2222", "HostKeyAlias the-lab").key_name == "the-lab"


def test_known_hosts_are_those_of_the_configuration(lead: Callable[..., Destination]) -> None:
    config = "UserKnownHostsFile ~/a /b\nGlobalKnownHostsFile /dev/null\n"
    assert lead("lab", config).known_hosts == (Path("~/a").expanduser(), Path("/b"), Path("/dev/null"))
    assert lead("lab").known_hosts[0] == Path("~/.ssh/known_hosts").expanduser()


def test_jumps_are_in_their_order(lead: Callable[..., Destination]) -> None:
    assert lead("lab", "ProxyJump gate, root@inner:2222").jumps == ("gate", "root@inner:2222")
    assert lead("lab", "ProxyJump none").jumps == ()


def test_a_command_may_be_the_way(lead: Callable[..., Destination]) -> None:
    assert lead("lab:2222", "ProxyCommand nc %h %p").command == "nc lab 2222"
    assert lead("lab", "ProxyCommand none").command is None


def test_the_agent_can_be_left_out(lead: Callable[..., Destination]) -> None:
    assert not lead("lab", "IdentityAgent none").agent
    assert lead("lab", "IdentitiesOnly yes").identities_only


def test_files_are_included(lead: Callable[..., Destination], home: Path) -> None:
    (home / ".ssh/more").mkdir()
    (home / ".ssh/more/a").write_text("Host lab\n Port 2222\n")
    assert lead("lab", "Include more/*\n").port == 2222


def test_what_follows_an_include_belongs_to_the_block_that_it_is_in(
    lead: Callable[..., Destination], home: Path
) -> None:
    (home / ".ssh/more").write_text("Host other\n Port 2222\n")
    to = lead("lab", "Include more\nUser root\nHost lab\n Include more\n Port 2223\n")
    assert (to.user, to.port) == ("root", 2223)


def test_a_file_that_includes_itself_is_refused(lead: Callable[..., Destination], home: Path) -> None:
    (home / ".ssh/more").write_text("Include more\n")
    with pytest.raises(RemoteError, match="includes go deeper"):
        lead("lab", "Include more\n")


@pytest.mark.parametrize("config", ["Port many\n", "Match sometimes\n", "Host 'lab\n"])
def test_what_cannot_be_read_is_refused(lead: Callable[..., Destination], config: str) -> None:
    with pytest.raises(RemoteError, match="configuration of SSH"):
        lead("lab", config)


def test_a_file_that_is_not_there_is_an_error(home: Path) -> None:
    with pytest.raises(RemoteError, match="No such file"):
        read_config(home / "none")


def test_the_users_own_is_taken_by_default(home: Path) -> None:
    (home / ".ssh/config").write_text("Host lab\n Port 2222\n")
    assert resolve("lab", read_config()).port == 2222
