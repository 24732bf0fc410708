# SPDX-License-Identifier: LGPL-2.1-or-later
"""The night: every part runs whatever failed before, and its report, which is always there, tells of each."""

from __future__ import annotations

import html
import json
import os
import shutil
import signal
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DEADLINE = 60.0  # seconds
NIGHT = {"hosts": [{"name": "lab1", "state": "finished", "reason": "", "warnings": []}]}
REPORT = f"""
while [ "$1" != --report ]; do shift; done
mkdir -p "$2"
echo '{json.dumps(NIGHT)}' > "$2/night.json"
echo '<testsuites><testsuite tests="1"><testcase name="test_x"/></testsuite></testsuites>' > "$2/junit.xml"
echo '<header>the page</header>' > "$2/index.html"
"""
"""What hwtest leaves of a night."""

Night = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with the night's scripts, and programs that do nothing where it calls others."""
    for name in ("nightly", "conclude.py"):
        (tmp_path / "ci").mkdir(exist_ok=True)
        shutil.copy(ROOT / "ci" / name, tmp_path / "ci" / name)
    (tmp_path / "bin").mkdir()
    script(tmp_path / "ci/fuzz", "exit 0")
    script(tmp_path / "bin/kvmi-host", REPORT)
    return tmp_path


def script(path: Path, text: str) -> None:
    """A program; what it is called with goes to the file ``calls``."""
    calls = path.parents[1] / "calls"
    path.write_text(f'#!/bin/bash\necho "{path.name} $*" >> {calls}\n{text}\n')
    path.chmod(0o755)


