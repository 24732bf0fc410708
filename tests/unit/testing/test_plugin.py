# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hardware suite's plugin, on a small suite of its own: what applies, what came of it, and the report of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytest_plugins = ["pytester"]

RULES = """
[[groups]]
id = "framing"
title = "Framing and errors"
[groups.rules]
"2.1" = "One."
"2.2" = { text = "Of another dialect.", dialects = ["v7"] }
"2.3" = { text = "Of another paging.", needs = "shadow paging" }
"2.4" = { text = "Not to be seen.", fault = "NO_XSETBV_EXIT" }
"2.5" = { text = "With this paging.", needs = "nested paging" }
"2.6" = "Without a test."

[[groups]]
id = "events"
title = "Events"
[groups.rules]
"4.1" = "Another."
"""

CONFTEST = """
from kvmi_host.testing.emulators import Fault
from kvmi_host.testing.rules import Host

def pytest_kvmi_host(config):
    lacks = {"shadow paging": "no shadows here", "services": "no systemd"}
    return Host("lab7", "6.1.0", "GenuineIntel", "v6", "nested", "0.1.0", lacks, frozenset(Fault))
"""

TESTS = """
import pytest

@pytest.mark.rule("2.1", "4.1")
def test_passes(measured):
    measured("round trip", "us", [1.5, 2])
    measured("gaps", "", [0, 0], at_seconds=[0, 10])

@pytest.mark.rule("4.1")
@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.rule("2.1"))])
def test_each(number):
    assert number != 2, "two is too many"

@pytest.mark.rule("2.2")
def test_of_v7():
    raise AssertionError

@pytest.mark.rule("2.1", "2.3")
def test_of_shadows():
    raise AssertionError

@pytest.mark.rule("2.3", either=True)
@pytest.mark.rule("2.5", either=True)
def test_of_paging():
    pass

@pytest.mark.rule("2.4")
def test_expects_the_fault():
    pass

def test_of_no_rule():
    pass

@pytest.mark.needs("shadow paging")
def test_that_needs_shadows():
    raise AssertionError

@pytest.mark.services
def test_of_services():
    raise AssertionError
"""


