# SPDX-License-Identifier: LGPL-2.1-or-later
"""A lab's hosts from an inventory of Ansible, as Ansible itself reads it: its plugins and precedence are its own."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvmi_host.lab.errors import InventoryError
from kvmi_host.lab.inventory import parse_inventory
from kvmi_host.lab.paths import program

_DEADLINE = 300  # seconds: it may ask a cloud
_DEEPEST = 32
_OURS = re.compile(r"kvmi_([a-z][a-z0-9_]*)")
_OF_ALL = {"all", "ungrouped", "_meta"}
_IN_SSH_CONFIG = re.compile(r"[^\s\"'\\]+")
_NOT_TAKEN = ("ansible_ssh_common_args", "ansible_ssh_extra_args")


def import_inventory(source: Path, group: str = "all", ssh_config: Path | None = None) -> tuple[str, str]:
    """An inventory as :func:`kvmi_host.lab.inventory.read_inventory` reads it.

    :param group: only the hosts of this group, and of those in it.
    :param ssh_config: where the second text will be.
    :return: the inventory, and what of it belongs into a configuration of SSH: the files of keys.
    :raise InventoryError: Ansible does not read it, or a host has a key of its own and there is no `ssh_config`.
    """
    told = _ask(source)
    groups = sorted(set(told) - _OF_ALL)
    if group not in {"all", *groups}:
        raise InventoryError(f"{source}: there is no group {group}; there are {', '.join(groups) or 'none'}")
    variables = _table(_table(told.get("_meta", {})).get("hostvars", {}))
    members = {name: _members(told, name) for name in groups}
    lines = [f"# The group {group} of {source.name}, by `kvmi-host inventory import`."]
    config = []
    for name in _members(told, group):
        own = _table(variables.get(name, {}))
        tags = {other: "yes" for other in groups if name in members[other]}
        tags |= {found[1]: str(value) for key, value in own.items() if (found := _OURS.fullmatch(key))}
        deadline = tags.pop("deadline", "")
        lines += ["", f"[hosts.{_quoted(name)}]"]
        if key := own.get("ansible_ssh_private_key_file"):
            if ssh_config is None:
                raise InventoryError(f"{name} has a key of its own, {key}: say with --ssh-config where to write that")
            lines += [f"address = {_quoted(name)}", f"ssh-config = {_quoted(str(ssh_config.absolute()))}"]
            config += _ssh_block(name, own)
        else:
            lines.append(f"address = {_quoted(_address(name, own))}")
        lines += [f"deadline = {deadline}"] if deadline else []
        lines += [f"tags = {{ {', '.join(f'{_quoted(tag)} = {_quoted(text)}' for tag, text in tags.items())} }}"]
        lines += [f"# not taken over: {other} = {_quoted(str(own[other]))}" for other in _NOT_TAKEN if other in own]
    text = "\n".join([*lines, ""])
    try:
        parse_inventory(text, source.parent)
    except InventoryError as error:
        raise InventoryError(f"{source}: what follows from it cannot be used: {error}") from None
    return text, "\n".join([*config, "Host *", "Include ~/.ssh/config", ""])


def _members(told: Mapping[str, Any], group: str, deepest: int = _DEEPEST) -> list[str]:
    """The hosts of a group, and of those in it, each once."""
    table = _table(told.get(group, {}))
    found = dict.fromkeys(map(str, table.get("hosts", ())))
    for child in table.get("children", ()) if deepest else ():
        found |= dict.fromkeys(_members(told, str(child), deepest - 1))
    return list(found)


def _address(name: str, own: Mapping[str, Any]) -> str:
    host, user, port = (str(own.get(f"ansible_{what}", "")) for what in ("host", "user", "port"))
    host = host or name
    if port and ":" in host:
        host = f"[{host}]"
    return f"{user}{'@' if user else ''}{host}{':' if port else ''}{port}"


def _ssh_block(name: str, own: Mapping[str, Any]) -> list[str]:
    """What SSH's configuration has for a host."""
    lines = []
    for option, value in (
        ("Host", name),
        ("HostName", own.get("ansible_host")),
        ("User", own.get("ansible_user")),
        ("Port", own.get("ansible_port")),
        ("IdentityFile", own.get("ansible_ssh_private_key_file")),
    ):
        if value is not None and not _IN_SSH_CONFIG.fullmatch(str(value)):
            raise InventoryError(f"{name}: {value!r} cannot stand in a configuration of SSH: it has blanks or quotes")
        lines += [f"{option} {value}"] if value is not None else []
    return lines


def _quoted(text: str) -> str:
    """As TOML has it, whose basic strings are JSON's but for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


def _ask(source: Path) -> Mapping[str, Any]:
    argv = [program("ansible-inventory", "ansible-core"), "-i", str(source), "--list"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=_DEADLINE)
        if done.returncode or not source.exists():
            said = done.stderr.strip() or f"there is no {source}"
            raise InventoryError(f"{source}: ansible-inventory does not read it: {said[-1000:]}")
        return _table(json.loads(done.stdout))
    except (subprocess.TimeoutExpired, ValueError, RecursionError) as error:
        raise InventoryError(f"{source}: ansible-inventory did not answer as it should: {error}") from error


def _table(value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InventoryError(f"ansible-inventory says {value!r} where a table belongs")
    return value
