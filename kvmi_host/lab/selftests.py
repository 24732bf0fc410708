# SPDX-License-Identifier: LGPL-2.1-or-later
"""KVM's own selftests, as the kernel's source has them, on an emulated host: with Debian's modules and with ours.

Each test runs by itself, as root, for no longer than its deadline. What it came to is a :class:`Verdict`; both sides
have to come to the same one, for the same reason. A test that does not is run again on both sides, on hosts that were
just started: only if they never agree it counts as different.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from pathlib import Path, PurePosixPath

from kvmi_host.host.kernel_log import TROUBLE
from kvmi_host.lab import deploy
from kvmi_host.lab.bochs import BochsHost
from kvmi_host.lab.box import Box
from kvmi_host.lab.errors import LabError
from kvmi_host.lab.progress import show, tail

ROUNDS = 3
"""How often a test is run at most, on each side, until both agree."""

_SLACK = 60
"""Seconds that a box has to say that a test ended, beyond the test's deadline: one that does not is taken to hang."""

_REMARK = 120
"""Characters of a reason that the table has room for; all of it is in the log and in ``results.json``."""

_TOP = PurePosixPath("/opt/kvm-selftests")
_RUN = _TOP / "run"
_MARK = "kvm-selftests:"

_ARGUMENTS = {
    "access_tracking_perf_test": "-b 64M",
    "demand_paging_test": "-b 64M",
    "dirty_log_perf_test": "-b 64M",
    "dirty_log_test": "-i 3 -M clear-log",
    "kvm_page_table_test": "-b 64M",
    "memslot_modification_stress_test": "-b 64M",
    "memslot_perf_test": "-l 1 -s 512 -e 4",
}
"""Of tests that would touch a gigabyte of guest memory, or go on for seconds: too much for an emulated CPU."""

# A test gets no terminal and a process group of its own, which ends with it. Some use sudo; there is none in the host.
_PROGRAMS: Mapping[PurePosixPath, bytes] = {
    _TOP / "bin" / "sudo": b'#!/bin/sh\nexec "$@"\n',
    _RUN: f"""#!/bin/sh
# run DEADLINE COMMAND...: each test's output and what the kernel said, between marks.
deadline=$1
shift
cd {_TOP}
PATH={_TOP}/bin:$PATH
for command; do
	test=${{command%% *}}
	printf '\\n{_MARK} begin %s\\n' "$test"
	dmesg --clear
	begin=$(date +%s)
	timeout --kill-after 5 "$deadline" ./$command < /dev/null 2>&1
	status=$?
	seconds=$(($(date +%s) - begin))
	printf '\\n{_MARK} kernel\\n'
	dmesg
	printf '\\n{_MARK} end %s %s\\n' "$status" "$seconds"
done
""".encode(),
}


class Verdict(StrEnum):
    """What a test came to."""

    PASS = "pass"
    SKIP = "skip"
    FAIL = "fail"
    TIMEOUT = "timeout"
    COMPLAINED = "kernel complained"
    DIED = "host died"
    NOT_BUILT = "not built"


UPSET = {Verdict.TIMEOUT, Verdict.COMPLAINED, Verdict.DIED}
"""After these nobody knows what state the host is in: the next test gets another one."""


@dataclass(frozen=True)
class Outcome:
    """How one run of a test ended.

    :ivar reason: what was said of it; empty when it passed.
    :ivar seconds: how long it took, by the host's clock.
    :ivar log: all that the test and the kernel said.
    """

    test: str
    verdict: Verdict
    reason: str = ""
    seconds: int = 0
    log: str = field(default="", repr=False)

    def same(self, other: Outcome) -> bool:
        """Whether both came to the same, for the same reason; numbers (lines, addresses, PIDs) do not count."""
        number = re.compile(r"0x[0-9a-f]+|[0-9]+")
        mine, theirs = (number.sub("#", outcome.reason) for outcome in (self, other))
        return self.verdict is other.verdict and mine == theirs


def judge(test: str, said: str, kernel: str, status: int, seconds: int, deadline: int) -> Outcome:
    """What a run came to.

    :param said: the test's output.
    :param kernel: what its kernel said meanwhile.
    :param status: the exit status, as a shell has it; 124 and 137 are those of ``timeout``.
    """
    log = f"{said}\nexit status {status}, {seconds} s\n" + (f"\nThe kernel:\n{kernel}\n" if kernel else "")
    complaint = next((line for line in kernel.splitlines() if TROUBLE.search(line)), None)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = lines[-1] if lines else "it said nothing"
    if complaint is not None:
        verdict, reason = Verdict.COMPLAINED, re.sub(r"^\[[^]]*\] ", "", complaint)
    elif status in (124, 137) and seconds >= deadline:
        verdict, reason = Verdict.TIMEOUT, f"{deadline} s"
    elif status == 0:
        verdict, reason = Verdict.PASS, ""
    elif status == 4:
        verdict, reason = Verdict.SKIP, last.removeprefix("1..0 # SKIP - ")
    else:
        failed = [place for mark, place in pairwise(lines) if "Test Assertion Failure" in mark]
        signal = f"signal {status - 128}: " if 128 < status < 160 else ""
        # An assertion of the guest is in the last line alone.
        verdict, reason = Verdict.FAIL, signal + "; ".join([*failed[:1], last])
    return Outcome(test, verdict, reason, seconds, log)


