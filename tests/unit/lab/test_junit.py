# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules of the reports: one test a line, sums that add up, nothing lost."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from kvmi_host.lab import junit

ONE_LINE = (
    '<?xml version="1.0"?><testsuites><testsuite name="pytest" errors="0" failures="1" skipped="0" tests="2">'
    '<properties><property name="host" value="box"/></properties>'
    '<testcase classname="tests.hardware.test_a" name="test_1" time="0.1"/>'
    '<testcase classname="tests.hardware.test_a" name="test_2" time="0.1">'
    '<failure message="no">two\n\n  lines</failure>'
    "</testcase></testsuite></testsuites>"
)


def report(folder: Path, name: str = "junit.xml") -> Path:
    path = folder / name
    path.write_text(ONE_LINE)
    return path


def test_every_test_has_a_line_of_its_own(tmp_path: Path) -> None:
    junit.merge([report(tmp_path)], tmp_path / "all.xml")
    assert sum("hardware" in line for line in (tmp_path / "all.xml").read_text().splitlines()) == 2


def test_what_a_suite_says_is_kept_to_the_letter(tmp_path: Path) -> None:
    junit.merge([report(tmp_path)], tmp_path / "all.xml")
    suites = ElementTree.parse(tmp_path / "all.xml").getroot()
    assert suites.findtext(".//failure") == "two\n\n  lines"
    assert [(item.get("name"), item.get("value")) for item in suites.iter("property")] == [("host", "box")]


def test_merged_report_holds_all_suites_and_their_sums(tmp_path: Path) -> None:
    into = tmp_path / "build" / "junit.xml"
    sums = junit.merge([report(tmp_path, "a.xml"), report(tmp_path, "b.xml")], into)
    assert sums == {"tests": 4, "failures": 2, "errors": 0, "skipped": 0}
    assert len(list(ElementTree.parse(into).getroot().iter("testcase"))) == 4


def test_report_whose_root_is_a_suite_is_taken_too(tmp_path: Path) -> None:
    path = tmp_path / "bare.xml"
    path.write_text('<testsuite tests="1"><testcase classname="c" name="n"/></testsuite>')
    assert junit.merge([path], tmp_path / "all.xml")["tests"] == 1


def test_failure_of_our_own_counts(tmp_path: Path) -> None:
    path = report(tmp_path)
    junit.add_failure(path, "tests.hardware.kernel_log", "test_no_complaint", "complained", "WARNING: ...")
    assert junit.merge([path], tmp_path / "all.xml") == {"tests": 3, "failures": 2, "errors": 0, "skipped": 0}


def test_what_failed_is_named_with_the_first_line_of_why(tmp_path: Path) -> None:
    path = report(tmp_path)
    junit.add_failure(path, "tests.hardware.kernel_log", "test_no_complaint", "complained\nat length", "WARNING: ...")
    assert junit.failed(path) == [
        "tests.hardware.test_a::test_2: no",
        "tests.hardware.kernel_log::test_no_complaint: complained",
    ]


def test_test_that_was_passed_over_or_broke_is_named_too(tmp_path: Path) -> None:
    path = tmp_path / "bare.xml"
    path.write_text(
        '<testsuite tests="2"><testcase classname="c" name="s"><skipped/></testcase>'
        '<testcase classname="c" name="e"><error>\nno box\n  at all</error></testcase></testsuite>'
    )
    assert junit.failed(path) == ["c::s: skipped", "c::e: no box"]
