# SPDX-License-Identifier: LGPL-2.1-or-later
"""How far pytest is, from what it writes: held against pytest's own output."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from kvmi_host.lab.pytest_output import Tally

SUITE = """
import pytest
@pytest.mark.parametrize("what", ["a", "b c, as d", "d::e", "f[g]"])
def test_well(what): pass
def test_ill(): assert False
def test_left_out(): pass
@pytest.fixture
def broken():
    yield
    assert False
def test_ends_ill(broken): pass
def test_talks(capfd):
    with capfd.disabled(): print("\\nit says FAILED [ 10%]\\nand more")
"""
WRITTEN = (
    "collected 3 items\n\ntest_x.py::a PASSED [ 33%]\ntest_x.py::b[\u00e4 c] FAILED [ 66%]\ntest_x.py::c ".encode()
)


def output_of(folder: Path) -> bytes:
    (folder / "test_x.py").write_text(SUITE)
    argv = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-c", "/dev/null", "-k", "not left_out"]
    return subprocess.run([*argv, folder], capture_output=True, check=False, cwd=folder).stdout


def test_tests_are_counted_as_pytest_counts_them(tmp_path: Path) -> None:
    tally = Tally()
    tally.feed(output_of(tmp_path))
    assert (tally.total, tally.current) == (7, "")
    assert tally.failed == ["test_x.py::test_ill", "test_x.py::test_ends_ill"]
    assert tally.done == 7


def test_the_current_test_is_known_before_its_line_ends() -> None:
    tally = Tally()
    tally.feed(b"collected 1 item\n../hwtest/test_page.py::test_walk[a b] ")
    assert tally.current == "test_page.py::test_walk[a b]"


def test_what_a_name_does_to_a_terminal_is_taken_out() -> None:
    tally = Tally()
    tally.feed(b"test_x.py::test\x1b[2J ")
    assert "\x1b" not in tally.current


@given(st.lists(st.integers(0, len(WRITTEN))))
def test_it_does_not_matter_how_the_output_is_cut(cuts: list[int]) -> None:
    tally = Tally()
    ends = [0, *sorted(cuts), len(WRITTEN)]
    for begin, end in pairwise(ends):
        tally.feed(WRITTEN[begin:end])
    assert (tally.total, tally.done, tally.failed, tally.current) == (3, 2, ["test_x.py::b[\u00e4 c]"], "test_x.py::c")


@given(st.binary(max_size=2000))
def test_any_output_is_taken(output: bytes) -> None:
    tally = Tally()
    tally.feed(b"test_x.py::a PASSED [ 50%]\n" + output)
    assert tally.done >= 1