def environment(tree: Path, **variables: str) -> dict[str, str]:
    mine = {"HOME": str(tree / "home"), "PATH": f"{tree / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    unset = {"INVENTORY", "FILTERS", "LIMIT", "FORKS", "K", "MINUTES", "MUTANTS", "REPORT", "HISTORY", "XDG_STATE_HOME"}
    return {**{name: value for name, value in os.environ.items() if name not in unset}, **mine, **variables}


@pytest.fixture
def night(tree: Path) -> Night:
    """Runs a night, with these variables in its environment."""

    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        env = environment(tree, **variables)
        return subprocess.run([tree / "ci/nightly"], env=env, capture_output=True, text=True, timeout=DEADLINE)

    return run


def calls(tree: Path) -> list[str]:
    return (tree / "calls").read_text().splitlines()


def failures(tree: Path) -> dict[str | None, str | None]:
    """The failed tests of junit.xml, and why."""
    cases = ElementTree.parse(tree / "report/junit.xml").iter("testcase")
    return {case.get("name"): found.get("message") for case in cases for found in case.iter("failure")}


def test_the_suite_of_the_inventory_then_ten_minutes_of_fuzzing(night: Night, tree: Path) -> None:
    done = night()
    assert done.returncode == 0, done.stdout + done.stderr
    history = tree / "home/.local/state/kvmi-host/nights.sqlite"
    assert calls(tree) == [
        f"kvmi-host hwtest --inventory ci/lab.toml --report report --history {history}",
        "fuzz 600",
    ]
    assert history.parent.is_dir()


def test_the_environment_says_what_else(night: Night, tree: Path) -> None:
    where = {"INVENTORY": "my lab.toml", "REPORT": str(tree / "my report"), "HISTORY": str(tree / "nights")}
    night(**where, LIMIT="lab1 vendor=amd", FORKS="2", K="not slow", MINUTES="0", MUTANTS="1")
    assert calls(tree) == [
        "kvmi-host hwtest --inventory my lab.toml --limit=lab1 --limit=vendor=amd --forks 2 -k not slow "
        f"--report {tree}/my report --history {tree}/nights",
        f"kvmi-host mutants --report {tree}/my report/mutants",
    ]


def test_hosts_may_be_labgrids_places(night: Night, tree: Path) -> None:
    night(FILTERS="vendor=amd kernel=6.1", LG_COORDINATOR="rack:20408")
    assert calls(tree)[0].startswith(
        "kvmi-host hwtest --lg-filter=vendor=amd --lg-filter=kernel=6.1 --lg-coordinator rack:20408 --report"
    )


def test_a_number_of_minutes_that_is_none_is_refused_before_anything_runs(night: Night, tree: Path) -> None:
    assert night(MINUTES="ten").returncode == 2
    assert not (tree / "calls").exists()


def test_every_part_runs_and_a_failure_in_any_fails_the_night(night: Night, tree: Path) -> None:
    script(tree / "bin/kvmi-host", f"{REPORT}\nexit 1")
    script(tree / "ci/fuzz", "exit 1")
    done = night(MUTANTS="1")
    assert done.returncode == 1
    assert [call.split()[1] for call in calls(tree)] == ["hwtest", "600", "mutants"]


def test_what_failed_beside_the_suite_is_a_failed_test(night: Night, tree: Path) -> None:
    script(tree / "ci/fuzz", "echo 'it found something'; exit 1")
    assert night().returncode == 1
    assert failures(tree) == {"test_fuzz": "fuzz: failed with status 1"}


def test_what_ran_beside_the_suite_is_on_its_page(night: Night, tree: Path) -> None:
    script(tree / "ci/fuzz", "exit 1")
    night(MUTANTS="1")
    page = (tree / "report/index.html").read_text()
    assert "<header>the page<p>Beside the suite: fuzz failed with status 1; mutants passed (" in page


def test_the_suites_page_has_a_place_for_what_ran_beside_it() -> None:
    before, main, _ = (ROOT / "kvmi_host/report/night.html").read_text().partition("<main")
    assert main
    assert before.count("</header>") == 1


def test_what_fails_in_the_suite_is_in_its_own_report(night: Night, tree: Path) -> None:
    script(tree / "bin/kvmi-host", f"{REPORT}\nexit 1")
    assert night().returncode == 1
    assert failures(tree) == {}


def test_a_suite_that_leaves_nothing_leaves_a_page_that_says_why(night: Night, tree: Path) -> None:
    script(tree / "bin/kvmi-host", "echo 'no <such> file'; exit 2")
    assert night().returncode == 1
    assert html.escape("no <such> file") in (tree / "report/index.html").read_text()
    assert failures(tree) == {"test_suite": "suite: failed with status 2"}


def test_a_tree_that_cannot_be_imported_leaves_a_page(night: Night, tree: Path) -> None:
    script(tree / "bin/kvmi-host", "python -c 'import kvmi_host'")
    (tree / "broken").mkdir()
    (tree / "broken/kvmi_host.py").write_text("raise ImportError('it is broken')")
    assert night(PYTHONPATH=str(tree / "broken")).returncode == 1
    assert "ImportError: it is broken" in (tree / "report/index.html").read_text()
    assert failures(tree) == {"test_suite": "suite: failed with status 1"}


def test_what_the_last_night_left_is_not_taken_for_this_ones(night: Night, tree: Path) -> None:
    night(MUTANTS="1")
    script(tree / "bin/kvmi-host", "exit 2")
    assert night().returncode == 1
    assert not (tree / "report/night.json").exists()
    assert "the page" not in (tree / "report/index.html").read_text()


def test_the_summary_has_the_parts_and_the_hosts_and_nothing_leaves_its_cell(night: Night, tree: Path) -> None:
    run = {"name": "lab1", "state": "died", "reason": "off | <img>\nagain", "warnings": []}
    script(tree / "bin/kvmi-host", REPORT.replace(json.dumps(NIGHT), json.dumps({"hosts": [run]})))
    night(MINUTES="0")
    summary = (tree / "report/summary.md").read_text()
    assert "| suite | passed | 0 min 0 s |" in summary
    assert "| lab1 | died | off &#124; &lt;img&gt; again |" in summary


def test_all_that_was_said_is_in_the_log(night: Night, tree: Path) -> None:
    script(tree / "ci/fuzz", "seq 10000; echo 'the last word' >&2")
    done = night()
    log = (tree / "report/nightly.log").read_text()
    assert log == done.stdout
    assert "\n10000\nthe last word\n" in log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_ends_it_ends_the_part_that_runs_once_and_has_a_report(tree: Path, number: int) -> None:
    ready = tree / "ready"
    os.mkfifo(ready)
    until_it_ends = f"trap 'echo ended >> {tree}/calls' TERM; sleep {DEADLINE} & echo > {ready}; wait"
    script(tree / "bin/kvmi-host", f"{until_it_ends}\n{REPORT}\nexit 1")
    env = environment(tree, MUTANTS="1")
    with subprocess.Popen([tree / "ci/nightly"], env=env, stdout=subprocess.PIPE, text=True) as process:
        ready.read_text()
        process.send_signal(number)
        process.send_signal(number)
        said, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert calls(tree)[1:] == ["ended"]
    assert failures(tree) == {"test_fuzz": "fuzz: was not run", "test_mutants": "mutants: was not run"}
    assert "| fuzz | was not run |" in said
