# SPDX-License-Identifier: LGPL-2.1-or-later
"""What many hosts are at, as it is shown: lines where there is no terminal, a row for each host where there is one."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from kvmi_host.cli.fleet_view import Lines, Picture
from kvmi_host.lab.inventory import LabHost
from kvmi_host.lab.night import State
from kvmi_host.lab.part import Part


@pytest.fixture
def written() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def part(tmp_path: Path, written: io.StringIO) -> Part:
    """A host's part, shown in lines."""
    part = Part(LabHost("lab7", "ssh", "lab7"), tmp_path, Lines(Console(file=written)))
    part.begin()
    return part


def lines(written: io.StringIO) -> list[str]:
    """What was said, without the time."""
    return [line.partition(" ")[2] for line in written.getvalue().splitlines()]


def test_a_line_tells_each_phase_and_what_is_done_in_it(part: Part, written: io.StringIO) -> None:
    with part.at("connect"):
        part.tell("looking at it")
        part.tell("looking at it")
    assert lines(written) == ["lab7: connect", "lab7: connect: looking at it"]


def test_a_failed_test_is_said_at_once(part: Part, written: io.StringIO) -> None:
    with part.at("suite"):
        part.output(b"collected 2 items\nhwtest/test_x.py::test_a FAILED [ 50%]\n")
    assert lines(written)[1:] == ["lab7: FAILED test_x.py::test_a"]


def test_the_end_has_a_reason(part: Part, written: io.StringIO) -> None:
    with part.at("suite"):
        part.output(b"collected 2 items\n")
    part.end(State.DIED, "it is gone:\nlook at it")
    assert lines(written)[-1] == "lab7: died, 0/2 tests, 0 failed: it is gone: look at it"


def test_a_host_is_a_row(tmp_path: Path, written: io.StringIO) -> None:
    picture = Picture()
    part = Part(LabHost("lab7", "ssh", "lab7"), tmp_path, picture)
    part.begin()
    with part.at("suite"):
        part.output(b"collected 9 items\ntest_x.py::test_a FAILED [ 11%]\ntest_x.py::test_[b] ")
        Console(file=written, width=100).print(picture.table())
    assert written.getvalue().splitlines()[1].split() == ["lab7", "suite", "1/9", "1", "0:00", "test_x.py::test_[b]"]
