# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules of the history: a night is kept once, by when it was, and a file that is none of ours is left alone."""

import sqlite3
import threading
from datetime import UTC, datetime, timedelta

import pytest

from kvmi_host.report import history
from kvmi_host.report.errors import HistoryError
from kvmi_host.report.history import LastKnown, PastHost, PastNight, opened
from kvmi_host.report.suite import Outcome

PASSED, FAILED, NOT_APPLICABLE = Outcome.PASSED, Outcome.FAILED, Outcome.NOT_APPLICABLE


def when(night):
    return datetime(2026, 11, 1, 1, tzinfo=UTC) + timedelta(days=night)


def past(night, **counts):
    return PastNight(when(night), True, {"amd": PastHost("finished", 2, 0, 1, **counts)}, "0.1.0", "abc")


def record(file, night, *outcomes):
    """Write a night in which host "amd" had these outcomes of a test, "t"."""
    with opened(file) as db:
        db.record(past(night), [("amd", f"t{index}", outcome) for index, outcome in enumerate(outcomes)])


@pytest.fixture
def file(tmp_path):
    return tmp_path / "history.sqlite"


def test_nights_come_back_as_they_were_in_the_order_of_time(file):
    nights = [past(night, latency=night + 0.5) for night in (1, 2, 3)]
    for night in (nights[1], nights[2], nights[0]):
        with opened(file) as db:
            db.record(night, [])
    with opened(file) as db:
        assert db.nights(when(3), 10) == nights


def test_a_night_that_is_written_twice_replaces_itself(file):
    record(file, 1, PASSED, PASSED)
    record(file, 1, FAILED)
    with opened(file) as db:
        assert len(db.nights(when(9), 10)) == 1
        assert db.last_known(when(9)) == {("amd", "t0"): LastKnown(FAILED, when(1))}


def test_a_night_is_the_same_whatever_the_zone_that_it_is_told_in(file):
    zoned = PastNight(when(1).astimezone(), True, {})
    with opened(file) as db:
        db.record(past(1), [])
        db.record(zoned, [])
        assert len(db.nights(when(9), 10)) == 1


def test_only_nights_up_to_that_one_count(file):
    for night in (1, 2, 3):
        record(file, night, PASSED)
    with opened(file) as db:
        assert [night.started for night in db.nights(when(2), 10)] == [when(1), when(2)]
        assert db.last_known(when(2))["amd", "t0"].night == when(1)
        assert db.last_known(when(1)) == {}


def test_the_last_known_outcome_is_that_of_the_last_night_in_which_the_test_was_run(file):
    record(file, 1, PASSED, FAILED)
    record(file, 2, FAILED)
    with opened(file) as db:
        assert db.last_known(when(3)) == {
            ("amd", "t0"): LastKnown(FAILED, when(2)),
            ("amd", "t1"): LastKnown(FAILED, when(1)),
        }


@pytest.mark.parametrize(
    ("outcomes", "since"),
    [
        ([PASSED, FAILED, FAILED], (2, 2)),
        ([FAILED, PASSED, FAILED], (3, 1)),
        ([FAILED, NOT_APPLICABLE, FAILED], (3, 1)),
        ([FAILED, FAILED, FAILED], (1, 3)),
        ([FAILED, FAILED, PASSED], None),
    ],
)
def test_failing_since_is_the_first_of_the_failures_on_end(file, outcomes, since):
    for night, outcome in enumerate(outcomes, 1):
        record(file, night, outcome)
    with opened(file) as db:
        assert db.failing_since("amd", "t0", when(4)) == (since and (when(since[0]), since[1]))


def test_outcomes_of_tests_are_kept_for_so_many_nights_and_counts_for_good(file, monkeypatch):
    monkeypatch.setattr(history, "KEPT", 2)
    for night in (1, 2, 3):
        record(file, night, FAILED)
    with opened(file) as db:
        assert db.failing_since("amd", "t0", when(4)) == (when(2), 2)
        assert len(db.nights(when(4), 10)) == 3
    with sqlite3.connect(file) as database:
        assert database.execute("SELECT count(*) FROM outcome").fetchone() == (2,)


def test_what_fails_half_way_has_written_nothing(file):
    record(file, 1, PASSED)
    with pytest.raises(AttributeError):
        record(file, 2, PASSED, "no outcome")
    with opened(file) as db:
        assert [night.started for night in db.nights(when(9), 10)] == [when(1)]


def test_who_comes_meanwhile_waits_and_finds_what_was_written(file):
    found = []

    def look():
        with opened(file) as db:
            found.extend(db.nights(when(9), 10))

    with opened(file) as db:
        other = threading.Thread(target=look)
        other.start()
        db.record(past(1), [])
    other.join(60)
    assert [night.started for night in found] == [when(1)]


def test_who_waits_too_long_is_told(file, monkeypatch):
    monkeypatch.setattr(history, "_WAIT", 0.0)
    with opened(file), pytest.raises(HistoryError, match="database is locked"), opened(file):
        pass


def test_nights_that_are_written_at_once_are_all_there(file):
    threads = [threading.Thread(target=record, args=(file, night, PASSED)) for night in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    with opened(file) as db:
        assert len(db.nights(when(9), 10)) == 8


def test_a_newer_format_is_left_alone(file):
    record(file, 1, PASSED)
    with sqlite3.connect(file) as database:
        database.execute("PRAGMA user_version = 2")
    with pytest.raises(HistoryError, match="its format is 2, and this kvmi-host knows 1"), opened(file):
        pass


def test_anothers_database_is_left_alone(file):
    with sqlite3.connect(file) as database:
        database.execute("CREATE TABLE guests (name TEXT)")
    with pytest.raises(HistoryError, match="no history of kvmi-host's"), opened(file):
        pass


def test_a_file_that_is_no_database_is_left_alone(file):
    file.write_text("Dear diary, " * 100)
    with pytest.raises(HistoryError, match="file is not a database"), opened(file):
        pass
    assert file.read_text().startswith("Dear diary")


def test_a_file_that_cannot_be_made_is_said_to(tmp_path):
    with pytest.raises(HistoryError, match="nowhere"), opened(tmp_path / "nowhere" / "history.sqlite"):
        pass
