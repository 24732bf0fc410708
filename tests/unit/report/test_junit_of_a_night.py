# SPDX-License-Identifier: LGPL-2.1-or-later
"""junit.xml of a night: every host's tests, told apart by their class names, and what went wrong beside them."""

from xml.etree import ElementTree

import pytest

from kvmi_host.lab.night import HostRun, State
from kvmi_host.report import write
from kvmi_host.testing.nights import MadeUpHost, write_night


@pytest.fixture
def merged(tmp_path):
    """Writes a night's report, after a change to its folder, and reads its junit.xml."""

    def make(*hosts, change=lambda folder: None):
        folder = write_night(tmp_path, hosts)
        change(folder)
        write(folder)
        return ElementTree.parse(folder / "junit.xml").getroot()

    return make


def failures(root):
    return {
        f"{case.get('classname')}.{case.get('name')}": case.findtext("failure")
        for case in root.iter("testcase")
        if case.find("failure") is not None
    }


def test_every_test_is_there_with_its_host_in_its_class_name(merged):
    root = merged(MadeUpHost("amd-6.1"), MadeUpHost("lab7"))
    names = [case.get("classname") for case in root.iter("testcase")]
    assert names.count("hardware.amd-6.1.test_framing") == names.count("hardware.lab7.test_framing") == 12


def test_the_same_holds_where_the_suite_ran_as_a_package(merged):
    def change(folder):
        file = folder / "hosts/lab7/junit.xml"
        file.write_text(file.read_text().replace("tests.hardware.", "kvmi_host.hwtest."))

    root = merged(MadeUpHost("lab7"), change=change)
    assert {case.get("classname").rpartition(".")[0] for case in root.iter("testcase")} == {"hardware.lab7"}


def test_a_suite_is_named_after_its_host_and_says_what_that_is(merged):
    (suite,) = merged(MadeUpHost("lab7", "GenuineIntel")).iter("testsuite")
    assert suite.get("name") == "lab7"
    assert {item.get("name"): item.get("value") for item in suite.iter("property")} == {
        "host": "lab7",
        "state": "finished",
        "kernel": "6.1.0-56-cloud-amd64",
        "cpu_vendor": "GenuineIntel",
        "dialect": "v6",
    }


def test_a_host_without_results_is_a_suite_with_a_failure_and_what_its_tags_say(merged):
    run = HostRun("lab9", State.UNREACHABLE, "It did not answer: is it switched on?")
    root = merged(MadeUpHost("lab9", run=run))
    (suite,) = root.iter("testsuite")
    assert failures(root) == {"hardware.lab9.host.test_comes_to_its_end": "It did not answer: is it switched on?"}
    assert (suite.get("tests"), suite.get("failures")) == ("1", "1")
    assert "amd" in [item.get("value") for item in suite.iter("property") if item.get("name") == "cpu_vendor"]


def test_a_complaint_of_the_kernel_is_a_failure(merged):
    run = HostRun("lab7", State.FINISHED, status=1, warnings=("WARNING: CPU: 1",))
    found = failures(merged(MadeUpHost("lab7", run=run)))
    assert found == {"hardware.lab7.kernel_log.test_no_complaint": "WARNING: CPU: 1"}


def test_a_complaint_that_the_suite_has_noticed_itself_is_there_once(merged):
    def change(folder):
        file = folder / "hosts/lab7/junit.xml"
        case = (
            '<testcase classname="tests.hardware.kernel_log" name="test_no_complaint"><failure>W</failure></testcase>'
        )
        file.write_text(file.read_text().replace("</testsuite>", f"{case}</testsuite>", 1))

    run = HostRun("lab7", State.FINISHED, status=1, warnings=("WARNING: CPU: 1",))
    found = failures(merged(MadeUpHost("lab7", run=run), change=change))
    assert found == {"hardware.lab7.kernel_log.test_no_complaint": "W"}


DEEP = "<testsuite>" + "<a>" * 100_000 + "</a>" * 100_000 + "</testsuite>"
BOMB = "".join(f'<!ENTITY e{level + 1} "{f"&e{level};" * 10}">' for level in range(9))
BOMB = f'<!DOCTYPE a [<!ENTITY e0 "boom">{BOMB}]><testsuite>&e9;</testsuite>'


@pytest.mark.parametrize(
    "text", ["", "<testsuites>", "no XML", DEEP, BOMB], ids=["empty", "open", "none", "deep", "entities"]
)
def test_a_junit_xml_that_is_none_is_its_hosts_failure_alone(merged, text):
    root = merged(
        MadeUpHost("lab7"),
        MadeUpHost("lab8"),
        change=lambda folder: (folder / "hosts/lab7/junit.xml").write_text(text),
    )
    (failure,) = failures(root)
    assert failure == "hardware.lab7.host.test_leaves_its_report"
    assert len(list(root.iter("testcase"))) > 100


def test_sums_are_those_of_the_tests(merged):
    (suite,) = merged(MadeUpHost("lab7", fails={0: "no", 1: "no"})).iter("testsuite")
    assert (suite.get("tests"), suite.get("failures")) == (str(len(list(suite.iter("testcase")))), "2")
