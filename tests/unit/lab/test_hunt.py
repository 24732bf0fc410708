# SPDX-License-Identifier: LGPL-2.1-or-later
"""How mutants are hunted: which tests run when, what counts as a find, and when the host is replaced."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmi_host.lab import hunt, suite
from kvmi_host.lab.errors import LabError
from kvmi_host.lab.hunt import How, Trace, Verdict
from kvmi_host.lab.mutants import MODULES, Mutant

FAILED = """<testsuites><testsuite><testcase classname="tests.hardware.test_a" name="test_one" time="1"/>
<testcase classname="tests.hardware.test_a" name="test_two[x]" time="1">
<failure message="assert 1 == 2&#10; where 2 = f()">long</failure></testcase></testsuite></testsuites>"""
COMPLAINED = FAILED.replace("assert 1", "AssertionError: the kernel complains:&#10;WARNING: CPU: 0")
MUTANT = Mutant("some-thing", "a thing", "test_a.py", "two", Path("some-thing.patch"))
OTHER = Mutant("other-thing", "another", "test_b.py", "three", Path("other-thing.patch"))


class FakeBox:
    """A box that keeps a diary."""

    def __init__(self, folder: Path) -> None:
        self.console_log = folder / "console.log"
        self.console_log.write_text("[ 1.0] booted\n")
        self.diary: list[str] = []
        self.ignored: list[str] = []
        """Files that the last run left out."""
        self.refuses: list[str] = []
        """What it does when it is asked to run something, each once: an error's message, or nothing."""
        self.is_up = False

    def up(self) -> None:
        self.diary.append("up")
        self.is_up = True

    def down(self) -> None:
        self.diary.append("down")
        self.is_up = False

    def run(self, command: object, **_: object) -> None:
        self.diary.append("swap" if "insmod" in str(command) else "ask")
        if not self.is_up:
            raise LabError("it does not run")
        if self.refuses and (error := self.refuses.pop(0)):
            raise LabError(error)


