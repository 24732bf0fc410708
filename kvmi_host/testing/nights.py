# SPDX-License-Identifier: LGPL-2.1-or-later
"""Made-up nights of a lab, as hosts and the fleet leave them: folders with night.json, suite.json, junit.xml and logs.

They follow from a seed. Numbers and texts are of the kind that real hosts write, so what a page looks like with them
is what it looks like.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

from kvmi_host.lab.night import HostRun, Night, State
from kvmi_host.testing.rules import Host, Rule, Rules
from kvmi_host.testing.suite_report import FAILED, PASSED, Measurement, SuiteReport

Json = dict[str, Any]

GROUPS = {
    "framing": ("Framing and errors", 9),
    "commands": ("Commands", 14),
    "replies": ("Events and their replies", 12),
    "cr": ("Control registers", 6),
    "msr": ("MSRs", 7),
    "xsetbv": ("XSETBV", 3),
    "breakpoint": ("Breakpoints and single steps", 8),
    "pages": ("Page access", 13),
    "memory": ("Guest memory", 6),
    "host": ("Hooking a VM and leaving it", 11),
    "policy": ("Policies and observing", 7),
}
"""Titles, and how many rules there are."""

_SENTENCES = (
    "A command of an unknown number is answered with -EOPNOTSUPP, and the session goes on.",
    "Padding that is not zero ends the session, and the VM goes on as if it had never been hooked.",
    "A vCPU that waits for a reply serves the commands that are for it.",
    "The answer repeats the number and the sequence of its command.",
    "An access that was restricted makes one event, and is carried out when the reply says so.",
    "What a session left restricted is free again when the session ends, whichever way it ended.",
    "A message longer than the interface allows ends the session, and nothing of it is carried out.",
)
_OWN = (
    "test_guide.py::test_the_guide_runs",
    "test_operator.py::test_an_operators_day",
    "test_provision.py::test_debian",
)
_NO_EPT = "the CPU has no way to tell a read from an execution (EPT is off)"
_NO_SYSTEMD = "the host was not booted by systemd, and libvirt is not there"
_COMPLAINT = """WARNING: CPU: 1 PID: 4711 at arch/x86/kvm/mmu/mmu.c:5312 kvm_mmu_page_fault+0x3a2/0x6f0 [kvm]
Modules linked in: kvm_intel kvm irqbypass
CPU: 1 PID: 4711 Comm: CPU 1/KVM Tainted: G        W  OE      6.12.117+deb12-cloud-amd64
RIP: 0010:kvm_mmu_page_fault+0x3a2/0x6f0 [kvm]"""


@dataclass(frozen=True)
class MadeUpHost:
    """A host of the lab, and how it does.

    :ivar latency: microseconds, the middle of an event's round trip.
    :ivar fails: numbers of tests among all of them that fail.
    :ivar without: groups that are not applicable, with the reason.
    """

    name: str
    vendor: str = "AuthenticAMD"
    kernel: str = "6.1.0-56-cloud-amd64"
    paging: str = "nested"
    latency: float = 41.0
    fails: Mapping[int, str] = field(default_factory=dict)
    without: Mapping[str, str] = field(default_factory=dict)
    run: HostRun | None = None
    """How it went, where that is not simply the end."""


def lab(night: int = 12) -> list[MadeUpHost]:
    """The hosts of a small lab in one of 12 nights; in the last, one dies, one is unreachable and tests fail anew."""
    hosts = [
        MadeUpHost("amd-6.1", latency=38, fails={17: _LATE} if night in (3, 4, 12) else {}),
        MadeUpHost(
            "amd-6.12", kernel="6.12.117+deb12-cloud-amd64", latency=36, fails={29: _WRONG} if night > 8 else {}
        ),
        MadeUpHost(
            "zen4-lab2",
            kernel="6.12.117+deb12-amd64",
            latency=12.5 if night < 9 else 19,
            fails={17: _LATE} if night == 12 else {5: _WRONG} if night in (10, 11) else {},
        ),
        MadeUpHost(
            "intel-6.12",
            "GenuineIntel",
            "6.12.117+deb12-cloud-amd64",
            latency=95,
            without={"": _NO_SYSTEMD},
            run=_run("intel-6.12", warnings=(_COMPLAINT,), status=1) if night == 12 else None,
        ),
        MadeUpHost(
            "skylake-lab7", "GenuineIntel", latency=14, without={"pages": _NO_EPT} if night == 12 else {}, fails={}
        ),
    ]
    if night == 12:
        went = (
            "It was reached, ran 141 of 172 tests, and its QEMU ended with status 134 (console.log has its last lines)"
        )
        died = _run(
            "box-shadow", State.DIED, f"{went}: bring it up again with kvmi-host lab up.", dirty=True, status=None
        )
        hosts.append(MadeUpHost("box-shadow", paging="shadow", run=died))
        away = "root@lab9.example.org:22 did not answer within 60 s: is it switched on?"
        hosts.append(MadeUpHost("lab9", run=_run("lab9", State.UNREACHABLE, away, status=None)))
    else:
        hosts.append(MadeUpHost("box-shadow", paging="shadow", latency=58))
    if night == 11:
        hosts.append(MadeUpHost("lab8", latency=20))
    return hosts


_LATE = (
    "kvmi_host.introspect.errors.TimedOut: no event of vCPU 2 within 20 s; the last was seq 4711, a CR event of vCPU 0"
)
_WRONG = "AssertionError: assert -14 == -22"
_TRACE = """session = Session(uuid=..., name="puppet")

    def test_a_rule_holds(session):
