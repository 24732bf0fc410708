# SPDX-License-Identifier: LGPL-2.1-or-later
"""JUnit XML reports: adding what a suite could not see itself, making one of several.

Reports are written with each element on a line of its own, so line tools can count and find tests.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path

_COUNTS = ("tests", "failures", "errors", "skipped")


def _suites(report: Path) -> list[ElementTree.Element]:
    root = ElementTree.parse(report).getroot()
    return [root] if root.tag == "testsuite" else list(root.iter("testsuite"))


def _write(suites: Iterable[ElementTree.Element], report: Path) -> None:
    root = ElementTree.Element("testsuites")
    root.extend(suites)
    for element in root.iter():
        # What a test printed stays as it is; blanks between elements are ours to set.
        if element.tail is not None and not element.tail.strip():
            element.tail = None
    ElementTree.indent(root)
    report.parent.mkdir(parents=True, exist_ok=True)
    ElementTree.ElementTree(root).write(report, encoding="utf-8", xml_declaration=True)


def add_failure(report: Path, class_name: str, name: str, message: str, text: str) -> None:
    """Add a failed test of our own to a report, in place: for what goes wrong beside the tests."""
    suites = _suites(report)
    suite = suites[0] if suites else ElementTree.Element("testsuite", name="lab", tests="0", failures="0")
    case = ElementTree.SubElement(suite, "testcase", classname=class_name, name=name, time="0")
    ElementTree.SubElement(case, "failure", message=message).text = text
    for count in ("tests", "failures"):
        suite.set(count, str(int(suite.get(count, "0")) + 1))
    _write(suites or [suite], report)


def merge(reports: Iterable[Path], into: Path) -> dict[str, int]:
    """Make one report of several.

    :return: the sums of ``tests``, ``failures``, ``errors`` and ``skipped``.
    """
    suites = [suite for report in reports for suite in _suites(report)]
    _write(suites, into)
    return {count: sum(int(suite.get(count, "0")) for suite in suites) for count in _COUNTS}