class FakeTree:
    """Modules that need no compiler."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in MODULES:
            (folder / name).write_bytes(b"module")

    def modules(self, mutant: Mutant | None) -> Path:
        return self.folder


@pytest.fixture
def box(tmp_path: Path) -> FakeBox:
    return FakeBox(tmp_path)


@pytest.fixture
def pursue(box: FakeBox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Verdict]]:
    """Hunts mutants with a suite that comes to what it is told, run by run: the control's is the first.

    What a run comes to is a report of failed tests, an error of the host, or None when all pass.
    """

    def hunted(comes_to: list[str | LabError | None], *mutants: Mutant) -> list[Verdict]:
        outcomes = iter(comes_to)

        def run(runner: object, reports: Path, *, extra: list[str]) -> int:
            box.diary.append(extra[extra.index("-k") + 1] if "-k" in extra else "all")
            box.ignored = [argument.rpartition("/")[2] for argument in extra if argument.startswith("--ignore-glob=")]
            outcome = next(outcomes)
            if isinstance(outcome, LabError):
                raise outcome
            reports.mkdir(exist_ok=True)
            (reports / "junit.xml").write_text(outcome or "")
            return 1 if outcome else 0

        monkeypatch.setattr(suite, "run", run)
        return list(hunt.hunt(box, FakeTree(tmp_path), mutants or [MUTANT], tmp_path))

    return hunted


def test_the_expected_tests_run_without_a_mutation_before_they_run_with_one(box, pursue) -> None:
    pursue([None, FAILED, FAILED], MUTANT, OTHER)
    assert box.diary[:3] == ["up", "swap", "(two) or (three)"]
    assert box.diary[3:] == ["swap", "two", "swap", "three"]


def test_no_other_file_of_the_suite_is_read_but_for_the_whole_suite(box, pursue) -> None:
    sequence = Mutant("some-thing", "a thing", "test_sequence.py", "first", Path("some-thing.patch"))
    pursue([None, FAILED], sequence)
    assert "test_replies.py" in box.ignored
    assert "test_sequence.py" not in box.ignored
    pursue([None, None, None], sequence)
    assert not box.ignored


def test_a_failure_without_a_mutation_is_an_error(pursue) -> None:
    with pytest.raises(LabError, match=r"without a mutation a test failed.*test_a.py::test_two\[x\]: assert 1 == 2"):
        pursue([FAILED])


def test_a_failed_test_is_a_find(pursue) -> None:
    (verdict,) = pursue([None, FAILED])
    assert verdict.caught
    assert verdict.expected
    assert verdict.trace == Trace(How.TEST, "test_a.py::test_two[x]", "assert 1 == 2")


def test_the_whole_suite_runs_if_the_expected_tests_pass(box, pursue) -> None:
    (verdict,) = pursue([None, None, FAILED])
    assert box.diary[-2:] == ["two", "all"]
    assert verdict.caught
    assert not verdict.expected


def test_one_that_no_test_finds_is_not_caught(pursue) -> None:
    (verdict,) = pursue([None, None, None])
    assert not verdict.caught


def test_a_complaint_of_the_kernel_is_a_find_and_its_host_is_replaced(box, pursue) -> None:
    verdict, _ = pursue([None, COMPLAINED, FAILED], MUTANT, OTHER)
    assert verdict.trace.how is How.LOG
    assert box.diary[-7:] == ["two", "down", "swap", "down", "up", "swap", "three"]


@pytest.mark.parametrize(("refuses", "how"), [(["", "", "gone"], How.DIED), ([], How.HUNG)])
def test_a_host_that_does_not_come_back_is_a_find_and_replaced(box, pursue, refuses, how) -> None:
    box.refuses = refuses
    (verdict,) = pursue([None, LabError("the connection broke\nin a way")])
    assert verdict.trace == Trace(how, "", "the connection broke")
    assert box.diary[-2:] == ["ask", "down"]


def test_the_last_word_of_a_dead_host_is_told(box, pursue) -> None:
    box.refuses = ["", "", "gone"]
    box.console_log.write_text("[ 1.0] booted\n[ 2.0] BUG: unable to handle page fault\n[ 2.1] RIP: 0010:f\n")
    (verdict,) = pursue([None, LabError("the connection broke")])
    assert verdict.trace.message == "[ 2.0] BUG: unable to handle page fault"


def test_a_host_that_keeps_its_modules_is_replaced(box, pursue) -> None:
    box.refuses = ["rmmod: module is in use"]
    pursue([None, FAILED])
    assert box.diary[:5] == ["up", "swap", "down", "up", "swap"]


def test_a_suite_without_such_a_test_is_an_error(pursue) -> None:
    with pytest.raises(LabError, match="says of no test that it failed"):
        pursue([None, "<testsuites/>"])


# What is written of it


CAUGHT = Verdict(MUTANT, Trace(How.TEST, "test_a.py::test_two", "assert 1 == 2"), True, 21.4)
LUCKY = Verdict(MUTANT, Trace(How.TEST, "test_b.py::test_four", "assert 0"), False, 700.0)
LOGGED = Verdict(MUTANT, Trace(How.LOG, "test_a.py::test_two", "the kernel complains:"), True, 30.0)
DEAD = Verdict(MUTANT, Trace(How.DIED, "", "BUG: a | b"), True, 60.0)
SURVIVOR = Verdict(MUTANT, Trace(How.NOT_AT_ALL, "", "the whole suite passes"), False, 900.0)


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        (CAUGHT, "| test_a.py::test_two | 21 |"),
        (LUCKY, "| test_b.py::test_four (not among those expected) | 700 |"),
        (LOGGED, "| test_a.py::test_two: the kernel complained | 30 |"),
        (DEAD, "| the host died: BUG: a \\| b | 60 |"),
        (SURVIVOR, "| NOT CAUGHT: the whole suite passes | 900 |"),
    ],
)
def test_the_table_says_what_gave_it_away(verdict: Verdict, said: str) -> None:
    assert hunt.table([verdict]).splitlines()[2] == f"| some-thing | a thing {said}"


def test_the_json_has_the_same_and_more() -> None:
    (caught, dead) = json.loads(hunt.as_json([CAUGHT, DEAD]))
    assert caught == {
        "name": "some-thing",
        "broken": "a thing",
        "caught": True,
        "how": "a test failed",
        "test": "test_a.py::test_two",
        "message": "assert 1 == 2",
        "expected": True,
        "seconds": 21.4,
    }
    assert (dead["how"], dead["test"]) == ("the host died", "")
