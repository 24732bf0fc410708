# SPDX-License-Identifier: LGPL-2.1-or-later
"""labgrid's places as lab hosts: a place's NetworkService says where its SSH server is.

What comes from the coordinator is whatever an exporter said: it is looked at before it goes into a file or to SSH.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from kvmi_host.lab.errors import LabError
from kvmi_host.lab.inventory import LabHost

_SSH = 22
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""A host's name is that of its folder in a report, too."""
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*|[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def lab_host(name: str, tags: Mapping[str, str], services: Mapping[str, Mapping[str, object]], folder: Path) -> LabHost:
    """The host behind a place.

    :param services: the parameters of its NetworkServices, by name. Of several, the one called ``default`` counts, as
        it does for labgrid.
    :param folder: where to put the configuration of SSH for a host that is behind another.
    :raise LabError: it has no such service, or one that leads nowhere.
    """
    if not _NAME.fullmatch(name):
        raise LabError(f"labgrid's place {name!r}: a host's name is letters, digits, dot, - and _, up to 64: rename it")
    if not services:
        raise LabError(
            f"labgrid's place {name} has no NetworkService: is its exporter connected, and does the place match it? "
            f"`labgrid-client -p {name} show` tells"
        )
    service = services.get("default") if len(services) > 1 else next(iter(services.values()))
    if service is None:
        raise LabError(
            f"labgrid's place {name} has several NetworkServices, {', '.join(sorted(services))}: "
            "call the one to take `default` (labgrid-client add-named-match)"
        )
    address, user = _text(name, service, "address", _HOST), _text(name, service, "username", _USER)
    port = service.get("port", _SSH)
    if isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 65536:
        raise LabError(f"labgrid's place {name}: its NetworkService has the port {port!r}, and there is none")
    extra = service.get("extra")
    if not isinstance(extra, dict) or not extra.get("proxy_required"):
        host = f"[{address}]" if ":" in address else address
        return LabHost(name, "ssh", f"{user}@{host}" + (f":{port}" if port != _SSH else ""), tags=tags)
    proxy = _text(name, extra, "proxy", _HOST)
    # Its own lines first, for the first value counts; what the user has for the proxy, and for all hosts, follows.
    lines = [f"Host {name}", f"HostName {address}", f"User {user}", f"Port {port}", f"ProxyJump {proxy}"]
    includes = [file for file in ("~/.ssh/config", "/etc/ssh/ssh_config") if Path(file).expanduser().exists()]
    config = folder / f"{name}.ssh"
    config.write_text("\n".join([*lines, "Host *", *(f"Include {file}" for file in includes), ""]))
    return LabHost(name, "ssh", name, config, tags=tags)


def _text(place: str, values: Mapping[str, object], key: str, allowed: re.Pattern[str]) -> str:
    value = values.get(key)
    if not isinstance(value, str) or not allowed.fullmatch(value):
        raise LabError(f"labgrid's place {place}: its NetworkService has the {key} {value!r}, which SSH cannot take")
    return value
