# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hosts of a lab, a TOML file::

    [defaults]                              # of every host; each may say otherwise
    deadline = 7200                         # seconds that its suite may take
    [hosts.lab7]
    address = "root@lab7.example.org"       # [user@]host[:port], or a name of the configuration of SSH
    ssh-config = "lab.ssh"                  # relative to this file; by default ~/.ssh/config
    tags = { vendor = "intel", generation = "skylake", kernel = "6.1" }
    [hosts.box-amd]
    kind = "box"                            # a host in a box of this machine
    cpu = "amd"                             # or "intel": the one in Bochs
    kernel = "6.1"

Every error names the file, the key, and what may be there. Keys that nobody reads are errors.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from kvmi_host.host.kernels import Series
from kvmi_host.host.vendor import Vendor
from kvmi_host.lab.errors import InventoryError

DEADLINE = 7200.0
"""Seconds that a host's suite may take, unless the inventory says otherwise."""

_LONGEST = 7 * 86400.0
_MOST = 1 << 20  # bytes of a file
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_OF_SSH, _OF_BOX = ("address", "ssh-config"), ("cpu", "kernel")

_Key = tuple[Callable[[Any], Any], str]
"""What reads the value of a key, and what may be there."""


@dataclass(frozen=True)
class LabHost:
    """A host of the lab.

    :ivar kind: how it is reached: by SSH, or it is brought up here.
    :ivar address: ``[user@]host[:port]``, or a name of the configuration of SSH; empty for a box.
    :ivar ssh_config: that configuration; None: the user's own.
    :ivar cpu: a box's.
    :ivar kernel: a box's; None for another host, which runs what it runs.
    :ivar deadline: seconds that its suite may take.
    """

    name: str
    kind: Literal["ssh", "box"]
    address: str = ""
    ssh_config: Path | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    cpu: Vendor = Vendor.AMD
    kernel: Series | None = None
    deadline: float = DEADLINE


