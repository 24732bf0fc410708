# SPDX-License-Identifier: LGPL-2.1-or-later
"""One host's part of the night, by SSH: look whether it can, bring there what is needed, run, collect, tidy up."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event

from kvmi_host.host.doctor import State as Found
from kvmi_host.host.doctor import machine_behind
from kvmi_host.host.doctor.kernel import capability, device, loaded, ptrace, switch
from kvmi_host.host.errors import RemoteError, SurveyError
from kvmi_host.host.printable import printable
from kvmi_host.lab import suite
from kvmi_host.lab.errors import LabError
from kvmi_host.lab.night import State
from kvmi_host.lab.parcel import OLDEST, Parcel, Python, unpacking
from kvmi_host.lab.part import Part
from kvmi_host.lab.supervision import Ended, Host

_NEEDED = (device, loaded, switch, capability, ptrace)
_MOST_REPORT = 64 << 20  # bytes
_MOST_DMESG = 16 << 20
_MOST_WARNINGS = 20
_GRACE = 300  # seconds that a suite nobody follows may take longer than its deadline
_LOOK = """python3 -c 'import platform; print(*platform.python_version_tuple()[:2], platform.machine())'
python3 -c 'import libvirt' && echo libvirt
command -v qemu-system-x86_64 > /dev/null && echo qemu
command -v setsid > /dev/null && echo setsid
true"""
_PROGRAMS = {"libvirt": "python3-libvirt", "qemu": "qemu-system-x86", "setsid": "util-linux"}
"""What there has to be beside the kernel, and the package that brings it."""


@dataclass(frozen=True)
class Plan:
    """What is done on every host.

    :ivar arguments: pytest's.
    :ivar parcel: makes what a host with that Python gets.
    :ivar stop: set when the night is to end.
    """

    arguments: Sequence[str]
    parcel: Callable[[Python], Parcel]
    stop: Event


def run_over_ssh(part: Part, host: Host, plan: Plan) -> str:
    """Do a host's part.

    :return: what there is to say though it came to its end, as a sentence.
    :raise Ended: it did not.
    """
    with part.at("connect"):
        try:
            host.open()
        except RemoteError as error:
            raise Ended(State.UNREACHABLE, str(error)) from error
        part.tell("looking at it")
        python = _check(host)
    with part.at("deploy"):
        try:
            parcel = plan.parcel(python)
        except LabError as error:
            raise Ended(State.INTERRUPTED, f"what the suite needs could not be put together here: {error}") from error
        _deploy(host, parcel)
    if plan.stop.is_set():
        raise Ended(State.INTERRUPTED, "the night was ended from here before the suite began")
    # A folder for temporary files there has this name, and sockets are in it: their paths have to be short.
    name = f"kvmi-{os.getpid()}-{secrets.token_hex(3)}"
    before = _state(host)
    ended = None
    try:
        with part.at("suite"):
            _suite(part, host, plan, name, parcel)
    except Ended as error:
        ended = error
    with part.at("collect"):
        left = _collect(part, host, name, before, ended)
    if ended:
        raise Ended(ended.state, f"{ended.reason}{left}") from ended
    return f"{outcome(part)}{left}".removeprefix("; ")


def _check(host: Host) -> Python:
    """The host's Python.

    :raise Ended: something is missing there, and what to do.
    """
    host.require_idle()
    try:
        machine = machine_behind(host, host.patience.command, kernel_alone=True)
    except SurveyError as error:
        raise Ended(State.REFUSED, f"{error}: does it have a POSIX shell, and coreutils?") from error
    if not machine.user.root:
        raise Ended(State.REFUSED, f"the suite needs root, and {machine.user.name} is let in: say root@ in its address")
    lacks = [
        f"{evidence}: {remedy}"
        for found, evidence, remedy in (look(machine) for look in _NEEDED)
        if found is Found.MISSING
    ]
    words = host.run(_LOOK).stdout.decode(errors="replace").split()
    version = tuple(int(word) for word in words[:2] if re.fullmatch(r"\d{1,3}", word))
    if len(version) != 2 or len(words) < 3 or version < OLDEST:
        lacks.append(f"there is no Python {OLDEST[0]}.{OLDEST[1]} or newer: apt-get install python3")
    lacks += [
        f"no {program}: apt-get install {package}" for program, package in _PROGRAMS.items() if program not in words
    ]
    if lacks:
        raise Ended(State.REFUSED, "the suite cannot run there: " + "; ".join(lacks))
    major, minor = version
    return Python((major, minor), words[2])


def _deploy(host: Host, parcel: Parcel) -> None:
    top = host.places.top
    if host.run(f"test -e {top / parcel.name}/complete").returncode:
        done = host.run(unpacking(parcel, top), stdin=parcel.archive)
        if done.returncode:
            said = printable((done.stderr or done.stdout).decode(errors="replace"))
            raise Ended(State.REFUSED, f"what the suite needs could not be brought to {top}: {said[-400:]}")


def _suite(part: Part, host: Host, plan: Plan, name: str, parcel: Parcel) -> None:
    place, run = host.places.top / parcel.name, host.places.run
    path = f"PATH={place}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    environment = [path, f"KVMI_IMAGES={place}/images", f"KVMI_HOST_NAME={part.host.name}"]
    environment += ["PYTHONUNBUFFERED=1", "COLUMNS=160"]
    junit, results = (f"{run}/{report}" for report in suite.REPORTS)
    package = f"{place}/{parcel.site}/kvmi_host"
    arguments = ["--color=no", *plan.arguments]
    pytest = suite.pytest_command(f"{place}/bin/python3", package, junit, results, arguments)
    until = time.monotonic() + part.host.deadline
    host.start(name, part.host.deadline + _GRACE, ["env", f"--chdir={place}", *environment, *pytest])
    try:
        part.status = host.follow(name, until, part.output, plan.stop)
    except Ended as ended:
        if ended.state in {State.HUNG, State.INTERRUPTED}:
            _wind_down(part, host, name, ended)
        raise


def _wind_down(part: Part, host: Host, name: str, ended: Ended) -> None:
    """Have a suite come to its end that is not waited for any more, for its reports."""
    part.tell("having pytest end")
    try:
        if ended.state is State.HUNG:
            part.output(b"\n== where its processes are\n" + host.call("stuck").stdout + b"\n")
        host.call("interrupt")
        ending = host.patience.ending
        part.status = host.follow(name, time.monotonic() + ending, part.output, Event(), progress=ending)
    except Ended:
        return  # it hangs so that it cannot even be interrupted, or is gone by now: the first reason counts


def _state(host: Host) -> set[str]:
    """What a suite may leave behind, as far as it is there."""
    return set(printable(host.call("state").stdout.decode(errors="replace")).splitlines())


def _collect(part: Part, host: Host, name: str, before: set[str], ended: Ended | None) -> str:
    """Get what there is, and leave the host as it was.

    :return: what is to be said of how it was left, to be added to a sentence.
    """
    log = host.kernel_log
    left = ""
    gone = ended is not None and ended.state in {State.DIED, State.LOST}
    if not gone:
        try:
            for report in suite.REPORTS:
                found = host.run(f"head -c {_MOST_REPORT + 1} {host.places.run}/{report}", most=_MOST_REPORT + 1)
                if found.stdout and len(found.stdout) <= _MOST_REPORT:
                    (part.folder / report).write_bytes(found.stdout)
            if ended is None or ended.state is not State.REBOOTED:
                dmesg = host.run(f"dmesg | tail -c {_MOST_DMESG}", most=_MOST_DMESG).stdout
                log = suite.since(dmesg.decode(errors="replace"), f"{suite.BEGIN}: {name}")
            left = _tidy(host, name, before)
        except Ended as error:
            left = f"; it could not be tidied up: {error.reason}"
    if log:
        (part.folder / "dmesg.log").write_text(log)
    part.warnings = list(suite.complaints(log))[:_MOST_WARNINGS]
    part.dirty = gone or bool(left)
    return left


def _tidy(host: Host, name: str, before: set[str]) -> str:
    """Remove what the suite has left; what could not be removed, to be added to a sentence."""
    guests = [line.removeprefix("guest ") for line in _state(host) - before if line.startswith("guest ")]
    host.call("tidy", name, *guests)
    after = _state(host)
    more = sorted(after - before) + [f"no {line}" for line in sorted(before - after) if line.startswith("module ")]
    return f"; it was left with {', '.join(more)}" if more else ""


def outcome(part: Part) -> str:
    """What came of a suite that has ended, in words; empty if all is well."""
    if not (part.folder / "junit.xml").exists():
        part.status = part.status or 1
        return f"pytest ended with status {part.status} and left no report: see the end of pytest.log"
    if part.status == 1:
        return f"{len(part.tally.failed)} of {part.tally.done} tests failed"
    if part.status == 5:
        return "no test was chosen"
    return f"pytest ended with status {part.status}: see the end of pytest.log" if part.status else ""
