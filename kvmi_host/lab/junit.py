# SPDX-License-Identifier: LGPL-2.1-or-later
"""JUnit XML reports: adding what a suite could not see itself, making one of several.

Reports are written with each element on a line of its own, so line tools can count and find tests.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path

_COUNTS = ("tests", "failures", "errors", "skipped")


def suites(report: Path) -> list[ElementTree.Element]:
    """The test suites of a report.

    :raise ParseError: it is no XML.
    """
    root = ElementTree.parse(report).getroot()
    return [root] if root.tag == "testsuite" else list(root.iter("testsuite"))


def write(suites: Iterable[ElementTree.Element], report: Path) -> None:
    """Make a report of test suites, in a folder that is made if it is not there."""
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
    there = suites(report)
    suite = there[0] if there else ElementTree.Element("testsuite", name="lab", tests="0", failures="0")
    case = ElementTree.SubElement(suite, "testcase", classname=class_name, name=name, time="0")
    ElementTree.SubElement(case, "failure", message=message).text = text
    for count in ("tests", "failures"):
        suite.set(count, str(int(suite.get(count, "0")) + 1))
    write(there or [suite], report)


def merge(reports: Iterable[Path], into: Path) -> dict[str, int]:
    """Make one report of several.

    :return: the sums of ``tests``, ``failures``, ``errors`` and ``skipped``.
    """
    all_suites = [suite for report in reports for suite in suites(report)]
    write(all_suites, into)
    return {count: sum(int(suite.get(count, "0")) for suite in all_suites) for count in _COUNTS}


def failed(report: Path) -> list[str]:
    """The tests of a report that failed or were passed over: for each, its name and the first line of why."""
    unhappy = []
    for suite in suites(report):
        for case in suite.iter("testcase"):
            name = f"{case.get('classname')}::{case.get('name')}"
            for outcome in ("failure", "error", "skipped"):
                unhappy += [f"{name}: {_first_line(reason)}" for reason in case.iter(outcome)]
    return unhappy


def _first_line(reason: ElementTree.Element) -> str:
    return next(iter((reason.get("message") or reason.text or reason.tag).strip().splitlines()), reason.tag)
