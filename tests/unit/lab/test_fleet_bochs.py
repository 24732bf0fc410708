# SPDX-License-Identifier: LGPL-2.1-or-later
"""What becomes of an Intel host in a night. It is never connected to: it runs, says something, and is gone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kvmi_host.host.kernels import Series
from kvmi_host.host.vendor import Vendor
from kvmi_host.lab import cache, suite
from kvmi_host.lab.errors import LabError
from kvmi_host.lab.fleet import box_name, run_fleet
from kvmi_host.lab.inventory import LabHost
from kvmi_host.lab.night import HostRun, State

Does = Callable[[Callable[[str], None], Path], int]
HOST = LabHost("intel", "box", cpu=Vendor.INTEL, kernel=Series.V6_1, deadline=60)
BEGUN = "collected 2 items\ntest_x.py::test_a "


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., HostRun]:
    """What becomes of a host that does that."""

    def run(does: Does, host: LabHost = HOST, stop: threading.Event | None = None) -> HostRun:
        def in_bochs(_host: object, on_output: Callable[[str], None]) -> suite.Runner:
            def runner(_arguments: Sequence[str], reports: Path) -> int:
                on_output(BEGUN)
                return does(on_output, reports)

            return runner

        monkeypatch.setattr(suite, "in_bochs", in_bochs)
        (run,) = run_fleet([host], tmp_path / "night", stop=stop).hosts
        return run

    return run


def fails(said: str) -> Does:
    def does(_on_output: Callable[[str], None], _reports: Path) -> int:
        raise LabError(said)

    return does


def test_it_finishes_with_its_status(run: Callable[..., HostRun]) -> None:
    def does(on_output: Callable[[str], None], reports: Path) -> int:
        on_output("PASSED [ 50%]\ntest_x.py::test_b FAILED [100%]\n")
        (reports / "junit.xml").write_text("<testsuites/>")
        return 1

    ended = run(does)
    assert (ended.state, ended.status, ended.reason) == (State.FINISHED, 1, "1 of 2 tests failed")


def test_a_panic_is_its_death(run: Callable[..., HostRun]) -> None:
    assert run(fails("the Intel host failed: Kernel panic - not syncing")).state is State.DIED


def test_silence_is_a_hang(run: Callable[..., HostRun]) -> None:
    assert run(fails("the Intel host failed: nothing came on its serial lines for 1200 s")).state is State.HUNG


def test_its_console_tells_of_complaints(run: Callable[..., HostRun]) -> None:
    def does(_on_output: Callable[[str], None], reports: Path) -> int:
        (reports / "console.log").write_text("WARNING: at boot\nkvmi-host: the suite begins\nBUG: in the suite\n")
        return 0

    assert run(does).warnings == ("BUG: in the suite",)


def test_it_is_ended_at_its_deadline(run: Callable[..., HostRun]) -> None:
    host = LabHost("intel", "box", cpu=Vendor.INTEL, kernel=Series.V6_1, deadline=-1)
    ended = run(fails("never reached"), host)
    assert (ended.state, "deadline" in ended.reason) == (State.HUNG, True)


def test_it_is_ended_with_the_night(run: Callable[..., HostRun]) -> None:
    stop = threading.Event()

    def does(on_output: Callable[[str], None], _reports: Path) -> int:
        stop.set()
        on_output(".")
        pytest.fail("it was to end")

    assert run(does, stop=stop).state is State.INTERRUPTED


def test_a_box_that_another_night_has_is_left_to_it(run: Callable[..., HostRun]) -> None:
    with cache.claimed(box_name(HOST)):
        host = run(lambda on_output, reports: pytest.fail("it was run"))
    assert (host.state, "another process has night-intel" in host.reason) == (State.UNREACHABLE, True)
