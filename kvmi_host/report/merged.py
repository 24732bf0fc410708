# SPDX-License-Identifier: LGPL-2.1-or-later
"""``junit.xml`` of a night: the hosts' own reports in one, and what became of hosts and kernels as tests of their own.

Class names are ``hardware.HOST.MODULE``, so that the same test on two hosts is two.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement

from kvmi_host.lab import junit
from kvmi_host.report.pytest_report import module_of
from kvmi_host.report.results import THE_LOG, HostResults, NightResults
from kvmi_host.report.suite import Outcome

_COUNTS = {"failures": "failure", "errors": "error", "skipped": "skipped"}
_KERNEL_LOG = "kernel_log"


def write_junit(results: NightResults, folder: Path) -> None:
    """Write it into the night's folder. The hosts' own reports are changed for it.

    :raise OSError: it cannot be written.
    """
    junit.write([suite for host in results.hosts for suite in _suites(host)], folder / "junit.xml")


def _suites(host: HostResults) -> Sequence[Element]:
    """A host's suites, at least one, with what is known of the host as properties."""
    suites = host.junit or [Element("testsuite", time="0")]
    seen = {_named(host, case) for suite in suites for case in suite.iter("testcase")}
    for test in host.tests:
        if test.own and test.outcome is Outcome.FAILED:
            name = f"{_KERNEL_LOG}.test_no_complaint" if test.id == THE_LOG else "host.test_comes_to_its_end"
            if name not in seen:  # the suite itself may have noticed that the kernel complained
                _fail(suites[0], host, name, test.message)
    if host.no_junit:
        _fail(suites[0], host, "host.test_leaves_its_report", host.no_junit)
    for suite in suites:
        suite.set("name", host.name)
        suite.set("tests", str(len(suite.findall("testcase"))))
        for count, tag in _COUNTS.items():
            suite.set(count, str(sum(case.find(tag) is not None for case in suite.findall("testcase"))))
        _describe(suite, host)
    return suites


def _named(host: HostResults, case: Element) -> str:
    """Give a test its class name, and tell module and name."""
    module = module_of(case)
    case.set("classname", f"hardware.{host.name}.{module}")
    return f"{module}.{case.get('name')}"


def _fail(suite: Element, host: HostResults, name: str, text: str) -> None:
    module, _, test = name.partition(".")
    case = SubElement(suite, "testcase", classname=f"hardware.{host.name}.{module}", name=test, time="0")
    SubElement(case, "failure", message=text.partition("\n")[0]).text = text


def _describe(suite: Element, host: HostResults) -> None:
    """Set the properties that tell hosts apart; others that the suite has set stay."""
    properties = suite.find("properties")
    if properties is None:
        properties = Element("properties")
        suite.insert(0, properties)
    about = {"host": host.name, "state": host.run.state.value}
    told = host.suite.host if host.suite else {}
    for key, tag in (("kernel", "kernel"), ("cpu_vendor", "vendor"), ("dialect", "")):
        if value := told.get(key) or host.tags.get(tag):
            about[key] = value
    for item in list(properties):
        if item.get("name") in about:
            properties.remove(item)
    for key, value in about.items():
        SubElement(properties, "property", name=key, value=value)
