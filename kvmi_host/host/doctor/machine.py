# SPDX-License-Identifier: LGPL-2.1-or-later
"""What was seen of a machine: the records that the script ``survey`` writes there, in one go.

The script is the same for this machine and for one behind SSH, which needs nothing of ours. What it says of another
machine is not trusted: it is bounded, and its text has no control characters.
"""

from __future__ import annotations

import re
import subprocess
from base64 import b64decode
from binascii import Error as NotBase64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, Self

from kvmi_host.host.errors import SurveyError
from kvmi_host.host.printable import printable

SURVEY = Path(__file__).with_name("survey")
DEADLINE = 180.0
"""Seconds for the whole survey. A program that hangs is given up by the script after 30."""
MOST = 4 << 20
"""Bytes that another machine's survey may have."""
_NOT_IN_TIME = 124
_STAT = re.compile(r"([^|]+)\|([0-7]{1,4})\|([^|]*)\|(\d+)\|([^|]*)\|(\d+)\|([^|]*)")


class Said(NamedTuple):
    """What a program wrote, both streams in one, and its exit status; -1 for one that the survey does not tell."""

    text: str
    status: int

    @property
    def in_time(self) -> bool:
        """Whether it ended by itself."""
        return self.status != _NOT_IN_TIME

    @property
    def last_line(self) -> str:
        """The last thing it wrote."""
        return self.text.splitlines()[-1].strip() if self.text else "nothing"


class Status(NamedTuple):
    """What ``stat`` says of a file. ``label``: SELinux's, ``?`` where there is none."""

    kind: str
    mode: int
    owner: str
    group: str
    label: str = "?"

    def __str__(self) -> str:
        label = "" if self.label == "?" else f" {self.label}"
        return f"{self.mode:04o} {self.owner}:{self.group}{label}"


class User(NamedTuple):
    """Who looked. ``groups``: the names of all of the user's."""

    name: str
    root: bool
    groups: frozenset[str]


class Shell(Protocol):
    """Runs a command on another machine: see :class:`kvmi_host.host.remote.Remote`."""

    def run(self, line: str, *, stdin: bytes, deadline: float, most: int) -> subprocess.CompletedProcess[bytes]: ...


