# SPDX-License-Identifier: LGPL-2.1-or-later
"""When a night passed, and what counts as a failure: tests, hosts and kernels."""

import json

import pytest

from kvmi_host.lab.errors import NightError
from kvmi_host.lab.night import HostRun, State
from kvmi_host.report import write
from kvmi_host.report.results import THE_HOST, THE_LOG, read_results
from kvmi_host.report.suite import Outcome
from kvmi_host.testing.nights import MadeUpHost, write_night

GOOD = MadeUpHost("good")


def ended(state=State.FINISHED, reason="", **more):
    """A host whose night ended like that."""
    return MadeUpHost("host", run=HostRun("host", state, reason, **more))


def failures(results):
    return {
        (host.name, test.id): test.message
        for host in results.hosts
        for test in host.tests
        if test.outcome is Outcome.FAILED
    }


@pytest.fixture
def night(tmp_path):
    """Writes a night of these hosts, and reads it."""
    return lambda *hosts: read_results(write_night(tmp_path / "night", hosts))


def test_a_night_passes_where_nothing_failed(night):
    results = night(GOOD, MadeUpHost("other"))
    assert results.passed
    assert failures(results) == {}


def test_a_night_without_hosts_has_not_passed(night):
    assert not night().passed


def test_a_failed_test_fails_the_night_and_neither_host_nor_kernel(night):
    results = night(GOOD, MadeUpHost("host", fails={0: "AssertionError: 1 == 2"}))
    assert not results.passed
    assert failures(results) == {("host", "test_framing.py::test_rule_1_holds"): "AssertionError: 1 == 2"}


@pytest.mark.parametrize("state", [state for state in State if state is not State.FINISHED])
def test_a_host_that_did_not_finish_is_a_failure_with_the_nights_sentence(night, state):
    results = night(GOOD, ended(state, "It went away: look for it."))
    assert not results.passed
    assert failures(results) == {("host", THE_HOST): "It went away: look for it."}


def test_a_complaint_of_the_kernel_is_a_failure_of_its_own(night):
    results = night(GOOD, ended(status=1, warnings=("WARNING: CPU: 1", "BUG: here")))
    assert failures(results) == {("host", THE_LOG): "WARNING: CPU: 1\n\nBUG: here"}


def test_pytest_that_failed_without_a_failed_test_is_the_hosts_failure(night):
    (said,) = failures(night(ended(status=3))).values()
    assert said == "pytest ended with status 3, and no test of suite.json failed: its log says why."


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Its suite.json is unreadable: it is no JSON: "),
        ('{"format": 7}', "Its suite.json is unreadable: format is 7, and this kvmi-host reads format 1."),
        (None, "It has left no suite.json, so what its tests came to is not known."),
    ],
)
def test_a_suite_json_that_cannot_be_read_is_its_hosts_failure_alone(tmp_path, text, said):
    folder = write_night(tmp_path, [GOOD, ended(status=0)])
    file = folder / "hosts/host/suite.json"
    file.unlink() if text is None else file.write_text(text)
    results = read_results(folder)
    ((key, message),) = failures(results).items()
    assert key == ("host", THE_HOST)
    assert message.startswith(said)
    assert not results.passed
    assert results.hosts[0].count(Outcome.PASSED) > 100


def test_what_our_own_checks_pass_is_not_counted_among_the_tests(night):
    (host,) = night(GOOD).hosts
    assert host.count(Outcome.PASSED) == len(host.suite.tests)


def test_texts_of_a_night_come_without_what_a_terminal_or_xml_cannot_take(night):
    (host,) = night(ended(State.DIED, "gone\x1b[2J\0 away", warnings=("BUG:\ud800",))).hosts
    assert host.reason == "gone?[2J? away"
    assert host.warnings == ("BUG:?",)


def test_logs_are_those_that_there_are(tmp_path):
    folder = write_night(tmp_path, [GOOD])
    (folder / "hosts/good/dmesg.log").unlink()
    (host,) = read_results(folder).hosts
    assert host.logs == tuple(f"hosts/good/{name}" for name in ("pytest.log", "console.log", "junit.xml", "suite.json"))


def test_the_latency_is_the_median(night):
    (host,) = night(GOOD).hosts
    assert host.latency() == pytest.approx(41, rel=0.05)


def test_a_folder_that_is_no_night_is_an_error(tmp_path):
    with pytest.raises(NightError, match=r"night\.json"):
        write(tmp_path)


def test_the_status_is_0_where_the_night_passed_and_else_1(written):
    assert written(GOOD)[0] == 0
    assert written(GOOD, ended(State.LOST, "The network is gone."), number=1)[0] == 1


def test_a_history_that_cannot_be_used_is_an_error_and_the_page_is_there(tmp_path):
    folder = write_night(tmp_path, [GOOD])
    (tmp_path / "history").write_text(json.dumps({"no": "database"}) * 100)
    with pytest.raises(Exception, match="is not a database"):
        write(folder, tmp_path / "history")
    assert (folder / "index.html").exists()
    assert (folder / "junit.xml").exists()
