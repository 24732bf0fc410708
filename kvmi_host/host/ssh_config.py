# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a name leads to by SSH, as ``ssh`` would find it: ssh_config(5), of which this takes HostName, Port, User,
IdentityFile, IdentitiesOnly, IdentityAgent, ProxyJump, ProxyCommand, HostKeyAlias and the files of known hosts.
"""

from __future__ import annotations

import getpass
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paramiko

from kvmi_host.host.errors import RemoteError

_PORT = 22
_DEEPEST = 16
_NAME = re.compile(
    r"(?:ssh://)?(?:(?P<user>[^@\s]+)@)?(?P<host>\[[^]\s]+]|[^-:\s/@][^:\s/@]*)(?::(?P<port>\d{1,5}))?/?"
)
_BARE_IPV6 = re.compile(
    r"(?:(?P<user>[^@\s]+)@)?(?P<host>[0-9A-Fa-f]*:[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*(?:%\w+)?)(?P<port>)"
)
_BLOCK = re.compile(r"\s*(?:host|match)\s", re.IGNORECASE)
_INCLUDE = re.compile(r"\s*include(?:\s*=\s*|\s+)(.+)", re.IGNORECASE)


@dataclass(frozen=True)
class Destination:
    """A host and the way to it.

    :ivar name: as it was asked for.
    :ivar key_name: under which its key is in the files of known hosts.
    :ivar known_hosts: files of host keys; some may not exist.
    :ivar identities: files of private keys; none: those that ssh takes by default.
    :ivar identities_only: no other keys of the agent than these.
    :ivar agent: whether the agent may be asked.
    :ivar jumps: names of the hosts that the way leads through, the nearest first.
    :ivar command: what to run instead of connecting, its standard streams being the connection.
    """

    name: str
    host: str
    port: int
    user: str
    key_name: str
    known_hosts: tuple[Path, ...]
    identities: tuple[Path, ...] = ()
    identities_only: bool = False
    agent: bool = True
    jumps: tuple[str, ...] = ()
    command: str | None = None

    def __str__(self) -> str:
        return f"{self.user}@{self.host}" + (f" port {self.port}" if self.port != _PORT else "")


def read_config(file: Path | None = None) -> str:
    """The configuration of SSH, as one text.

    :param file: instead of the user's own, which is followed by the system's.
    :raise RemoteError: it cannot be read.
    """
    if file is None:
        sources = [path for path in (Path("~/.ssh/config").expanduser(), Path("/etc/ssh/ssh_config")) if path.exists()]
    else:
        sources = [file]
    lines: list[str] = []
    for source in sources:
        try:
            lines += ["Host *", *_lines(source, _DEEPEST)]
        except OSError as error:
            raise RemoteError(f"{error.filename}: {error.strerror}") from error
        except ValueError as error:
            raise RemoteError(f"the configuration of SSH, {source}: {error}") from error
    return "\n".join(lines)


def _lines(file: Path, deepest: int) -> Iterator[str]:
    """The lines of a file, with those of what it includes: paramiko has no Include."""
    if not deepest:
        raise ValueError(f"{file}: includes go deeper than {_DEEPEST}")
    block = "Host *"
    for line in file.read_text(errors="replace").splitlines():
        if _BLOCK.match(line):
            block = line
        included = _INCLUDE.fullmatch(line)
        if not included:
            yield line
            continue
        # ssh_config(5): relative to ~/.ssh, or to /etc/ssh in the system's.
        folder = Path("/etc/ssh" if file.is_relative_to("/etc/ssh") else "~/.ssh").expanduser()
        for pattern in shlex.split(included[1]):
            path = folder / Path(pattern).expanduser()
            for found in sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor)))):
                yield from _lines(found, deepest - 1)
        yield block


def resolve(name: str, config: str) -> Destination:
    """Where a name leads to.

    :param name: ``[USER@]HOST[:PORT]``; an IPv6 address with a port has brackets.
    :param config: see :func:`read_config`.
    :raise RemoteError: it is no such name, or the configuration has something for it that cannot be used.
    """
    parts = _NAME.fullmatch(name) or _BARE_IPV6.fullmatch(name)
    if parts is None:
        raise RemoteError(f"{name!r} is no host: [USER@]HOST[:PORT], or a name of ~/.ssh/config")
    # The first value counts.
    given = [f"{option} {parts[option]}" for option in ("user", "port") if parts[option]]
    try:
        settings = paramiko.SSHConfig.from_text("\n".join(["Host *", *given, config]))
        found: dict[str, Any] = dict(settings.lookup(parts["host"].strip("[]")))
        port = int(found.get("port", _PORT))
    except (ImportError, ValueError, paramiko.SSHException) as error:
        raise RemoteError(f"{name}: the configuration of SSH: {error}") from error
    host = str(found["hostname"]).lower()
    command = found.get("proxycommand")
    jumps = str(found.get("proxyjump") or "none")
    files = shlex.split(found.get("userknownhostsfile", "~/.ssh/known_hosts ~/.ssh/known_hosts2"))
    files += shlex.split(found.get("globalknownhostsfile", "/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"))
    own_name = host if port == _PORT else f"[{host}]:{port}"
    return Destination(
        name=name,
        host=host,
        port=port,
        user=found.get("user") or getpass.getuser(),
        key_name=found.get("hostkeyalias", own_name),
        known_hosts=tuple(Path(file).expanduser() for file in files),
        identities=tuple(Path(file).expanduser() for file in found.get("identityfile", ())),
        identities_only=found.get("identitiesonly", "no").lower() in {"yes", "true"},
        agent=found.get("identityagent", "").lower() != "none",
        jumps=() if jumps.lower() == "none" else tuple(jump.strip() for jump in jumps.split(",")),
        command=None if command in {None, "none"} else str(command),
    )