&gt;       assert session.next_event(timeout=20)
tests/hardware/test_rules.py:77: in test_a_rule_holds
    the rest of it is in pytest.log"""


def _run(name: str, state: State = State.FINISHED, reason: str = "", **more: Any) -> HostRun:
    return HostRun(name, state, reason, **more)


def suite_of(host: MadeUpHost, seed: int = 1) -> Json:
    """What its suite.json has, written by what writes those of real hosts."""
    random = Random(f"{host.name} {seed}")
    about = Host(host.name, host.kernel, host.vendor, "v6", host.paging, "0.1.0", lacks={})
    report = SuiteReport(_rules(), about, started=datetime(2026, 11, 23, 1, 0, 40, tzinfo=UTC))
    tests = [
        *((name, rule) for rule in report.rules.rules.values() for name in _names(rule)),
        *((name, None) for name in _OWN),
    ]
    for index, (name, rule) in enumerate(tests):
        why = host.without.get(rule.group if rule else "", "")
        report.add_test(name, [rule] if rule else [], chosen=True, not_applicable=why)
        if not why:
            message = host.fails.get(index, "")
            report.done(name, FAILED if message else PASSED, message)
            report.tests[name].seconds = random.lognormvariate(-1, 1)
    report.measurements += _measurements(host, random)
    return report.as_json(report.started + timedelta(seconds=812))


def _rules() -> Rules:
    found = {}
    for place, (group, (_, count)) in enumerate(GROUPS.items(), 1):
        for number in range(1, count + 1):
            name = f"{place}.{number}"
            found[name] = Rule(name, group, _SENTENCES[(place + number) % len(_SENTENCES)])
    return Rules({group: title for group, (title, _) in GROUPS.items()}, found)


def _names(rule: Rule) -> list[str]:
    """The tests of a rule: one, two for each third rule, and none for the last one about pages."""
    number = rule.number.partition(".")[2]
    name = f"tests/hardware/test_{rule.group}.py::test_rule_{number}_holds"
    if rule.number == "8.13":
        return []
    return [name] if int(number) % 3 else [f"{name}[amd64-4-True]", f"{name}[amd64-8-False]"]


def _measurements(host: MadeUpHost, random: Random) -> list[Measurement]:
    trips = [host.latency * random.lognormvariate(0, 0.12) for _ in range(1900)]
    trips += [host.latency * random.uniform(2, 9) for _ in range(25)]
    times = list(range(0, 301, 10))
    rate = 0.6e6 / host.latency
    rates = [rate * random.gauss(1, 0.04) * (0.7 if 150 < time < 190 else 1) for time in times]
    gaps = [3 if host.name == "intel-6.12" and time in (170, 180) else 0 for time in times]
    return [
        Measurement("event round trip", "us", [round(trip, 2) for trip in trips]),
        Measurement("soak: events a second", "1/s", [round(one) for one in rates], times),
        Measurement("soak: gaps", "", gaps, times),
    ]


def write_night(folder: Path, hosts: Sequence[MadeUpHost], number: int = 12, hour: int = 1) -> Path:
    """Write a night into a folder, and tell where that is.

    :param number: of the night, from 1: when it was, at which hour.
    """
    started = datetime(2026, 11, 11, hour, tzinfo=UTC) + timedelta(days=number)
    runs = []
    for host in hosts:
        failed = bool(host.fails)
        run = host.run or _run(host.name, status=int(failed))
        vendor = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}.get(host.vendor, "other")
        phases = {"connect": 1.2, "deploy": 30.5, "suite": 812.0, "collect": 2.2}
        if run.state is State.UNREACHABLE:
            phases = {"connect": 60.0}
        tags = {"vendor": vendor, "generation": "emulated" if "-6." in host.name else "lab"}
        runs.append(
            HostRun(run.name, run.state, run.reason, tags, run.dirty, run.status, phases, run.warnings),
        )
        if run.state is State.UNREACHABLE:
            continue
        place = folder / "hosts" / host.name
        place.mkdir(parents=True, exist_ok=True)
        (place / "console.log").write_text("[    0.000000] Linux version ...\n")
        if run.state is not State.FINISHED:
            continue
        suite = suite_of(host, number)
        (place / "suite.json").write_text(json.dumps(suite))
        (place / "junit.xml").write_text(_junit(suite))
        (place / "pytest.log").write_text("collected 172 items\n")
        (place / "dmesg.log").write_text("[    0.000000] Linux version ...\n")
    night = Night(
        started.isoformat(), (started + timedelta(minutes=132)).isoformat(), "0.1.0", "v0.1.0-14-gf579838", tuple(runs)
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "night.json").write_text(night.to_json())
    return folder


def _junit(suite: Json) -> str:
    cases = []
    for test in suite["tests"]:
        if test["outcome"] != "not applicable":
            module, _, name = test["id"].partition(".py::")
            failure = f'<failure message="it failed">{_TRACE}</failure>' if test["outcome"] == "failed" else ""
            cases.append(f'<testcase classname="tests.hardware.{module}" name="{name}" time="0.1">{failure}</testcase>')
    return f'<testsuites><testsuite name="pytest" tests="{len(cases)}">{"".join(cases)}</testsuite></testsuites>'
