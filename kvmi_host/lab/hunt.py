# SPDX-License-Identifier: LGPL-2.1-or-later
"""The check of the hardware suite itself: does it find what :mod:`kvmi_host.lab.mutants` breaks?

One host in a box is given the modules of one mutant after the other. The tests that should find it run first, up to the
first failure; the whole suite runs if none of them fails. Before all that, these tests have to pass without a mutation.
"""

from __future__ import annotations

import json
import textwrap
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath

from kvmi_host.host.kernel_log import TROUBLE
from kvmi_host.lab import deploy, suite
from kvmi_host.lab.box import Box
from kvmi_host.lab.errors import LabError
from kvmi_host.lab.mutants import MODULES, Mutant, Tree
from kvmi_host.lab.paths import project_root

_DEADLINE = 900
"""Seconds for the tests that should find a mutant. Most of them wait a minute for what does not come, at most."""

_CONTROL_DEADLINE = 3600

_PLACE = PurePosixPath("/run/kvmi/modules")
"""Where the lab's hosts have the modules; the suite itself loads them from there, too."""

_SWAP = f"""set -e
tar -xz --no-same-owner -C /
rmmod kvm_amd kvm
insmod {_PLACE}/kvm.ko introspection=1
insmod {_PLACE}/kvm-amd.ko
"""

_REMARK = 100


class How(StrEnum):
    """What gave a mutant away."""

    TEST = "a test failed"
    LOG = "the kernel complained"
    HUNG = "the suite came to no end"
    DIED = "the host died"
    NOT_AT_ALL = "nothing"


@dataclass(frozen=True)
class Trace:
    """Where a run of tests first went wrong.

    :ivar test: as ``FILE::NAME``; empty where the host did not live to tell.
    :ivar message: the first line of what was said of it.
    """

    how: How
    test: str
    message: str


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant.

    :ivar expected: whether the tests that should find it did.
    :ivar seconds: how long it took to build and find it.
    """

    mutant: Mutant
    trace: Trace
    expected: bool
    seconds: float

    @property
    def caught(self) -> bool:
        """Whether anything did."""
        return self.trace.how is not How.NOT_AT_ALL


def hunt(box: Box, tree: Tree, mutants: Sequence[Mutant], reports: Path) -> Iterator[Verdict]:
    """Let the suite loose on each mutant.

    :param box: is brought up, replaced when a mutant has upset it, and left up.
    :param reports: gets a folder for each mutant, with what :func:`kvmi_host.lab.suite.run` leaves; and ``control``.
    :raise LabError: a test fails without a mutation, or a mutant cannot be built.
    """
    expected = " or ".join(f"({expression})" for expression in dict.fromkeys(mutant.expected for mutant in mutants))
    box.up()
    _load(box, tree.modules(None))
    files = {mutant.file for mutant in mutants}
    if trace := _run(box, reports / "control", _CONTROL_DEADLINE, ["-k", expected, *_nothing_but(files)]):
        what = f"{trace.test}: {trace.message}" if trace.test else trace.message
        raise LabError(f"without a mutation {trace.how}, so nothing can be said of mutants: {what}")
    for mutant in mutants:
        began = time.monotonic()
        _load(box, tree.modules(mutant))
        chosen = ["-x", "-k", mutant.expected, *_nothing_but({mutant.file})]
        trace = _run(box, reports / mutant.name, _DEADLINE, chosen)
        found = trace is not None
        trace = trace or _run(box, reports / f"{mutant.name}-all", None, ["-x"])
        trace = trace or Trace(How.NOT_AT_ALL, "", "the whole suite passes")
        if trace.how is not How.TEST:
            # A kernel complains of some things only once, and what is left in it nobody knows.
            box.down()
        yield Verdict(mutant, trace, found, round(time.monotonic() - began, 1))


def _load(box: Box, modules: Path) -> None:
    """Have a box that runs, with these modules in place of those that it has."""
    stream = deploy.pack({}, [(_PLACE / name, (modules / name).read_bytes()) for name in MODULES])
    try:
        box.run(_SWAP, stdin=stream)
    except LabError:
        # It was taken down, or what the last mutant has left in it keeps them in use.
        box.down()
        box.up()
        box.run(_SWAP, stdin=stream)


def _nothing_but(files: Set[str]) -> list[str]:
    """What keeps pytest from reading the suite's other files, which takes longer than most tests."""
    others = {file.name for file in (project_root() / "tests" / "hardware").glob("test_*.py")} - files
    return [f"--ignore-glob=*/{file}" for file in sorted(others)]


def _run(box: Box, reports: Path, deadline: float | None, arguments: Sequence[str]) -> Trace | None:
    """Run tests.

    :param arguments: of pytest.
    :return: what first went wrong; None if nothing did.
    :raise LabError: pytest did not run any.
    """
    try:
        status = suite.run(suite.in_box(box, deadline), reports, extra=arguments)
    except LabError as error:
        return _of_host(box, str(error))
    if status == 0:
        return None
    if status == 1 and (trace := _of_report(reports / "junit.xml")):
        return trace
    raise LabError(f"pytest ended with status {status} and says of no test that it failed: {' '.join(arguments)}")


def _of_host(box: Box, error: str) -> Trace:
    """What became of a host on which the suite came to no end."""
    try:
        box.run(["true"], deadline=60)
    except LabError:
        how = How.DIED
    else:
        how = How.HUNG
    complaint = TROUBLE.search(log := box.console_log.read_text(errors="replace"))
    if complaint is None:
        return Trace(how, "", error.splitlines()[0])
    return Trace(how, "", log[log.rfind("\n", 0, complaint.start()) + 1 :].splitlines()[0])


def _of_report(junit: Path) -> Trace | None:
    """The first failure of a report."""
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        for problem in (*case.iter("failure"), *case.iter("error")):
            message = (problem.get("message") or "").strip() or "no word of it"
            complains = "the kernel complain" in message
            test = f"{case.get('classname', '').rpartition('.')[2]}.py::{case.get('name')}"
            return Trace(How.LOG if complains else How.TEST, test, message.splitlines()[0])
    return None


def as_json(verdicts: Sequence[Verdict]) -> str:
    """What ``mutants.json`` holds: a list with an object for each mutant."""
    objects = [
        {
            "name": verdict.mutant.name,
            "broken": verdict.mutant.broken,
            "caught": verdict.caught,
            "how": verdict.trace.how,
            "test": verdict.trace.test,
            "message": verdict.trace.message,
            "expected": verdict.expected,
            "seconds": verdict.seconds,
        }
        for verdict in verdicts
    ]
    return json.dumps(objects, indent=1) + "\n"


HEADINGS = ("mutant", "what is broken", "caught by", "s")


def rows(verdicts: Sequence[Verdict]) -> Iterator[tuple[str, str, str, str]]:
    """What a table says of each mutant, under :data:`HEADINGS`."""
    for verdict in verdicts:
        trace = verdict.trace
        by = trace.test or textwrap.shorten(f"{trace.how}: {trace.message}", _REMARK, placeholder=" ...")
        if trace.test and trace.how is not How.TEST:
            by = f"{by}: {trace.how}"
        if not verdict.caught:
            by = f"NOT CAUGHT: {trace.message}"
        elif not verdict.expected:
            by = f"{by} (not among those expected)"
        yield verdict.mutant.name, verdict.mutant.broken, by, f"{verdict.seconds:.0f}"


def table(verdicts: Sequence[Verdict]) -> str:
    """What became of the mutants, a line for each, in Markdown."""
    lines = [HEADINGS, tuple("---" for _ in HEADINGS), *rows(verdicts)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"