class Machine:
    """What was seen of a machine. Paths are absolute.

    :param files: contents of files.
    :param denied: files that the user may not read.
    :param there: paths of which it is known only that they exist.
    :param statuses: owners and modes.
    :param programs: what programs said, by what they were asked.
    """

    def __init__(
        self,
        files: Mapping[str, bytes] | None = None,
        denied: Sequence[str] = (),
        there: Sequence[str] = (),
        statuses: Mapping[str, Status] | None = None,
        programs: Mapping[str, Said] | None = None,
    ) -> None:
        self._files = dict(files or {})
        self._denied = frozenset(denied)
        self._there = frozenset(there)
        self._statuses = dict(statuses or {})
        self._programs = dict(programs or {})

    @classmethod
    def parse(cls, records: bytes) -> Self:
        """Read the script's records. What is none, or of no known kind, is passed over.

        :raise SurveyError: they are not whole.
        """
        lines = records.split(b"\n")
        if b"end" not in lines[-2:]:
            said = printable(records[-200:].decode(errors="replace"))
            raise SurveyError(
                f"looking at the host did not come to its end; the last that it said: {said or 'nothing'}"
            )
        files: dict[str, bytes] = {}
        denied: list[str] = []
        there: list[str] = []
        statuses: dict[str, Status] = {}
        programs: dict[str, Said] = {}
        for line in lines:
            kind, *fields = line.split(b"\t")
            name = printable(fields[0].decode(errors="replace")) if fields else ""
            match kind, fields[1:]:
                case b"file", [content]:
                    files[name] = _content(content)
                case b"denied", []:
                    denied.append(name)
                case b"there", []:
                    there.append(name)
                case b"stat", [status]:
                    if found := _STAT.fullmatch(printable(status.decode(errors="replace"))):
                        kind_of, mode, *names, label = found.groups()
                        owner, group = (_named(*names[at : at + 2]) for at in (0, 2))
                        statuses[name] = Status(kind_of, int(mode, 8), owner, group, label)
                case b"said", [content, ended]:
                    text = printable(_content(content).decode(errors="replace"))
                    programs[name] = Said(text, int(ended) if re.fullmatch(rb"[0-9]{1,3}", ended) else -1)
        return cls(files, denied, there, statuses, programs)

    def read(self, path: str) -> str | None:
        """A file's text without what is blank around it; None if it is not there, or not for this user."""
        content = self.read_bytes(path)
        return None if content is None else printable(content.decode(errors="replace"))

    def read_bytes(self, path: str) -> bytes | None:
        """A file's content; None if it is not there, or not for this user."""
        return self._files.get(path)

    def denies(self, path: str) -> bool:
        """Whether a file is there, and not for this user to read."""
        return path in self._denied

    def has(self, path: str) -> bool:
        """Whether there is such a thing."""
        return path in self._there or path in self._files or path in self._statuses or path in self._denied

    def match(self, pattern: str) -> list[re.Match[str]]:
        """What of the paths that are there matches a regular expression, in the order of their names."""
        paths = sorted(self._there | self._files.keys() | self._statuses.keys())
        return [found for path in paths if (found := re.fullmatch(pattern, path))]

    def status(self, path: str) -> Status | None:
        """Owner and mode; None if it is not there, or not for this user to see."""
        return self._statuses.get(path)

    def said(self, name: str) -> Said | None:
        """What a program said; None if there is no such program."""
        return self._programs.get(name)

    def said_by(self, prefix: str) -> dict[str, Said]:
        """What the programs said whose name begins so; by the rest of their name."""
        return {name.removeprefix(prefix): said for name, said in self._programs.items() if name.startswith(prefix)}

    @property
    def kernel(self) -> str:
        """The release of the kernel that runs; empty if unknown."""
        said = self.said("kernel")
        return said.text if said else ""

    @property
    def user(self) -> User:
        """Who looked."""
        said = self.said("user")
        text = said.text if said else ""
        names = re.findall(r"\(([^)]*)\)", text)
        return User(names[0] if names else "this user", text.startswith("uid=0("), frozenset(names[1:]))


def this_machine(python: str = "", root: Path = Path("/")) -> Machine:
    """Look at this machine, as this user.

    :param python: the interpreter that asks for KVM's capabilities; the host's own, if empty.
    :param root: the folder that stands for its root folder.
    :raise SurveyError: there is no shell, or it took too long.
    """
    argv = ["sh", "-s", "--", str(root), python]
    try:
        done = subprocess.run(argv, input=SURVEY.read_bytes(), capture_output=True, check=False, timeout=DEADLINE)
    except FileNotFoundError:
        raise SurveyError("there is no sh to look at this host with") from None
    except subprocess.TimeoutExpired:
        raise SurveyError(f"looking at this host did not end within {DEADLINE:g} s: is a program stuck?") from None
    return Machine.parse(done.stdout)


def machine_behind(shell: Shell, deadline: float = DEADLINE, *, kernel_alone: bool = False) -> Machine:
    """Look at another machine, as the user that the connection is of.

    :param deadline: seconds.
    :param kernel_alone: only at CPU, KVM and kernel, which takes a tenth of the time.
    :raise SurveyError: what came was not whole: no POSIX shell there, or not in time.
    :raise RemoteError: the connection broke.
    """
    part = " kernel" if kernel_alone else ""
    done = shell.run(f"sh -s -- / ''{part}", stdin=SURVEY.read_bytes(), deadline=deadline, most=MOST)
    return Machine.parse(done.stdout or done.stderr)


def _named(name: str, number: str) -> str:
    """A user or group by name, or by number where the host has no name for it."""
    return number if name == "UNKNOWN" else name


def _content(field: bytes) -> bytes:
    try:
        return b64decode(field, validate=True)
    except NotBase64:
        return b""