class Record:
    """The outcomes of one side, shown and written to a folder as they come.

    :param side: ``"stock"`` or ``"ours"``.
    :param total: how many tests are to come.
    """

    def __init__(self, side: str, folder: Path, total: int) -> None:
        self.side = side
        self.outcomes: dict[str, list[Outcome]] = {}
        self._folder = folder / side
        self._folder.mkdir(parents=True, exist_ok=True)
        self._total = total
        self._begun = 0

    def again(self, total: int) -> None:
        """Some of the tests are to come once more."""
        self._begun, self._total = 0, total

    def began(self, test: str) -> None:
        """A test runs now."""
        self._begun += 1
        show(f"{self.side} {self._begun} of {self._total}: {test} ")

    def ended(self, outcome: Outcome) -> None:
        """A test is through."""
        rounds = self.outcomes.setdefault(outcome.test, [])
        rounds.append(outcome)
        suffix = f".{len(rounds)}" if len(rounds) > 1 else ""
        (self._folder / f"{outcome.test}{suffix}.log").write_text(outcome.log)
        show(f"{outcome.verdict}, {outcome.seconds} s\n")


class Transcript:
    """Takes apart what :data:`_RUN` writes, piece by piece, and records it.

    :ivar running: the test that began and has not ended.
    """

    def __init__(self, record: Record, deadline: int) -> None:
        self._record = record
        self._deadline = deadline
        self._partial = ""
        self._said: list[str] = []
        self._kernel: list[str] = []
        self._into = self._said
        self.running: str | None = None
        self.ended = 0
        """How many tests did."""

    def feed(self, piece: str) -> None:
        """Take the next piece, which may end anywhere."""
        *lines, self._partial = (self._partial + piece).split("\n")
        for line in lines:
            self._line(line.rstrip("\r"))

    def _line(self, line: str) -> None:
        match line.split(" ") if line.startswith(_MARK) else None:
            case [_, "begin", test]:
                self._said, self._kernel = [], []
                self._into, self.running = self._said, test
                self._record.began(test)
            case [_, "kernel"]:
                self._into = self._kernel
            case [_, "end", status, seconds] if self.running:
                said, kernel = ("\n".join(part).strip("\n") for part in (self._said, self._kernel))
                self._end(judge(self.running, said, kernel, int(status), int(seconds), self._deadline))
            case _:
                self._into.append(line)

    def died(self, error: str, console: str) -> None:
        """The host did not come back from the test that runs, or from the one that ended: that has its verdict.

        :param error: how that was noticed.
        :param console: the end of the kernel's console.
        :raise LabError: no test had begun: it is the host that does not work.
        """
        if self.running is None:
            if not self.ended:
                raise LabError(error)
            return
        complaint = next((line for line in console.splitlines() if TROUBLE.search(line)), None)
        reason = re.sub(r"^\[[^]]*\] ", "", complaint or error.splitlines()[0])
        said = "\n".join([*self._said, self._partial])
        log = f"{said}\n\n{error}\n\nThe end of its console:\n{console}\n"
        self._end(Outcome(self.running, Verdict.DIED, reason, log=log))

    def _end(self, outcome: Outcome) -> None:
        self._record.ended(outcome)
        self.running = None
        self.ended += 1


Runner = Callable[[Sequence[str], Record], None]
"""Runs tests in their order on one host, which it starts and ends, and records what they come to."""


def _command(tests: Iterable[str], deadline: int) -> list[str]:
    return [str(_RUN), str(deadline), *(f"{test} {_ARGUMENTS.get(test, '')}".strip() for test in tests)]


def _programs(folder: Path, tests: Iterable[str]) -> dict[PurePosixPath, bytes]:
    """What has to be in the host: the tests, and what they are run with. A script needs the program of its name."""
    wanted = {name for test in tests for name in (test, test.removesuffix(".sh")) if (folder / name).is_file()}
    return {**_PROGRAMS, **{_TOP / name: (folder / name).read_bytes() for name in sorted(wanted)}}


def in_box(box: Box, folder: Path, deadline: int) -> Runner:
    """Tests in a host in a box. One that a test has upset is replaced.

    :param folder: of the tests' programs.
    :param deadline: seconds that each may take.
    """

    def runner(tests: Sequence[str], record: Record) -> None:
        stream = deploy.pack(_programs(folder, tests))
        ready = False
        try:
            for test in tests:
                if not ready:
                    box.up()
                    box.run("tar -xz --no-same-owner -C /", stdin=stream)
                transcript = Transcript(record, deadline)
                try:
                    command = _command([test], deadline)
                    box.run(command, deadline=deadline + _SLACK, check=False, on_output=transcript.feed)
                    if not transcript.ended:
                        raise LabError(f"{test} ended without a result")
                    ready = record.outcomes[test][-1].verdict not in UPSET
                except LabError as error:
                    transcript.died(str(error), tail(box.console_log))
                    ready = False
                if not ready:
                    box.down()
        finally:
            box.down()

    return runner


