# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a selftest came to, which outcomes are the same, when a test is run again, and what the table says."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvmi_host.lab import selftests
from kvmi_host.lab.errors import LabError
from kvmi_host.lab.selftests import Comparison, Outcome, Record, Transcript, Verdict, compare, judge, select, table

PLACE = "x86_64/debug_regs.c:108: run->exit_reason == KVM_EXIT_DEBUG"
FAILED = f"""Random seed: 0x6b8b4567
==== Test Assertion Failure ====
  {PLACE}
  pid=812 tid=812 errno=4 - Interrupted system call
  INT3: exit 8 exception -559038737
"""
DEADLINE = 120


def outcome(verdict: Verdict, reason: str = "", test: str = "smm_test") -> Outcome:
    return Outcome(test, verdict, reason)


PASSED = outcome(Verdict.PASS)


# What a run came to


@pytest.mark.parametrize(
    ("said", "kernel", "status", "seconds", "verdict", "reason"),
    [
        ("all well", "", 0, 3, Verdict.PASS, ""),
        ("1..0 # SKIP - Requirement not met: sev\n", "", 4, 0, Verdict.SKIP, "Requirement not met: sev"),
        (FAILED, "", 254, 1, Verdict.FAIL, f"{PLACE}; INT3: exit 8 exception -559038737"),
        ("one\ntwo\n\n", "", 1, 1, Verdict.FAIL, "two"),
        ("", "", 1, 1, Verdict.FAIL, "it said nothing"),
        ("one", "", 139, 1, Verdict.FAIL, "signal 11: one"),
        ("one", "", 124, 120, Verdict.TIMEOUT, "120 s"),
        ("one", "", 137, 125, Verdict.TIMEOUT, "120 s"),
        ("one", "", 137, 7, Verdict.FAIL, "signal 9: one"),
        ("all well", "[  12.5] kvm [818]: vcpu0, guest rIP: 0x1 Unhandled WRMSR(0x1) = 0x2", 0, 3, Verdict.PASS, ""),
        (
            "all well",
            "[  12.5] ------------[ cut here ]------------\n[  12.5] WARNING: CPU: 0 PID: 9 at x86.c:1 f+0x1/0x2 [kvm]",
            *(0, 3, Verdict.COMPLAINED, "WARNING: CPU: 0 PID: 9 at x86.c:1 f+0x1/0x2 [kvm]"),
        ),
    ],
)
def test_verdict_and_reason(said: str, kernel: str, status: int, seconds: int, verdict: Verdict, reason: str) -> None:
    judged = judge("debug_regs", said, kernel, status, seconds, DEADLINE)
    assert (judged.verdict, judged.reason) == (verdict, reason)


def test_log_has_all_that_was_said() -> None:
    judged = judge("debug_regs", FAILED, "[ 1.0] kvm: something", 254, 1, DEADLINE)
    assert FAILED in judged.log
    assert "kvm: something" in judged.log
    assert "exit status 254" in judged.log


# What counts as the same


def test_numbers_do_not_tell_failures_apart() -> None:
    first, second = (outcome(Verdict.FAIL, f"a_test.c:{n}: rip == 0x{n:x}") for n in (100, 20000))
    assert first.same(second)


def test_other_reason_does() -> None:
    assert not outcome(Verdict.FAIL, "a.c:1: rip == 0").same(outcome(Verdict.FAIL, "a.c:9: rax == 0"))


def test_other_verdict_does() -> None:
    assert not outcome(Verdict.SKIP).same(PASSED)


# The transcript


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record("ours", tmp_path, 2)


LINES = """
kvm-selftests: begin cpuid_test
no newline at its end
kvm-selftests: kernel

kvm-selftests: end 0 2

kvm-selftests: begin smm_test
1..0 # SKIP - no SMM
kvm-selftests: kernel

kvm-selftests: end 4 1
"""


@pytest.mark.parametrize("size", [1, 7, 10000])
def test_transcript_may_come_in_any_pieces(record: Record, size: int) -> None:
    transcript = Transcript(record, DEADLINE)
    for start in range(0, len(LINES), size):
        transcript.feed(LINES[start : start + size])
    assert {test: each[0].verdict for test, each in record.outcomes.items()} == {
        "cpuid_test": Verdict.PASS,
        "smm_test": Verdict.SKIP,
    }
    assert transcript.ended == 2


def test_logs_are_written_as_tests_end(record: Record, tmp_path: Path) -> None:
    Transcript(record, DEADLINE).feed(LINES)
    assert (tmp_path / "ours" / "cpuid_test.log").read_text().startswith("no newline at its end\n")


def test_host_that_dies_is_its_tests_result(record: Record) -> None:
    transcript = Transcript(record, DEADLINE)
    transcript.feed("kvm-selftests: begin smm_test\nlast words")
    transcript.died("the SSH connection broke", "[ 9.1] all well\n[ 9.5] Kernel panic - not syncing: Fatal exception")
    (died,) = record.outcomes["smm_test"]
    assert (died.verdict, died.reason) == (Verdict.DIED, "Kernel panic - not syncing: Fatal exception")
    assert "last words" in died.log


