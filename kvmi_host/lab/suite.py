# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hardware suite on one host: brought there, run with its output shown as it comes, its evidence fetched.

A host whose kernel complained while the tests ran fails the run, whatever the tests say.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kvmi_host.host.kernel_log import TROUBLE
from kvmi_host.lab import deploy, junit
from kvmi_host.lab.box import Box
from kvmi_host.lab.errors import LabError
from kvmi_host.lab.progress import say

_DEADLINE = 1500
_REPORT = "/run/kvmi-host-suite.xml"
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


def _pytest(top: str, python: str, report: str, expression: str | None, extra: Sequence[str]) -> list[str]:
    argv = [python, "-m", "pytest", f"{top}/tests/hardware", "-c", f"{top}/pyproject.toml", f"--rootdir={top}"]
    argv += ["-p", "no:cacheprovider", f"--junitxml={report}", "-v"]
    argv += ["--color=yes"] if sys.stdout.isatty() else []
    argv += ["-k", expression] if expression else []
    return [*argv, *extra]


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def on_box(box: Box, reports: Path, expression: str | None = None, extra: Sequence[str] = ()) -> int:
    """Run the suite in a box that is up.

    :param reports: the folder for ``junit.xml``, ``console.log`` and ``dmesg.log``.
    :param expression: which tests, as pytest's ``-k``.
    :param extra: more arguments for pytest.
    :return: pytest's exit status; 1 also when the kernel complained.
    """
    reports.mkdir(parents=True, exist_ok=True)
    report = reports / "junit.xml"
    report.unlink(missing_ok=True)
    box.deploy()
    seen = box.console_log.stat().st_size
    box.run(f"echo '{_BEGIN}' > /dev/kmsg; rm -f {_REPORT}")
    path = f"PYTHONPATH={deploy.TOP}/lib:{deploy.TOP}/deps"
    argv = [
        "env",
        f"--chdir={deploy.TOP}",
        path,
        "PYTHONUNBUFFERED=1",
        *_pytest(str(deploy.TOP), "python3", _REPORT, expression, extra),
    ]
    dmesg = ""
    try:
        status = box.run(argv, deadline=_DEADLINE, check=False, on_output=_show).returncode
        written = box.run(["cat", _REPORT], check=False)
        if written.returncode:
            raise LabError(f"pytest ended with status {status} and wrote no report")
        report.write_text(written.stdout)
        junit.annotate(report, _facts(box))
    finally:
        console = box.console_log.read_text(errors="replace")
        (reports / "console.log").write_text(console)
        try:
            dmesg = box.run(["dmesg"], deadline=20).stdout
        except LabError as error:
            dmesg = f"no dmesg: {error}\n"
        (reports / "dmesg.log").write_text(dmesg)
        complaint = trouble(dmesg.rpartition(_BEGIN)[2]) or trouble(console[seen:])
        if complaint:
            say(f"the box's kernel complained while the suite ran (all of it in {reports}):\n{complaint}")
    return _verdict(status, complaint, report)


def _verdict(status: int, complaint: str, report: Path) -> int:
    """The run's exit status; a complaint of the kernel is a failed test of its own in the report."""
    if not complaint:
        return status
    junit.add_failure(report, "tests.hardware.kernel_log", "test_no_complaint", "the kernel complained", complaint)
    return 1


def _facts(box: Box) -> dict[str, str]:
    """Where the suite ran, for its report."""
    script = "uname -r; sed -n 's/^vendor_id[^:]*: //p' /proc/cpuinfo | head -n 1"
    kernel, vendor = box.run(script).stdout.split()[:2]
    return {"host": box.name, "kernel": kernel, "cpu_vendor": vendor}


def here(root: Path, reports: Path, expression: str | None = None, extra: Sequence[str] = ()) -> int:
    """Run the suite on this machine, whose KVM has introspection; it needs root.

    :param root: the source tree.
    :return: pytest's exit status; 1 also when the kernel complained.
    """
    reports.mkdir(parents=True, exist_ok=True)
    report = reports / "junit.xml"
    report.unlink(missing_ok=True)
    before = subprocess.run(["dmesg"], capture_output=True, text=True).stdout.count("\n")
    argv = _pytest(str(root), sys.executable, str(report), expression, extra)
    with deploy.images_here() as images:
        env = {**os.environ, "KVMI_IMAGES": str(images)}
        status = subprocess.run(argv, cwd=root, env=env, check=False).returncode
    log = subprocess.run(["dmesg"], capture_output=True, text=True).stdout
    (reports / "dmesg.log").write_text(log)
    if not report.exists():
        raise LabError(f"pytest ended with status {status} and wrote no report")
    facts = Path("/proc/cpuinfo").read_text()
    vendor = re.search(r"vendor_id\s*: (\S+)", facts)
    uname = os.uname()
    properties = {"host": uname.nodename, "kernel": uname.release, "cpu_vendor": vendor[1] if vendor else "unknown"}
    junit.annotate(report, properties)
    complaint = trouble("\n".join(log.splitlines()[before:]))
    if complaint:
        say(f"this machine's kernel complained while the suite ran (all of it in {reports}):\n{complaint}")
    return _verdict(status, complaint, report)
