# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pytest plugin of the hardware suite: which rules a test shows, where it applies, and what came of it.

A suite is a folder with a ``rules.toml`` (:mod:`kvmi_host.testing.rules`); its ``conftest.py`` tells with the hook
:func:`pytest_kvmi_host` what the host is. Its tests name their rules::

    @pytest.mark.rule("2.3", "4.7")
    @pytest.mark.rule("4.24", either=True)    # with other such ones: the test shows the rule that holds here

A test that has nothing to show on this host is deselected before any test runs; none skips itself: that is a failure.
``--suite-report FILE`` writes it all as JSON (:mod:`kvmi_host.testing.suite_report`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from time import monotonic

import pytest

from kvmi_host.host import HostError
from kvmi_host.testing.rules import PROPERTIES, SELF_CHECKS, SERVICES, Host, Rule, Rules, RulesError, read_rules
from kvmi_host.testing.suite_report import FAILED, NOT_APPLICABLE, NOT_RUN, PASSED, Measurement, SuiteReport

PACKAGE = "kvmi_host.hwtest"
"""The suite, as ``pytest --pyargs`` takes it."""

_HOST_CANNOT = 3
"""The exit status, as ``kvmi-host`` has it."""
_EVERY = 60.0
"""Seconds between two reports of one run."""
_REPORT = pytest.StashKey[SuiteReport]()
_MARKERS = {
    "hardware": "needs live vCPUs under KVM with introspection, as in the host in a box",
    "debug_kernel": "needs a kernel whose allocations can be made to fail",
    "libvirt": "needs libvirtd on the host under test",
    "services": "needs a host that systemd booted, with AppArmor; the emulated Intel host has neither",
    "rule(number, ..., either=False)": "the rules of rules.toml that the test shows",
    "needs(property, ...)": "what the test needs of the host besides, as rules do",
}
_NEEDS = {"debug_kernel": SELF_CHECKS, "services": SERVICES}
"""Markers that have a name of their own for what a test needs of the host."""


class Hooks:
    """What a suite's conftest.py tells the plugin."""

    @pytest.hookspec(firstresult=True)
    def pytest_kvmi_host(self, config: pytest.Config) -> Host | None:
        """The host under test. Called once, before the first test is chosen, and not by ``--collect-only``.

        :raise HostError: it has no introspection; nothing is run then.
        """


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Makes the hook known."""
    pluginmanager.add_hookspecs(Hooks)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Here and not in the suite's conftest.py, which is read too late for it when the suite is an installed package."""
    group = parser.getgroup("hardware suite")
    group.addoption("--suite-report", type=Path, metavar="FILE", help="what came of each rule and test, as JSON")
    group.addoption("--seed", type=int, default=1, help="of what the campaigns send")
    group.addoption("--messages", type=int, default=3000, help="that a fuzzed VM is sent at least")
    group.addoption("--storm-seconds", type=float, default=15, help="that the storm goes on")
    group.addoption("--storm-vcpus", type=int, default=8, help="of the VM in the storm")
    group.addoption("--soak-seconds", type=float, default=20, help="that events are answered without a pause")
    kinds = ["nested", "shadow"]
    group.addoption("--paging", choices=kinds, help="load KVM's modules anew, with that; default: leave them alone")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Whatever way the suite is run, its tests carry ``hardware`` in their class name in a JUnit report."""
    for marker, meaning in _MARKERS.items():
        config.addinivalue_line("markers", f"{marker}: {meaning}")
    if config.option.pyargs and any(str(argument).startswith(PACKAGE) for argument in config.args):
        config.option.junitprefix = config.option.junitprefix or "hardware"


def _check_names(item: pytest.Item, rules: Rules) -> None:
    """A test may name what there is.

    :raise pytest.UsageError: it names something else.
    """
    for marker, kind, known in (("rule", "rule", rules.rules), ("needs", "property of a host", PROPERTIES)):
        names = [name for mark in item.iter_markers(marker) for name in mark.args]
        if unknown := [str(name) for name in names if name not in known]:
            raise pytest.UsageError(f"{item.nodeid}: there is no {kind} {', '.join(unknown)}")


def _rules_of(item: pytest.Item, rules: Rules) -> tuple[list[Rule], list[Rule]]:
    """The rules that a test names: those that it shows in any case, and those of which it shows what holds here."""
    always: list[Rule] = []
    either: list[Rule] = []
    for marker in item.iter_markers("rule"):
        (either if marker.kwargs.get("either") else always).extend(rules.rules[number] for number in marker.args)
    return always, either


def _why_not(item: pytest.Item, always: Sequence[Rule], either: Sequence[Rule], host: Host) -> str:
    """Why a test has nothing to show on a host; an empty text if it has."""
    needs = [need for marker, need in _NEEDS.items() if item.get_closest_marker(marker)]
    needs += [need for marker in item.iter_markers("needs") for need in marker.args]
    reasons = [*(host.lacks.get(need, "") for need in needs), *(rule.not_here(host) for rule in always)]
    if either and all(others := [rule.not_here(host) for rule in either]):
        reasons += others
    return next(filter(None, reasons), "")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None, None, None]:
    """Look at all tests with their rules, then at those that are left once others have chosen."""
    folders = {item.path.parent for item in items if (item.path.parent / "rules.toml").exists()}
    if len(folders) > 1:
        raise pytest.UsageError(f"one suite at a time, not {', '.join(sorted(map(str, folders)))}")
    collected = list(items)
    yield
    if not folders:
        return
    (folder,) = folders
    try:
        rules = read_rules(folder / "rules.toml")
    except RulesError as error:
        raise pytest.UsageError(str(error)) from None
    suite = [item for item in collected if item.path.parent == folder]
    for item in suite:
        _check_names(item, rules)
    chosen = set(items)
    if config.option.collectonly or not chosen.intersection(suite):
        return
    try:
        host = config.hook.pytest_kvmi_host(config=config)
    except HostError as error:
        pytest.exit(str(error), returncode=_HOST_CANNOT)
    if host is None:
        raise pytest.UsageError(f"{folder}/conftest.py does not tell what the host is (pytest_kvmi_host)")
    report = SuiteReport(rules, host)
    left_out = []
    for item in suite:
        always, either = _rules_of(item, rules)
        reason = _why_not(item, always, either, host)
        report.add_test(item.nodeid, [*always, *either], chosen=item in chosen, not_applicable=reason)
        if reason and item in chosen:
            left_out.append(item)
    items[:] = [item for item in items if item not in set(left_out)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    config.stash[_REPORT] = report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test of a suite that skips itself hides what it should show: it has failed."""
    report = yield
    suite = item.config.stash.get(_REPORT, None)
    if suite is None or item.nodeid not in suite.tests:
        return report
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"it skipped itself: {report.longrepr}; what does not apply says so in rules.toml"
    if report.when == "call" or report.failed:
        suite.done(item.nodeid, FAILED if report.failed else PASSED, _last_line(report))
    suite.tests[item.nodeid].seconds += report.duration
    return report


def _last_line(report: pytest.TestReport) -> str:
    """What a failure comes down to."""
    if not report.failed:
        return ""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else report.longreprtext
    # An assertion says first what it is about; what follows explains it.
    return next((line for line in text.splitlines() if line.strip()), "")


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Gives the suite's report a measurement: ``measured("event round trip", "us", values)``.

    ``at_seconds`` says when each value was taken, where that matters.
    """

    def give(name: str, unit: str, values: Sequence[float], at_seconds: Sequence[float] | None = None) -> None:
        request.config.stash[_REPORT].measurements.append(Measurement(name, unit, values, at_seconds))

    return give


@pytest.fixture(scope="session")
def host(pytestconfig: pytest.Config) -> Host:
    """The host under test."""
    return pytestconfig.stash[_REPORT].host


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Writes the report from time to time: where a host hangs, there is one of what was done until then."""
    done = yield
    report = item.config.stash.get(_REPORT, None)
    path = item.config.getoption("--suite-report")
    if report is not None and path and monotonic() - report.written > _EVERY:
        report.write(path)
    return done


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes the report."""
    report = session.config.stash.get(_REPORT, None)
    if report is not None and (path := session.config.getoption("--suite-report")):
        report.write(path)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """How many rules came to what, and which ones failed."""
    report = config.stash.get(_REPORT, None)
    if report is None:
        return
    outcomes = report.outcomes()
    terminalreporter.section("rules")
    for name in (PASSED, FAILED, NOT_APPLICABLE, NOT_RUN):
        count = sum(outcome.outcome == name for outcome in outcomes)
        terminalreporter.write_line(f"{name:<16}{count:>4}", red=name == FAILED and count > 0)
    for outcome in outcomes:
        if outcome.outcome == FAILED:
            terminalreporter.write_line(f"{outcome.rule.number:<6} {outcome.rule.text}", red=True)
