# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hardware suite on one host: run with its output shown as it comes, its evidence looked through.

A host whose kernel complained while the tests ran fails the run, whatever the tests say.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import kvmi_host
from kvmi_host.host.kernel_log import TROUBLE
from kvmi_host.lab import deploy, junit
from kvmi_host.lab.bochs import BochsHost
from kvmi_host.lab.box import Box
from kvmi_host.lab.errors import LabError, LabHostError
from kvmi_host.lab.paths import project_root
from kvmi_host.lab.progress import say, show

Runner = Callable[[Sequence[str], Path], int]
"""Runs pytest with these arguments on one host, and shows its output as it comes. The folder gets ``junit.xml``,
``suite.json`` (see :mod:`kvmi_host.testing.suite_report`), ``dmesg.log``, and from an emulated host ``console.log``.
Returns pytest's exit status."""

_DEADLINE = 2400
_JUNIT, _SUITE, _DMESG = "/run/kvmi-host-junit.xml", "/run/kvmi-host-suite.json", "/run/kvmi-host-dmesg.log"
REPORTS = {"junit.xml": _JUNIT, "suite.json": _SUITE}
"""What pytest leaves on a host, by its name in the folder."""
BEGIN = "kvmi-host: the suite begins"
"""What stands in the kernel's log before what a suite brings about there; in a night, its name follows."""


def complaints(log: str, context: int = 12) -> Iterator[str]:
    """The parts of a kernel log around complaints. What follows closely on one belongs to it.

    :param context: how many lines to show after the first of a part.
    """
    lines = log.splitlines()
    shown = 0
    for number, line in enumerate(lines):
        if number >= shown and TROUBLE.search(line):
            begin, shown = max(shown, number - 2), number + context
            yield "\n".join(lines[begin:shown])


def trouble(log: str, context: int = 12) -> str:
    """The first of :func:`complaints`, or an empty text."""
    return next(complaints(log, context), "")


def since(log: str, mark: str) -> str:
    """The lines of a kernel's log after the one with a mark; all of it, where the mark is no longer in it."""
    before, found, after = log.rpartition(mark)
    return after.partition("\n")[2] if found else before + after


def run(runner: Runner, reports: Path, expression: str | None = None, extra: Sequence[str] = ()) -> int:
    """Run the suite on a host.

    :param runner: how, and where: :func:`in_box`, :func:`in_bochs` or :func:`here`.
    :param reports: the folder for ``junit.xml`` and the kernel's logs.
    :param expression: which tests, as pytest's ``-k``.
    :param extra: more arguments for pytest.
    :return: pytest's exit status; 1 also when the kernel complained.
    """
    reports = reports.resolve()
    reports.mkdir(parents=True, exist_ok=True)
    report, results, *logs = (reports / name for name in ("junit.xml", "suite.json", "dmesg.log", "console.log"))
    for file in (report, results, *logs):
        file.unlink(missing_ok=True)
    chosen = ["-k", expression] if expression else []
    complaint = ""
    try:
        status = runner([*chosen, *extra], reports)
        if not report.exists():
            raise LabError(f"pytest ended with status {status} and wrote no report")
    finally:
        for log in logs:
            said = log.read_text(errors="replace") if log.exists() else ""
            complaint = complaint or trouble(since(said, BEGIN))
        if complaint:
            say(f"the host's kernel complained while the suite ran (all of it in {reports}):\n{complaint}")
    if not complaint:
        return status
    # It counts as a failed test of its own.
    junit.add_failure(report, "tests.hardware.kernel_log", "test_no_complaint", "the kernel complained", complaint)
    return 1


def pytest_command(python: str, package: str, junit: str, results: str, arguments: Sequence[str]) -> list[str]:
    """The command line, which says everything: no file of settings is looked for.

    :param package: the folder of kvmi_host, from which tests have their names.
    """
    argv = [python, "-m", "pytest", "--pyargs", "kvmi_host.hwtest", "-c", "/dev/null", f"--rootdir={package}"]
    argv += ["-p", "kvmi_host.testing.plugin", "-p", "no:cacheprovider", "--import-mode=importlib", "--strict-markers"]
    argv += ["-p", "no:labgrid"]  # it would change how every test logs, where it is installed
    argv += [f"--junitxml={junit}", f"--suite-report={results}", "-v"]
    argv += ["--color=yes"] if sys.stdout.isatty() else []
    return [*argv, *arguments]


