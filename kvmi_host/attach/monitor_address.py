# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a QEMU's monitor listens, from its command line: ``-qmp``, ``-qmp-pretty``, or ``-mon`` with ``-chardev``.

The syntax is that of qemu(1): options separated by commas, a comma in a value doubled, ``on`` where a value is left
out. Only UNIX sockets with a path, at which QEMU is the server, count: nobody can connect to others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import PurePosixPath

_OPTION = re.compile(r"(?:[^,]|,,)+")
_ON = {"on", "yes", "true", "y"}
_YES = "on"

Options = Mapping[str, str]


def monitor_sockets(pid: int, command_line: Sequence[str]) -> list[str]:
    """The paths of the sockets at which a QEMU serves QMP, in the order of its command line.

    :param pid: its process: relative paths are those of its working directory.
    """
    words = [(word.replace("--", "-", 1), value) for word, value in pairwise(command_line)]
    chardevs = {
        options.get("id", ""): options for word, value in words if word == "-chardev" and (options := _options(value))
    }
    found = []
    for word, value in words:
        if word in {"-qmp", "-qmp-pretty"} and value.startswith("unix:"):
            found.append(_options("path=" + value.removeprefix("unix:")))
        elif word == "-mon":
            options = _options(value, implied="chardev")
            if options.get("mode") == "control":
                found.append(chardevs.get(options.get("chardev", ""), {}))
    return [str(PurePosixPath(f"/proc/{pid}/cwd", options["path"])) for options in found if _served(options)]


def _options(value: str, implied: str = "backend") -> Options:
    """The options of one argument; the first one may be a value alone, of the option `implied`."""
    options = {}
    for number, part in enumerate(_OPTION.findall(value)):
        name, equals, given = part.replace(",,", ",").partition("=")
        if not equals and number == 0:
            name, given = implied, name
        elif not equals:
            given = _YES if not name.startswith("no") else ""
        options[name] = given
    return options


def _served(options: Options) -> bool:
    return "path" in options and options.get("server") in _ON and options.get("abstract") not in _ON