def read_inventory(path: Path) -> list[LabHost]:
    """The hosts of a file, in its order.

    :raise InventoryError: something of it cannot be used.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MOST + 1)
        if len(data) > _MOST:
            raise InventoryError(f"it has more than {_MOST} bytes")
        return parse_inventory(data.decode(), path.parent)
    except OSError as error:
        raise InventoryError(f"{path}: the inventory cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, InventoryError) as error:
        raise InventoryError(f"{path}: {error}") from None


def parse_inventory(text: str, folder: Path) -> list[LabHost]:
    """The hosts of an inventory's text.

    :param folder: what paths in it are relative to.
    :raise InventoryError: something of it cannot be used.
    """
    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InventoryError(f"it is no TOML: {error}") from error
    return _hosts(values, folder)


def chosen(hosts: Iterable[LabHost], limits: Sequence[str]) -> list[LabHost]:
    """The hosts that are meant.

    :param limits: ``NAME``, with * and ? as in a shell: any of these; ``TAG=VALUE``: one of the values for each tag
        that is named. None: all hosts.
    :raise InventoryError: a limit that no host meets, or none that meets them together.
    """
    hosts = list(hosts)
    names = [limit for limit in limits if "=" not in limit]
    tags: dict[str, list[str]] = {}
    for limit in limits:
        tag, there, value = limit.partition("=")
        if there:
            tags.setdefault(tag, []).append(value)
    there_are = ", ".join(host.name for host in hosts)
    for name in names:
        if not any(fnmatchcase(host.name, name) for host in hosts):
            raise InventoryError(f"no host is called {name}; there are {there_are}")
    found = [host for host in hosts if not names or any(fnmatchcase(host.name, name) for name in names)]
    for tag, values in tags.items():
        found = [host for host in found if host.tags.get(tag) in values]
    if not found:
        known = sorted({f"{tag}={value}" for host in hosts for tag, value in host.tags.items()})
        raise InventoryError(f"no host meets {' '.join(limits)}; there are {there_are}, tagged {', '.join(known)}")
    return found


def _hosts(values: Mapping[str, Any], folder: Path) -> list[LabHost]:
    top = _settings(values, "", {"defaults": (_table, "a table"), "hosts": (_table, "a table")})
    defaults = _settings(top.get("defaults", {}), "defaults", _KEYS)
    if not top.get("hosts"):
        raise InventoryError('hosts: none is there: [hosts.NAME], and under it address = "root@HOST" or kind = "box"')
    found = []
    for name, table in top["hosts"].items():
        where = f"hosts.{name}"
        if not _NAME.fullmatch(name):
            raise InventoryError(f"{where}: a host's name is letters, digits, dot, - and _, up to 64")
        if not isinstance(table, dict):
            raise InventoryError(f"{where} = {table!r}: a table belongs there")
        own = _settings(table, where, _KEYS)
        make, others = (_box, _OF_SSH) if {**defaults, **own}.get("kind") == "box" else (_ssh, _OF_BOX)
        if strange := own.keys() & others:
            raise InventoryError(f"{where}.{min(strange)}: a host of this kind has none: take it out, or change kind")
        tags = {**defaults.get("tags", {}), **own.get("tags", {})}
        found.append(make(name, where, {**defaults, **own, "tags": tags}, folder))
    return found


def _box(name: str, where: str, values: Mapping[str, Any], _folder: Path) -> LabHost:
    cpu, kernel = values.get("cpu", Vendor.AMD), values.get("kernel", Series.V6_1)
    if cpu is Vendor.INTEL and kernel is Series.DEBUG:
        raise InventoryError(f"{where}.kernel: the debug kernel has no driver for the disks of the Intel host")
    tags = {"vendor": str(cpu), "generation": "emulated", "kernel": str(kernel), **values["tags"]}
    deadline = values.get("deadline", DEADLINE)
    return LabHost(name, "box", tags=tags, cpu=cpu, kernel=kernel, deadline=deadline)


def _ssh(name: str, where: str, values: Mapping[str, Any], folder: Path) -> LabHost:
    if "address" not in values:
        raise InventoryError(f'{where}.address is missing: "[user@]host[:port]" belongs there, or kind = "box"')
    config = values.get("ssh-config")
    place = folder / Path(config).expanduser() if config else None
    return LabHost(name, "ssh", values["address"], place, values["tags"], deadline=values.get("deadline", DEADLINE))


def _settings(values: Mapping[str, Any], where: str, keys: Mapping[str, _Key]) -> dict[str, Any]:
    """What a table says, each value read as its key has it."""
    found = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else key
        if key not in keys:
            raise InventoryError(f"{path}: there is no such key; there are {', '.join(keys)}")
        read, allowed = keys[key]
        try:
            found[key] = read(value)
        except ValueError:
            raise InventoryError(f"{path} = {value!r}: {allowed} belongs there") from None
    return found


# -- what values are read as; each raises ValueError for one that it does not take


def _table(value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _kind(value: object) -> str:
    if value not in ("ssh", "box"):
        raise ValueError
    return str(value)


def _tags(value: object) -> Mapping[str, str]:
    return {tag: _text(text) for tag, text in _table(value).items()}


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _LONGEST:
        raise ValueError
    return float(value)


_KEYS: Mapping[str, _Key] = {
    "kind": (_kind, '"ssh" or "box"'),
    "address": (_text, '"[user@]host[:port]"'),
    "ssh-config": (_text, "a path"),
    "tags": (_tags, 'a table of texts, as in { generation = "skylake", kernel = "6.1" },'),
    "cpu": (Vendor, f"one of {', '.join(Vendor)}"),
    "kernel": (Series, f"one of {', '.join(Series)}, as a text,"),
    "deadline": (_seconds, f"seconds, up to {_LONGEST:g},"),
}
"""Of a host."""