def in_bochs(host: BochsHost, folder: Path, deadline: int) -> Runner:
    """Tests in an Intel host: all in one that lives as long as they let it.

    :param folder: as in :func:`in_box`.
    :param deadline: likewise, by that host's clock.
    """

    def runner(tests: Sequence[str], record: Record) -> None:
        left = list(tests)
        while left:
            transcript = Transcript(record, deadline)
            command = shlex.join(_command(left, deadline))
            try:
                host.run(command, [], transcript.feed, _programs(folder, left))
                if transcript.ended < len(left):
                    raise LabError("the Intel host ended before its tests did")
            except LabError as error:
                transcript.died(str(error), tail(host.console_log))
            del left[: transcript.ended]

    return runner


@dataclass(frozen=True)
class Comparison:
    """One test, with one outcome a round on each side."""

    test: str
    stock: Sequence[Outcome]
    ours: Sequence[Outcome]

    @property
    def differs(self) -> bool:
        """Whether the sides did not agree in any round."""
        return not self.stock[-1].same(self.ours[-1])

    @property
    def flaky(self) -> bool:
        """Whether they did not agree at once."""
        return not self.differs and len(self.stock) > 1

    @property
    def remark(self) -> str:
        """What the table says beside the verdicts."""
        if not self.differs and not self.flaky:
            return self.ours[0].reason
        # Of the first round: what came later may be that all was well.
        stock, ours = (side[0].reason or side[0].verdict for side in (self.stock, self.ours))
        return f"{'**DIFFERS**' if self.differs else 'flaky'}: {stock} / {ours}"


def select(folder: Path, pattern: str | None) -> list[str]:
    """The names of the tests that a pattern finds, in the kernel's order.

    :param folder: what ``kernel/selftests`` made.
    :param pattern: a regular expression that fits somewhere in the name; None for all.
    :raise LabError: there is no such test.
    """
    tests = (folder / "tests").read_text().split()
    try:
        found = [test for test in tests if re.search(pattern or "", test)]
    except re.error as error:
        raise LabError(f"the pattern {pattern!r} is no regular expression: {error}") from error
    if not found:
        raise LabError(f"none of KVM's selftests fits {pattern!r}; there are: {', '.join(tests)}")
    return found


def compare(stock: Runner, ours: Runner, folder: Path, tests: Sequence[str], logs: Path) -> list[Comparison]:
    """Run tests on both sides, and those that differ again.

    :param folder: of the tests' programs.
    :param logs: gets what each run said, as ``SIDE/TEST.log``, and ``results.json``.
    """
    for old in ("stock", "ours"):
        shutil.rmtree(logs / old, ignore_errors=True)
    built = [test for test in tests if (folder / test).is_file()]
    sides = [(runner, Record(side, logs, len(built))) for side, runner in (("stock", stock), ("ours", ours))]
    wanted = built
    for _ in range(ROUNDS):
        for runner, record in sides:
            record.again(len(wanted))
            runner(wanted, record)
        theirs, mine = (record.outcomes for _, record in sides)
        wanted = [test for test in wanted if not theirs[test][-1].same(mine[test][-1])]
        if not wanted:
            break
    missing = {test: [Outcome(test, Verdict.NOT_BUILT)] for test in tests if test not in built}
    compared = [Comparison(test, *({**record.outcomes, **missing}[test] for _, record in sides)) for test in tests]
    (logs / "results.json").write_text(json.dumps(as_json(compared), indent=1) + "\n")
    return compared


def as_json(compared: Iterable[Comparison]) -> list[dict[str, object]]:
    """What ``results.json`` holds: an object for each test, with a list of rounds for each side."""

    def rounds(outcomes: Sequence[Outcome]) -> list[dict[str, object]]:
        return [{"verdict": each.verdict, "reason": each.reason, "seconds": each.seconds} for each in outcomes]

    return [
        {
            "test": each.test,
            "differs": each.differs,
            "flaky": each.flaky,
            "stock": rounds(each.stock),
            "ours": rounds(each.ours),
        }
        for each in compared
    ]


def table(compared: Iterable[Comparison]) -> str:
    """What the run came to, a line a test, in Markdown."""
    rows: list[tuple[str, ...]] = [("test", "stock", "ours", "reason")]
    for each in compared:
        verdicts = (", then ".join(outcome.verdict for outcome in side) for side in (each.stock, each.ours))
        remark = textwrap.shorten(each.remark, _REMARK, placeholder=" ...").replace("|", "\\|")
        rows.append((each.test, *verdicts, remark))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    rows.insert(1, tuple("-" * width for width in (*widths, 6)))
    cells = ([*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def summary(compared: Sequence[Comparison]) -> str:
    """The last line of a run."""
    verdicts = Counter(each.ours[-1].verdict for each in compared)
    counts = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in Verdict if verdicts[verdict])
    flaky = sum(each.flaky for each in compared)
    return f"{len(compared)} tests, with ours: {counts}; {sum(each.differs for each in compared)} differ, {flaky} flaky"
