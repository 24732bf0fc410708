# SPDX-License-Identifier: LGPL-2.1-or-later
"""The agent's configuration: what a file means, and what an error says."""

import os
import re
from pathlib import Path
from uuid import UUID

import pytest

from kvmi_host.agent.config import load
from kvmi_host.agent.errors import ConfigError
from kvmi_host.introspect import PeerInfo

UUID_TEXT = "00112233-4455-6677-8899-aabbccddeeff"


@pytest.fixture
def config(tmp_path):
    """Writes a file and loads it."""

    def write(text):
        (tmp_path / "agent.toml").write_text(text)
        return load(tmp_path / "agent.toml")

    return write


def test_an_empty_file_is_a_configuration(config):
    empty = config("")
    assert (empty.listen.socket, empty.listen.cookie, empty.listen.users) == (None, None, None)
    assert (empty.metrics, empty.level, empty.rules) == (None, "info", ())


def test_a_whole_file(config, tmp_path):
    (tmp_path / "cookie").write_bytes(b"secret\n")
    whole = config(f"""
        [listen]
        socket = "/run/kvmi-agent/agent.sock"
        cookie_file = "{tmp_path}/cookie"
        users = ["root", 1000]
        handshake_timeout = 2
        [metrics]
        address = "127.0.0.1:9477"
        [log]
        level = "warning"
        [[vms]]
        match = "web-*"
        [vms.handlers.log]
        events = ["cr3"]
        [[vms]]
        match = "*"
    """)
    assert whole.listen.socket == Path("/run/kvmi-agent/agent.sock")
    assert (whole.listen.cookie, whole.listen.users, whole.listen.handshake_timeout) == (b"secret\n", {0, 1000}, 2.0)
    assert (whole.metrics, whole.level) == (("127.0.0.1", 9477), "warning")
    assert [(rule.match, list(rule.handlers)) for rule in whole.rules] == [("web-*", ["log"]), ("*", [])]


def test_a_cookie_is_not_shown(config, tmp_path):
    (tmp_path / "cookie").write_bytes(b"secret")
    assert "secret" not in repr(config(f'listen.cookie_file = "{tmp_path}/cookie"'))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("[::1]:65535", ("::1", 65535)),
        ("/run/metrics.sock", Path("/run/metrics.sock")),
    ],
)
def test_metrics_have_an_address_and_port_or_a_path(config, text, address):
    assert config(f'metrics.address = "{text}"').metrics == address


@pytest.mark.parametrize(
    ("match", "matches"),
    [("webserver", True), ("web*", True), ("WEB*", False), (UUID_TEXT, True), (UUID_TEXT.upper(), True), ("db", False)],
)
def test_a_rule_matches_a_name_or_a_uuid(config, match, matches):
    rules = config(f'[[vms]]\nmatch = "{match}"')
    vm = PeerInfo(UUID(UUID_TEXT), "webserver")
    assert (rules.rule_for(vm) is not None) == matches


def test_a_vm_without_a_name_is_matched_by_its_uuid(config):
    rules = config(f'[[vms]]\nmatch = "{UUID_TEXT}"')
    assert rules.rule_for(PeerInfo(UUID(UUID_TEXT)))


def test_the_first_rule_that_matches_counts(config):
    rules = config('[[vms]]\nmatch = "web*"\n[[vms]]\nmatch = "*"')
    assert rules.rule_for(PeerInfo(UUID(UUID_TEXT), "webserver")).match == "web*"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("listen = 5", "listen = 5: a table belongs there"),
        ("listen.sokcet = '/x'", "listen.sokcet: there is no such key; there are socket, cookie_file, users"),
        ("[vm]", "vm: there is no such key; there are listen, metrics, log, vms"),
        ("listen.socket = 'relative'", "listen.socket = 'relative': an absolute path"),
        ("listen.socket = ''", "listen.socket = '': an absolute path"),
        ("listen.cookie_file = '/nowhere/cookie'", "listen.cookie_file = '/nowhere/cookie': .*No such file"),
        ("listen.cookie_file = '/dev/null'", "the file is empty"),
        ("listen.users = 'root'", "listen.users = 'root': a list"),
        ("listen.users = ['no such user']", "there is no user 'no such user'"),
        ("listen.users = [true]", "listen.users = .*a list of user names and ids"),
        ("listen.users = [-1]", "listen.users = .*a list of user names and ids"),
        ("listen.handshake_timeout = 0", "listen.handshake_timeout = 0: seconds, up to 3600"),
        ("listen.handshake_timeout = nan", "listen.handshake_timeout = nan: seconds"),
        ("listen.handshake_timeout = true", "listen.handshake_timeout = True: seconds"),
        ("metrics.address = '127.0.0.1'", "metrics.address = '127.0.0.1': IP:PORT"),
        ("metrics.address = '127.0.0.1:65536'", "metrics.address"),
        ("metrics.address = 'localhost:9477'", "metrics.address = 'localhost:9477': IP:PORT"),
        ("log.level = 'loud'", "log.level = 'loud': one of debug, info, warning, error"),
        ("log.level = []", "log.level"),
        ("vms = 5", r"vms = 5: \[\[vms\]\]"),
        ("vms = [5]", "vms = .*an array of tables"),
        ("[[vms]]", r"vms\[0\].match is missing: which VMs"),
        ("[[vms]]\nmatch = 5", r"vms\[0\].match = 5: a name or a UUID"),
        ("[[vms]]\nmatch = 'x'\nhandler = {}", r"vms\[0\].handler: there is no such key; there are match, handlers"),
        ("[[vms]]\nmatch = 'x'\nhandlers.log = 5", r"vms\[0\].handlers.log = 5: a table of the handler's options"),
        (
            "[[vms]]\nmatch = 'x'\nhandlers.lgo = {}",
            r"vms\[0\].handlers.lgo: no handler 'lgo' is installed.*: .*\blog\b",
        ),
        ("[[vms]]\nmatch = 'x'\nhandlers.log = {}", r"vms\[0\].handlers.log: .*its one option is events"),
        ("= 5", "at line 1"),
    ],
)
def test_an_error_names_the_file_the_key_and_what_belongs_there(config, tmp_path, text, error):
    with pytest.raises(ConfigError, match=f"^{re.escape(str(tmp_path))}/agent.toml: .*{error}"):
        config(text)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "nowhere.toml")


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "agent.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="utf-8"):
        load(tmp_path / "agent.toml")


def test_no_more_than_a_mebibyte_is_read(tmp_path):
    (tmp_path / "agent.toml").touch()
    os.truncate(tmp_path / "agent.toml", (1 << 20) + 1)
    with pytest.raises(ConfigError, match="more than 1048576 bytes"):
        load(tmp_path / "agent.toml")
