# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a VM's sessions may do at most, as its host's administrator has written down: a TOML file for each VM::

    allow = "observe"                              # the default; or "full", or a list of names as --allow takes
    commands = ["get-registers", "read-physical"]  # of a profile's commands, only these; all of them by default
    events = ["cr", "hypercall"]                   # only these events; all of them by default

It is ``NAME.toml`` or ``UUID.toml``, by the VM's name or UUID, in the folder /etc/kvmi-host/policies; the environment
variable KVMI_POLICIES names another folder. VMs without a file have no such limit.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from kvmi_host.attach.errors import PolicyRefused
from kvmi_host.attach.policy import OBSERVE, PROFILES, Allow, Policy, command_id, event_id, policy_for, within
from kvmi_host.attach.target import Target
from kvmi_host.protocol import command_name
from kvmi_host.protocol.ids import ALWAYS_ALLOWED, CHANGES_THE_GUEST

FOLDER_VARIABLE = "KVMI_POLICIES"
FOLDER = "/etc/kvmi-host/policies"
_MAX_FILE = 1 << 16  # bytes; a file with every name that there is has less than 2000
_KEYS = ("allow", "commands", "events")

T = TypeVar("T")


def policy_of(target: Target, allow: Allow | None = None, file: str | os.PathLike[str] | None = None) -> Policy:
    """What a session of this VM may do: what is asked for, if the VM's policy file allows all of it.

    :param allow: what is asked for, as :func:`~kvmi_host.attach.policy.policy_for` takes it; None: what the file says,
        and observing where there is no file.
    :param file: in place of the VM's own.
    :raise PolicyRefused: the file does not allow it, or cannot be used.
    :raise ValueError: `allow` names something that there is not.
    """
    asked = None if allow is None else policy_for(allow)
    path = Path(file) if file is not None else _file_of(target)
    if path is None:
        return asked or OBSERVE
    ceiling = read_policy(path)
    if asked is None:
        return ceiling
    try:
        return within(asked, ceiling)
    except ValueError as error:
        raise PolicyRefused(
            f"{path}: it does not allow {error}: ask for less, or without --allow for what the file has"
        ) from None


def read_policy(path: Path) -> Policy:
    """The policy in a file.

    :raise PolicyRefused: it cannot be read, others may have written it, or something in it is not known.
    """
    try:
        text = _read(path).decode()
        return _policy(tomllib.loads(text), _Lines(text), str(path))
    except OSError as error:
        raise PolicyRefused(f"{path}: the policy file cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError says the line
        raise PolicyRefused(f"{path}: {error}") from error


def _file_of(target: Target) -> Path | None:
    """The VM's own policy file, if there is one."""
    folder = Path(os.environ.get(FOLDER_VARIABLE) or FOLDER)
    names = [str(target.uuid)] if target.uuid != UUID(int=0) else []
    if "/" not in target.name:  # a VMM may call itself what it likes
        names.append(target.name)
    found = [path for path in (folder / f"{name}.toml" for name in names) if _is_there(path)]
    if len(found) > 1:
        raise PolicyRefused(f"{found[0]} and {found[1]} are both for {target.name}: remove one of them")
    return found[0] if found else None


def _is_there(path: Path) -> bool:
    """Whether there is a file, or a link to none. One that cannot be looked for is not one that is missing."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # the VM calls itself so; no file can
            return False
        raise PolicyRefused(f"{path}: whether there is a policy file cannot be seen: {error.strerror}") from error
    return True


def _read(path: Path) -> bytes:
    # O_NONBLOCK: not to wait for who writes to a pipe.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_uid not in (0, os.geteuid()):
            raise ValueError(f"it belongs to user {status.st_uid}, who could allow anything: chown root {path}")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ValueError(f"others may write it, and could allow anything: chmod go-w {path}")
        data = file.read(_MAX_FILE + 1)
    if len(data) > _MAX_FILE:
        raise ValueError(f"it is larger than {_MAX_FILE} bytes")
    return data


class _Lines:
    """Where in the file something is, which the parser does not tell."""

    def __init__(self, text: str) -> None:
        self._lines = text.splitlines()

    def of(self, key: str, name: str | None = None) -> str:
        """``line N, KEY``: where `key` stands, or the first `name` from there on."""
        at = self._first(rf"""\s*\[*\s*["']?{re.escape(key)}\b""", 0)
        if name is not None:
            at = self._first(rf"""[^#]*["']{re.escape(name)}["']""", at)
        return f"line {at + 1}, {key}"

    def _first(self, pattern: str, since: int) -> int:
        found = re.compile(pattern)
        return next((at for at in range(since, len(self._lines)) if found.match(self._lines[at])), since)


def _policy(values: dict[str, Any], lines: _Lines, path: str) -> Policy:
    for key in values:
        if key not in _KEYS:
            raise ValueError(f"{lines.of(key)}: there is no such key; there are {', '.join(_KEYS)}")
    policy = _allow(values.get("allow", OBSERVE.name), lines)
    if "commands" in values:
        if policy.commands is not None:
            raise ValueError(f"{lines.of('commands')}: allow lists the commands already: name them there")
        policy = replace(policy, commands=_commands(values["commands"], policy, lines))
    if "events" in values:
        if policy.events is not None:
            raise ValueError(f"{lines.of('events')}: allow lists events already: name them there")
        events = _names("events", values["events"], lines)
        policy = replace(policy, events=frozenset(_known("events", name, event_id, lines) for name in events))
    return replace(policy, name=path)


def _allow(value: object, lines: _Lines) -> Policy:
    if isinstance(value, str) and value in PROFILES:
        return PROFILES[value]
    if isinstance(value, str):
        raise ValueError(f"{lines.of('allow')} = {value!r}: {', '.join(PROFILES)} or a list of names belongs there")
    names = _names("allow", value, lines)
    for name in names:
        _known("allow", name, lambda name: policy_for([name]), lines)
    return policy_for(names)


def _commands(value: object, profile: Policy, lines: _Lines) -> frozenset[int]:
    names = {name: _known("commands", name, command_id, lines) for name in _names("commands", value, lines)}
    for name, command in names.items():
        if profile.observe and command in CHANGES_THE_GUEST:
            where = lines.of("commands", name)
            raise ValueError(f'{where}: {command_name(command)} changes the guest: that takes allow = "full"')
    return frozenset(names.values()) - ALWAYS_ALLOWED


def _names(key: str, value: object, lines: _Lines) -> Sequence[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{lines.of(key)} = {value!r}: a list of names belongs there")
    return value


def _known(key: str, name: str, look_up: Callable[[str], T], lines: _Lines) -> T:
    try:
        return look_up(name)
    except ValueError as error:
        raise ValueError(f"{lines.of(key, name)}: {error}") from None
