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
from collections.abc import Callable, Sequence
from pathlib import Path

from kvmi_host.host.kernel_log import TROUBLE
from kvmi_host.host.kernels import Series
from kvmi_host.lab import deploy, junit
from kvmi_host.lab.bochs import BochsHost
from kvmi_host.lab.box import Box
from kvmi_host.lab.errors import LabError
from kvmi_host.lab.paths import project_root
from kvmi_host.lab.progress import say, show

Runner = Callable[[Sequence[str], Path], int]
"""Runs pytest with these arguments on one host, and shows its output as it comes. The folder gets ``junit.xml``,
``dmesg.log``, and from an emulated host ``console.log``. Returns pytest's exit status."""

_DEADLINE = 2400
_REPORT, _DMESG = "/run/kvmi-host-suite.xml", "/run/kvmi-host-dmesg.log"
_UNCHECKED = "not debug_kernel"
"""Which tests are for a kernel that does not check itself, as pytest's ``-m``."""
_BEGIN = "kvmi-host: the suite begins"


def trouble(log: str, context: int = 12) -> str:
    """The part of a kernel log around the first complaint, or an empty text.

    :param context: how many lines to show after it.
    """
    lines = log.splitlines()
    for number, line in enumerate(lines):
        if TROUBLE.search(line):
            return "\n".join(lines[max(0, number - 2) : number + context])
    return ""


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
    report, *logs = (reports / name for name in ("junit.xml", "dmesg.log", "console.log"))
    for file in (report, *logs):
        file.unlink(missing_ok=True)
    chosen = ["-k", expression] if expression else []
    complaint = ""
    try:
        status = runner([*chosen, *extra], reports)
        if not report.exists():
            raise LabError(f"pytest ended with status {status} and wrote no report")
    finally:
        for log in logs:
            since = log.read_text(errors="replace").rpartition(_BEGIN)[2] if log.exists() else ""
            complaint = complaint or trouble(since)
        if complaint:
            say(f"the host's kernel complained while the suite ran (all of it in {reports}):\n{complaint}")
    if not complaint:
        return status
    # It counts as a failed test of its own.
    junit.add_failure(report, "tests.hardware.kernel_log", "test_no_complaint", "the kernel complained", complaint)
    return 1


def _pytest(top: str, python: str, report: str, arguments: Sequence[str]) -> list[str]:
    argv = [python, "-m", "pytest", f"{top}/tests/hardware", "-c", f"{top}/pyproject.toml", f"--rootdir={top}"]
    argv += ["-p", "no:cacheprovider", f"--junitxml={report}", "-v"]
    argv += ["--color=yes"] if sys.stdout.isatty() else []
    return [*argv, *arguments]


def _deployed(host: str, arguments: Sequence[str]) -> list[str]:
    """The command line for a host that this tree was deployed to."""
    top = str(deploy.TOP)
    environment = [f"PYTHONPATH={top}/lib:{top}/deps", "PYTHONUNBUFFERED=1", f"KVMI_HOST_NAME={host}"]
    return ["env", f"--chdir={top}", *environment, *_pytest(top, "python3", _REPORT, arguments)]


def in_box(box: Box, deadline: float | None = None) -> Runner:
    """The suite in a box that is up.

    :param deadline: seconds after which it is ended; by default what the box's kernel needs.
    """

    def runner(arguments: Sequence[str], reports: Path) -> int:
        box.deploy()
        box.run(f"echo '{_BEGIN}' > /dev/kmsg; rm -f {_REPORT}")
        try:
            chosen = [] if box.series is Series.DEBUG else ["-m", _UNCHECKED]
            argv = _deployed(box.name, [*chosen, *arguments])
            status = box.run(
                argv, deadline=deadline or _DEADLINE * box.series.patience, check=False, on_output=show
            ).returncode
            written = box.run(["cat", _REPORT], check=False)
            if written.returncode == 0:
                (reports / "junit.xml").write_text(written.stdout)
            return status
        finally:
            (reports / "console.log").write_text(box.console_log.read_text(errors="replace"))
            try:
                dmesg = box.run(["dmesg"], deadline=20).stdout
            except LabError as error:
                dmesg = f"no dmesg: {error}\n"
            (reports / "dmesg.log").write_text(dmesg)

    return runner


def in_bochs(host: BochsHost) -> Runner:
    """The suite in an emulated Intel host, which lives as long as the suite runs."""

    def runner(arguments: Sequence[str], reports: Path) -> int:
        pytest = shlex.join(_deployed(host.name, ["-m", f"{_UNCHECKED} and not services", *arguments]))
        # It has no systemd, which would start libvirt.
        libvirt = "mkdir -p /run/libvirt /run/lock; virtlogd -d; libvirtd -d"
        command = f"{libvirt}; echo '{_BEGIN}' > /dev/kmsg; {pytest}; status=$?; dmesg > {_DMESG}; (exit $status)"
        try:
            status, found = host.run(command, [_REPORT, _DMESG], show)
        finally:
            if host.console_log.exists():
                shutil.copy(host.console_log, reports / "console.log")
        for name, file in (("junit.xml", _REPORT), ("dmesg.log", _DMESG)):
            if file in found:
                (reports / name).write_bytes(found[file])
        return status

    return runner


def here(arguments: Sequence[str], reports: Path) -> int:
    """The suite on this machine, whose KVM has introspection; it needs root."""
    root = project_root()
    Path("/dev/kmsg").write_text(f"{_BEGIN}\n")
    argv = _pytest(str(root), sys.executable, str(reports / "junit.xml"), ["-m", _UNCHECKED, *arguments])
    with deploy.images_here() as images:
        env = {**os.environ, "KVMI_IMAGES": str(images)}
        status = subprocess.run(argv, cwd=root, env=env, check=False).returncode
    with (reports / "dmesg.log").open("wb") as log:
        subprocess.run(["dmesg"], stdout=log, check=True)
    return status
