# SPDX-License-Identifier: LGPL-2.1-or-later
"""What counts as a change, by host and test."""

from datetime import UTC, datetime

import pytest

from kvmi_host.report.changes import changes
from kvmi_host.report.history import LastKnown
from kvmi_host.report.suite import Outcome, Test

BEFORE, LONG_BEFORE = datetime(2026, 11, 2, tzinfo=UTC), datetime(2026, 10, 2, tzinfo=UTC)
P, F, NA = Outcome.PASSED, Outcome.FAILED, Outcome.NOT_APPLICABLE
KINDS = ("new_failures", "fixed", "newly_not_applicable", "still_failing")


def compare(was, outcome, night=BEFORE):
    """What a test is found among that came to `was` then, and to `outcome` now."""
    known = {("amd", "t"): LastKnown(was, night)} if was else {}
    found = changes({"amd": [Test("t", "", outcome)]}, ["amd"], known, BEFORE)
    return [kind for kind in KINDS if getattr(found, kind)]


@pytest.mark.parametrize(
    ("was", "outcome", "kinds"),
    [
        (P, F, ["new_failures"]),
        (NA, F, ["new_failures"]),
        (None, F, ["new_failures"]),
        (F, F, ["still_failing"]),
        (F, P, ["fixed"]),
        (P, NA, ["newly_not_applicable"]),
        (F, NA, ["newly_not_applicable"]),
        (P, P, []),
        (NA, P, []),
        (NA, NA, []),
        (None, P, []),
        (None, NA, []),
    ],
)
def test_what_a_test_came_to_makes_the_change(was, outcome, kinds):
    assert compare(was, outcome) == kinds


def test_a_test_is_compared_with_when_it_was_last_run():
    known = {("amd", "t"): LastKnown(P, LONG_BEFORE)}
    (change,) = changes({"amd": [Test("t", "", F)]}, ["amd"], known, BEFORE).new_failures
    assert change.before.night == LONG_BEFORE


def test_the_same_test_on_another_host_is_another():
    known = {("amd", "t"): LastKnown(F, BEFORE)}
    found = changes({"intel": [Test("t", "", F)]}, ["amd"], known, BEFORE)
    assert [change.host for change in found.new_failures] == ["intel"]


def test_a_test_that_was_not_run_is_no_change():
    found = changes({"amd": []}, ["amd"], {("amd", "t"): LastKnown(F, BEFORE)}, BEFORE)
    assert not any(getattr(found, kind) for kind in KINDS)


def test_hosts_come_and_go():
    found = changes({"amd": [], "new": []}, ["amd", "old"], {}, BEFORE)
    assert (found.came, found.went) == (("new",), ("old",))