def test_host_that_dies_between_two_tests_leaves_the_result_of_the_first(record: Record) -> None:
    transcript = Transcript(record, DEADLINE)
    transcript.feed(LINES)
    transcript.died("it is silent", "")
    assert {test: len(each) for test, each in record.outcomes.items()} == {"cpuid_test": 1, "smm_test": 1}


def test_host_that_dies_without_a_test_is_an_error(record: Record) -> None:
    with pytest.raises(LabError, match="does not boot"):
        Transcript(record, DEADLINE).died("it does not boot", "")


# Which tests


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "tests").write_text("smm_test\ncpuid_test\nsvm_vmcall_test\n")
    for name in ("smm_test", "cpuid_test"):
        (folder / name).touch()
    return folder


def test_tests_keep_the_kernels_order(programs: Path) -> None:
    assert select(programs, None) == ["smm_test", "cpuid_test", "svm_vmcall_test"]
    assert select(programs, "^s.*test") == ["smm_test", "svm_vmcall_test"]


@pytest.mark.parametrize("pattern", ["vmx_", "("])
def test_pattern_that_is_of_no_use_is_said(programs: Path, pattern: str) -> None:
    with pytest.raises(LabError, match=r"vmx_.*cpuid_test|no regular expression"):
        select(programs, pattern)


# Both sides


class Script:
    """A host on which a test comes to one thing after the other."""

    def __init__(self, **verdicts: Sequence[Verdict]) -> None:
        self._left = {test: list(each) for test, each in verdicts.items()}
        self.ran: list[list[str]] = []

    def __call__(self, tests: Sequence[str], record: Record) -> None:
        self.ran.append(list(tests))
        for test in tests:
            record.began(test)
            record.ended(outcome(self._left[test].pop(0), test=test))


TESTS = ["smm_test", "cpuid_test"]


def test_sides_that_agree_run_once(programs: Path, tmp_path: Path) -> None:
    stock, ours = (Script(smm_test=[Verdict.FAIL], cpuid_test=[Verdict.PASS]) for _ in range(2))
    compared = compare(stock, ours, programs, TESTS, tmp_path)
    assert [each.differs or each.flaky for each in compared] == [False, False]
    assert stock.ran == ours.ran == [TESTS]


def test_what_differs_is_run_again_on_both_sides(programs: Path, tmp_path: Path) -> None:
    stock = Script(smm_test=[Verdict.PASS] * 2, cpuid_test=[Verdict.PASS])
    ours = Script(smm_test=[Verdict.FAIL, Verdict.PASS], cpuid_test=[Verdict.PASS])
    smm, _ = compare(stock, ours, programs, TESTS, tmp_path)
    assert (smm.differs, smm.flaky) == (False, True)
    assert stock.ran == ours.ran == [TESTS, ["smm_test"]]


def test_what_never_agrees_differs(programs: Path, tmp_path: Path) -> None:
    stock = Script(smm_test=[Verdict.PASS] * 3, cpuid_test=[Verdict.PASS])
    ours = Script(smm_test=[Verdict.FAIL] * 3, cpuid_test=[Verdict.PASS])
    smm, cpuid = compare(stock, ours, programs, TESTS, tmp_path)
    assert (smm.differs, cpuid.differs) == (True, False)
    (written, _) = json.loads((tmp_path / "results.json").read_text())
    assert (written["test"], written["differs"], len(written["ours"])) == ("smm_test", True, 3)


def test_what_does_not_compile_is_in_the_table(programs: Path, tmp_path: Path) -> None:
    side = Script(smm_test=[Verdict.PASS] * 2)
    (_, vmcall) = compare(side, side, programs, ["smm_test", "svm_vmcall_test"], tmp_path)
    assert vmcall.ours[0].verdict is Verdict.NOT_BUILT
    assert not vmcall.differs


def test_table_marks_what_differs() -> None:
    fail, skip = outcome(Verdict.FAIL, "a | b"), outcome(Verdict.SKIP, "no SMM")
    compared = [
        Comparison("cpuid_test", [PASSED], [PASSED]),
        Comparison("smm_test", [PASSED] * 3, [fail] * 3),
        Comparison("evmcs_test", [skip, skip], [fail, skip]),
    ]
    assert table(compared).splitlines() == [
        "| test       | stock                      | ours                       | reason |",
        "| ---------- | -------------------------- | -------------------------- | ------ |",
        "| cpuid_test | pass                       | pass                       |  |",
        "| smm_test   | pass, then pass, then pass | fail, then fail, then fail | **DIFFERS**: pass / a \\| b |",
        "| evmcs_test | skip, then skip            | fail, then skip            | flaky: no SMM / a \\| b |",
    ]


def test_summary_counts_ours() -> None:
    compared = [Comparison("cpuid_test", [PASSED], [PASSED]), Comparison("smm_test", [PASSED], [outcome(Verdict.FAIL)])]
    assert selftests.summary(compared) == "2 tests, with ours: 1 pass, 1 fail; 1 differ, 0 flaky"
