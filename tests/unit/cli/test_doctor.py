# SPDX-License-Identifier: LGPL-2.1-or-later
"""``kvmi-host doctor``: what is shown, and the exit status."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import pytest
import rich.console
from typer.testing import CliRunner, Result

from kvmi_host.cli import app
from kvmi_host.host import doctor
from kvmi_host.host.doctor import Finding, Machine, State

LONG = "a kernel of another series, " * 8
FINDINGS = [
    Finding("CPU", "virtualization", State.OK, "the CPU has svm"),
    Finding("KVM", "kernel headers", State.NOTE, "none for [6.1.0-56]", "apt-get install linux-headers-6.1.0-56"),
    Finding("KVM", "capability", State.UNKNOWN, LONG, "see: /dev/kvm"),
]
LACKING = Finding("KVM", "loaded modules", State.MISSING, "kvm is not loaded", "modprobe kvm_amd")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs the doctor on a machine of which these findings are made."""

    def invoke(findings: list[Finding], *arguments: str) -> Result:
        monkeypatch.setattr(doctor, "this_machine", lambda python: Machine())
        monkeypatch.setattr(doctor, "examine", lambda machine: iter(findings))
        return CliRunner().invoke(app, ["doctor", *arguments])

    return invoke


def test_a_host_with_all_that_is_needed_is_0(run: Callable[..., Result]) -> None:
    assert run(FINDINGS).exit_code == 0


def test_a_host_that_lacks_something_is_3(run: Callable[..., Result]) -> None:
    assert run([*FINDINGS, LACKING]).exit_code == 3


def test_a_host_that_cannot_be_reached_is_1_and_one_line() -> None:
    result = CliRunner().invoke(app, ["doctor", "-F", "/dev/null", "root@127.0.0.1:1"])
    assert result.exit_code == 1
    assert result.stderr == "kvmi-host: root@127.0.0.1 port 1: connection refused: does sshd run there, on that port?\n"
    assert result.stdout == ""


def test_json_is_an_object_a_line(run: Callable[..., Result]) -> None:
    result = run([LACKING], "--json")
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {
            "group": "KVM",
            "subject": "loaded modules",
            "state": "missing",
            "evidence": "kvm is not loaded",
            "remedy": "modprobe kvm_amd",
        }
    ]


def test_a_pipe_gets_a_line_each_and_one_for_what_to_do(run: Callable[..., Result]) -> None:
    assert run([*FINDINGS, LACKING]).stdout.splitlines() == [
        "ok       virtualization  the CPU has svm",
        "note     kernel headers  none for [6.1.0-56]",
        "                         -> apt-get install linux-headers-6.1.0-56",
        f"unknown  capability      {LONG}",
        "                         -> see: /dev/kvm",
        "missing  loaded modules  kvm is not loaded",
        "                         -> modprobe kvm_amd",
    ]


def test_a_terminal_gets_what_fits(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = rich.console.Console(file=screen, force_terminal=True, color_system=None, width=80)
    monkeypatch.setattr(rich.console, "Console", lambda **settings: terminal)
    run([*FINDINGS, LACKING])
    lines = [line.rstrip() for line in screen.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    assert "note     kernel headers  none for [6.1.0-56]" in lines
    assert "                         -> modprobe kvm_amd" in lines
    assert lines.count("KVM") == 1