@pytest.fixture(autouse=True)
def _no_other_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that happen to be installed have no part in it; some cannot be loaded twice in a process."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """The suite in a folder."""
    pytester.makeconftest(CONFTEST)
    pytester.path.joinpath("rules.toml").write_text(RULES)
    pytester.makepyfile(test_it=TESTS)
    return pytester


@pytest.fixture
def run(suite: pytest.Pytester) -> Callable[..., dict[str, Any]]:
    """Runs the suite with these arguments; what it reports."""

    def it(*arguments: str) -> dict[str, Any]:
        file = suite.path / "suite.json"
        suite.runpytest_inprocess("-p", "kvmi_host.testing.plugin", f"--suite-report={file}", *arguments)
        report: dict[str, Any] = json.loads(file.read_text())
        return report

    return it


def outcomes(report: dict[str, Any]) -> dict[str, str]:
    return {rule["number"]: rule["outcome"] for rule in report["rules"]}


def test_a_rule_is_what_its_tests_come_to(run: Callable[..., dict[str, Any]]) -> None:
    assert outcomes(run()) == {
        "2.1": "failed",
        "2.2": "not applicable",
        "2.3": "not applicable",
        "2.4": "not applicable",
        "2.5": "passed",
        "2.6": "not run",
        "4.1": "failed",
    }


def test_the_report_is_as_its_readers_take_it(run: Callable[..., dict[str, Any]]) -> None:
    report = run()
    assert report["format"] == 1
    assert report["host"] == {
        "name": "lab7",
        "kernel": "6.1.0",
        "cpu_vendor": "GenuineIntel",
        "dialect": "v6",
        "paging": "nested",
        "version": "0.1.0",
    }
    assert report["started"] <= report["ended"]
    assert report["groups"] == [
        {"id": "framing", "title": "Framing and errors"},
        {"id": "events", "title": "Events"},
    ]
    assert report["rules"][0] == {
        "number": "2.1",
        "group": "framing",
        "text": "One.",
        "outcome": "failed",
        "reason": "",
        "tests": ["test_it.py::test_passes", "test_it.py::test_each[2]", "test_it.py::test_of_shadows"],
    }
    assert report["measurements"] == [
        {"name": "round trip", "unit": "us", "values": [1.5, 2]},
        {"name": "gaps", "unit": "", "at_seconds": [0, 10], "values": [0, 0]},
    ]


def test_a_test_says_what_it_was_about_and_why_it_failed(run: Callable[..., dict[str, Any]]) -> None:
    tests = {test["id"]: test for test in run()["tests"]}
    failed = tests["test_it.py::test_each[2]"]
    assert (failed["outcome"], failed["group"]) == ("failed", "events")
    assert set(failed["rules"]) == {"2.1", "4.1"}
    assert failed["message"] == "AssertionError: two is too many"
    assert failed["seconds"] >= 0
    passed = tests["test_it.py::test_of_no_rule"]
    assert (passed["outcome"], passed["group"], passed["rules"], passed["message"]) == ("passed", "", [], "")


def test_what_does_not_apply_is_told_with_its_reason(run: Callable[..., dict[str, Any]]) -> None:
    report = run()
    reasons = {test["id"]: test["message"] for test in report["tests"] if test["outcome"] == "not applicable"}
    assert reasons == {
        "test_it.py::test_of_v7": "a rule of dialect v7; this kernel speaks v6",
        "test_it.py::test_of_shadows": "no shadows here",
        "test_it.py::test_that_needs_shadows": "no shadows here",
        "test_it.py::test_of_services": "no systemd",
    }
    told = {rule["number"]: rule["reason"] for rule in report["rules"] if rule["outcome"] == "not applicable"}
    assert told["2.3"] == "no shadows here"
    assert "XSETBV" in told["2.4"]


def test_what_does_not_apply_is_deselected_and_never_skipped(suite: pytest.Pytester) -> None:
    result = suite.runpytest_inprocess("-p", "kvmi_host.testing.plugin", "--junitxml=junit.xml")
    result.assert_outcomes(passed=5, failed=1, deselected=4)
    assert "<skipped" not in (suite.path / "junit.xml").read_text()


def test_a_test_that_skips_itself_has_failed(suite: pytest.Pytester, run: Callable[..., dict[str, Any]]) -> None:
    suite.makepyfile(test_it='import pytest\n@pytest.mark.rule("2.1")\ndef test_x():\n    pytest.skip("not today")\n')
    (test,) = run()["tests"]
    assert test["outcome"] == "failed"
    assert "it skipped itself" in test["message"]


def test_a_rule_whose_tests_were_not_chosen_is_not_run(run: Callable[..., dict[str, Any]]) -> None:
    report = run("-k", "paging")
    assert [test["id"] for test in report["tests"]] == ["test_it.py::test_of_paging"]
    assert outcomes(report)["4.1"] == "not run"
    assert outcomes(report)["2.2"] == "not applicable"


def test_a_rule_that_some_of_its_tests_have_shown_says_so(run: Callable[..., dict[str, Any]]) -> None:
    rules = {rule["number"]: rule for rule in run("-k", "passes")["rules"]}
    assert (rules["2.1"]["outcome"], rules["2.1"]["reason"]) == ("passed", "by 1 of its 3 tests")


def test_a_run_that_ends_early_has_not_run_what_it_did_not_reach(run: Callable[..., dict[str, Any]]) -> None:
    report = run("-x", "--deselect", "test_it.py::test_passes")
    assert outcomes(report)["2.5"] == "not run"
    assert len(report["tests"]) == 2 + 4  # what was run, and what does not apply


def test_a_run_that_is_killed_leaves_what_was_done(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        test_it="import os, pytest\n"
        '@pytest.mark.rule("2.1")\ndef test_a():\n    pass\n'
        '@pytest.mark.rule("4.1")\ndef test_b():\n    os._exit(9)\n'
    )
    suite.runpytest_subprocess("-p", "kvmi_host.testing.plugin", "--suite-report=suite.json")
    report = json.loads((suite.path / "suite.json").read_text())
    assert (outcomes(report)["2.1"], outcomes(report)["4.1"]) == ("passed", "not run")


def test_the_terminal_shows_how_many_rules_came_to_what(suite: pytest.Pytester) -> None:
    result = suite.runpytest_inprocess("-p", "kvmi_host.testing.plugin")
    result.stdout.fnmatch_lines(["*= rules =*", "passed * 1", "failed * 2", "not applicable * 3", "not run * 1"])
    result.stdout.fnmatch_lines(["2.1 * One."])


def test_a_rule_that_there_is_not_cannot_be_named(suite: pytest.Pytester) -> None:
    suite.makepyfile(test_it='import pytest\n@pytest.mark.rule("2.9")\ndef test_x():\n    pass\n')
    result = suite.runpytest_inprocess("-p", "kvmi_host.testing.plugin")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*test_it.py::test_x: there is no rule 2.9"])


def test_a_property_that_there_is_not_cannot_be_needed(suite: pytest.Pytester) -> None:
    suite.makepyfile(test_it='import pytest\n@pytest.mark.needs("luck")\ndef test_x():\n    pass\n')
    result = suite.runpytest_inprocess("-p", "kvmi_host.testing.plugin")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*test_it.py::test_x: there is no property of a host luck"])


def test_collecting_asks_for_no_host(suite: pytest.Pytester) -> None:
    suite.makeconftest("def pytest_kvmi_host(config):\n    raise AssertionError\n")
    result = suite.runpytest_inprocess("-p", "kvmi_host.testing.plugin", "--collect-only", "-q")
    result.stdout.fnmatch_lines(["10 tests collected*"])


def test_tests_beside_the_suite_ask_for_no_host(suite: pytest.Pytester) -> None:
    suite.makeconftest("def pytest_kvmi_host(config):\n    raise AssertionError\n")
    suite.mkdir("unit").joinpath("test_other.py").write_text("def test_other():\n    pass\n")
    suite.runpytest_inprocess("-p", "kvmi_host.testing.plugin", "-k", "other").assert_outcomes(passed=1, deselected=10)


def test_a_host_without_introspection_is_told_once(suite: pytest.Pytester) -> None:
    suite.makeconftest(
        "from kvmi_host.host import HostError\n"
        "def pytest_kvmi_host(config):\n"
        '    raise HostError("load the kvmi modules")\n'
    )
    result = suite.runpytest_inprocess("-p", "kvmi_host.testing.plugin")
    assert result.ret == 3
    result.stdout.fnmatch_lines(["*load the kvmi modules*"])


@pytest.mark.parametrize(
    ("values", "times", "complaint"),
    [([1.0, 2.0], [0.0], "2 values at 1 times"), ([float("nan")], None, "no finite number")],
)
def test_a_measurement_has_a_time_for_each_finite_value(
    suite: pytest.Pytester, values: list[float], times: list[float] | None, complaint: str
) -> None:
    suite.makepyfile(
        test_it=f"nan = float('nan')\ndef test_x(measured):\n    measured('it', 's', {values}, at_seconds={times})\n"
    )
    result = suite.runpytest_inprocess("-p", "kvmi_host.testing.plugin")
    result.stdout.fnmatch_lines([f"*ValueError: it: *{complaint}*"])


def test_other_folders_are_left_alone(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it="import pytest\ndef test_x():\n    pytest.skip('elsewhere')\n")
    pytester.runpytest_inprocess("-p", "kvmi_host.testing.plugin").assert_outcomes(skipped=1)


def test_an_installed_suites_tests_are_told_as_hardware_tests(pytester: pytest.Pytester) -> None:
    config = pytester.parseconfigure("-p", "kvmi_host.testing.plugin", "--pyargs", "kvmi_host.hwtest")
    assert config.option.junitprefix == "hardware"


def test_a_prefix_of_class_names_that_was_asked_for_stays(pytester: pytest.Pytester) -> None:
    config = pytester.parseconfigure(
        "-p", "kvmi_host.testing.plugin", "--pyargs", "kvmi_host.hwtest", "--junit-prefix=hardware.lab7"
    )
    assert config.option.junitprefix == "hardware.lab7"
