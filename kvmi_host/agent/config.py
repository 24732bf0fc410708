# SPDX-License-Identifier: LGPL-2.1-or-later
"""The agent's configuration, a TOML file::

    [listen]
    socket = "/run/kvmi-agent/agent.sock"    # not needed where systemd passes the socket
    cookie_file = "/etc/kvmi-host/cookie"    # the secret shared with the VMs' side; none by default
    users = ["root", 1000]                   # who may connect; root and the agent's own user by default
    handshake_timeout = 10.0                 # seconds

    [metrics]
    address = "127.0.0.1:9477"               # or the path of a UNIX socket; none by default

    [log]
    level = "info"                           # debug, info, warning or error

    [[vms]]                                  # the first that matches counts
    match = "web-*"                          # a name, or a UUID; * and ? as in a shell
    [vms.handlers.log]                       # a plugin's name, and under it its options
    events = ["cr3", "hypercall"]

Every error names the key, what is there, and what may be. Keys that nobody reads are errors.
"""

from __future__ import annotations

import pwd
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

from kvmi_host.agent.errors import ConfigError
from kvmi_host.agent.plugins import Setup, set_up_by
from kvmi_host.introspect import PeerInfo

_MAX_FILE = 1 << 20  # bytes, of the configuration
_MAX_COOKIE = 4096  # bytes
_MAX_TIMEOUT = 3600.0  # seconds
_MAX_PORT = 65535
_LEVELS = ("debug", "info", "warning", "error")
_HANDSHAKE_TIMEOUT = 10.0  # seconds, as QEMU's

_EMPTY: Mapping[str, Any] = {}

T = TypeVar("T")
D = TypeVar("D")


@dataclass(frozen=True, slots=True)
class Listen:
    """``cookie`` is the secret itself; ``users`` are ids, None: root and the agent's own; times are in seconds."""

    socket: Path | None = None
    cookie: bytes | None = field(default=None, repr=False)
    users: frozenset[int] | None = None
    handshake_timeout: float = _HANDSHAKE_TIMEOUT


@dataclass(frozen=True, slots=True)
class Rule:
    """What is done with the VMs that it matches; ``handlers`` by the plugins' names."""

    match: str
    handlers: Mapping[str, Setup]

    def matches(self, vm: PeerInfo) -> bool:
        """Whether it is for that VM."""
        return fnmatchcase(vm.name or "", self.match) or fnmatchcase(str(vm.uuid), self.match.lower())


@dataclass(frozen=True, slots=True)
class Config:
    """A whole file. ``metrics``: an address and port, or a path; None where there shall be none."""

    listen: Listen
    metrics: tuple[str, int] | Path | None
    level: str
    rules: tuple[Rule, ...]

    def rule_for(self, vm: PeerInfo) -> Rule | None:
        """The first rule that matches; None: nothing is done with that VM."""
        return next((rule for rule in self.rules if rule.matches(vm)), None)


def load(path: Path) -> Config:
    """Read a file, the cookie, and the handlers' plugins.

    :raise ConfigError: something of it cannot be used.
    """
    try:
        return _config(tomllib.loads(_read(path, _MAX_FILE).decode()))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, ConfigError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _config(values: Mapping[str, Any]) -> Config:
    top = _Table(values, "")
    listen, metrics, log = (
        _Table(top.take(name, _table, "a table", _EMPTY), name) for name in ("listen", "metrics", "log")
    )
    rules = top.take("vms", _tables, "[[vms]], an array of tables,", ())
    config = Config(
        listen=Listen(
            socket=listen.take("socket", _path, "an absolute path", None),
            cookie=listen.take("cookie_file", _cookie, "the absolute path of a file with a secret", None),
            users=listen.take("users", _users, "a list of user names and ids", None),
            handshake_timeout=listen.take(
                "handshake_timeout", _seconds, f"seconds, up to {_MAX_TIMEOUT:g},", _HANDSHAKE_TIMEOUT
            ),
        ),
        metrics=metrics.take("address", _address, "IP:PORT, [IPv6]:PORT or an absolute path", None),
        level=log.take("level", _level, f"one of {', '.join(_LEVELS)}", "info"),
        rules=tuple(_rule(_Table(rule, f"vms[{index}]")) for index, rule in enumerate(rules)),
    )
    for table in (top, listen, metrics, log):
        table.nothing_left()
    return config


def _rule(table: _Table) -> Rule:
    match = table.take("match", _text, "a name or a UUID, with * and ? as in a shell,", None)
    if match is None:
        raise ConfigError(f'{table.name}.match is missing: which VMs? match = "*" is all of them')
    handlers = _Table(table.take("handlers", _table, "a table", _EMPTY), f"{table.name}.handlers")
    setups = {}
    for name in list(handlers.values):
        options = handlers.take(name, _table, "a table of the handler's options", _EMPTY)
        try:
            setups[name] = set_up_by(name, options)
        except ConfigError as error:
            raise ConfigError(f"{handlers.name}.{name}: {error}") from error
    table.nothing_left()
    return Rule(match, setups)


class _Table:
    """A table of the file, from which each key is taken once.

    :ivar values: what was not taken yet.
    """

    def __init__(self, values: Mapping[str, Any], name: str) -> None:
        self.values = dict(values)
        self.name = name
        self._known: list[str] = []

    def take(self, key: str, read: Callable[[Any], T], allowed: str, default: D) -> T | D:
        """What `read` makes of a key's value.

        :param allowed: what may be there, for the error.
        :param default: where the key is not there.
        :raise ConfigError: `read` raised ValueError.
        """
        self._known.append(key)
        if key not in self.values:
            return default
        value = self.values.pop(key)
        try:
            return read(value)
        except ValueError as error:
            why = f" ({error})" if str(error) else ""
            raise ConfigError(f"{self._path(key)} = {value!r}: {allowed} belongs there{why}") from error

    def nothing_left(self) -> None:
        """
        :raise ConfigError: there are keys that nobody took.
        """
        for key in self.values:
            there = ", ".join(self._known)
            raise ConfigError(f"{self._path(key)}: there is no such key; there are {there}")

    def _path(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key


# -- what values are read as; each raises ValueError for one that it does not take


def _table(value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError
    return value


def _tables(value: object) -> Sequence[Mapping[str, Any]]:
    if not isinstance(value, list):
        raise ValueError
    return [_table(item) for item in value]


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _path(value: object) -> Path:
    path = Path(_text(value))
    if not path.is_absolute():
        raise ValueError
    return path


def _cookie(value: object) -> bytes:
    try:
        cookie = _read(_path(value), _MAX_COOKIE)
    except OSError as error:
        raise ValueError(error.strerror) from error
    if not cookie:
        raise ValueError("the file is empty")
    return cookie


def _users(value: object) -> frozenset[int]:
    if not isinstance(value, list):
        raise ValueError
    return frozenset(map(_user, value))


def _user(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    name = _text(value)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise ValueError(f"there is no user {name!r}") from None


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _MAX_TIMEOUT:
        raise ValueError
    return float(value)


def _address(value: object) -> tuple[str, int] | Path:
    text = _text(value)
    if text.startswith("/"):
        return Path(text)
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) <= _MAX_PORT):
        raise ValueError
    return str(ip_address(host.removeprefix("[").removesuffix("]"))), int(port)


def _level(value: object) -> str:
    if value not in _LEVELS:
        raise ValueError
    return str(value)


def _read(path: Path, limit: int) -> bytes:
    """A file, which is no larger than `limit` bytes.

    :raise OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(0, f"more than {limit} bytes")
    return data
