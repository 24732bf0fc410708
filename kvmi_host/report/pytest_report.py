# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host's ``junit.xml``, which its pytest wrote: which test of suite.json a case is, and what pytest showed of it.

It is bounded as a file, and expat, which reads it, bounds what entities make of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

from kvmi_host.host.printable import printable
from kvmi_host.lab import junit
from kvmi_host.report.errors import ReportError

_MAX_FILE = 64 << 20  # bytes
_MAX_DEPTH = 8  # of elements below a suite; pytest has three
_MAX_TRACE = 6_000  # characters; the end counts, which says what went wrong
_SUITE = re.compile(r"(?:.*\.)?(?:hardware|hwtest)\.")
"""What stands before the module in a class name, whichever way the suite was started."""


def read_junit(file: Path) -> list[Element]:
    """The suites of a file.

    :raise ReportError: it cannot be read, and why.
    """
    try:
        if file.stat().st_size > _MAX_FILE:
            raise ReportError(f"it has more than {_MAX_FILE >> 20} MiB")
        suites = junit.suites(file)
    except (OSError, ValueError, ParseError) as error:
        raise ReportError(printable(str(error))) from error
    level: list[Element] = suites
    for _ in range(_MAX_DEPTH):
        level = [inner for element in level for inner in element]
    if level:
        raise ReportError(f"its elements are more than {_MAX_DEPTH} deep")  # who writes them goes down by recursion
    return suites


def module_of(case: Element) -> str:
    """The module that a test is in, with its classes, by the name of its class."""
    return _SUITE.sub("", case.get("classname", ""), count=1) or "suite"


def shown(suites: Iterable[Element]) -> Mapping[str, str]:
    """What pytest showed of each test that failed, at the end, by the test's name in suite.json."""
    found = {}
    for suite in suites:
        for case in suite.iter("testcase"):
            text = case.findtext("failure") or case.findtext("error")
            if text:
                module, *classes = module_of(case).split(".")
                found["::".join([f"{module}.py", *classes, case.get("name", "")])] = printable(text[-_MAX_TRACE:])
    return found