def _deployed(host: str, arguments: Sequence[str]) -> list[str]:
    """The command line for a host that this tree was deployed to."""
    top = str(deploy.TOP)
    environment = [f"PYTHONPATH={top}/lib:{top}/deps", "PYTHONUNBUFFERED=1", f"KVMI_HOST_NAME={host}"]
    pytest = pytest_command("python3", f"{top}/lib/kvmi_host", _JUNIT, _SUITE, arguments)
    return ["env", f"--chdir={top}", *environment, *pytest]


def in_box(box: Box, deadline: float | None = None) -> Runner:
    """The suite in a box that is up.

    :param deadline: seconds after which it is ended; by default what the box's kernel needs.
    """

    def runner(arguments: Sequence[str], reports: Path) -> int:
        box.deploy()
        box.run(f"echo '{BEGIN}' > /dev/kmsg; rm -f {_JUNIT} {_SUITE}")
        patience = deadline or _DEADLINE * box.series.patience
        try:
            status = box.run(_deployed(box.name, arguments), deadline=patience, check=False, on_output=show).returncode
            for name, file in REPORTS.items():
                written = box.run(["cat", file], check=False)
                if written.returncode == 0:
                    (reports / name).write_text(written.stdout)
            return status
        finally:
            (reports / "console.log").write_text(box.console_log.read_text(errors="replace"))
            try:
                dmesg = box.run(["dmesg"], deadline=20).stdout
            except LabError as error:
                dmesg = f"no dmesg: {error}\n"
            (reports / "dmesg.log").write_text(dmesg)

    return runner


def in_bochs(host: BochsHost, on_output: Callable[[str], None] = show) -> Runner:
    """The suite in an emulated Intel host, which lives as long as the suite runs.

    :param on_output: called with each piece of pytest's output as it comes. What it raises ends the host.
    """

    def runner(arguments: Sequence[str], reports: Path) -> int:
        pytest = shlex.join(_deployed(host.name, arguments))
        # It has no systemd, which would start libvirt.
        libvirt = "mkdir -p /run/libvirt /run/lock; virtlogd -d; libvirtd -d"
        command = f"{libvirt}; echo '{BEGIN}' > /dev/kmsg; {pytest}; status=$?; dmesg > {_DMESG}; (exit $status)"
        try:
            status, found = host.run(command, [*REPORTS.values(), _DMESG], on_output)
        finally:
            if host.console_log.exists():
                shutil.copy(host.console_log, reports / "console.log")
        for name, file in (*REPORTS.items(), ("dmesg.log", _DMESG)):
            if file in found:
                (reports / name).write_bytes(found[file])
        return status

    return runner


def here(arguments: Sequence[str], reports: Path) -> int:
    """The suite on this machine, whose KVM has introspection; it needs root."""
    Path("/dev/kmsg").write_text(f"{BEGIN}\n")
    package = Path(kvmi_host.__file__).parent
    junit, results = (str(reports / name) for name in REPORTS)
    with _images() as images:
        argv = pytest_command(sys.executable, str(package), junit, results, arguments)
        status = subprocess.run(argv, env=os.environ | images, check=False).returncode
    with (reports / "dmesg.log").open("wb") as log:
        subprocess.run(["dmesg"], stdout=log, check=True)
    return status


@contextmanager
def _images() -> Iterator[dict[str, str]]:
    """What tells the tests where guest images are, for as long as the block runs: this tree's, built first if need be,
    unless it was said already. An installed package has no tree, and looks where the images of a host are.
    """
    try:
        project_root()
    except LabHostError:
        yield {}
        return
    if "KVMI_IMAGES" in os.environ:
        yield {}
        return
    with deploy.images_here() as images:
        yield {"KVMI_IMAGES": str(images)}
