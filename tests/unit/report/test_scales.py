# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules of charts: where a number goes, and how it is written."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmi_host.report.scales import (
    bins,
    decade_ticks,
    duration,
    linear,
    logarithmic,
    nice_top,
    number,
    percentile,
    thinned,
)

POSITIVE = st.floats(1e-9, 1e15)
VALUES = st.lists(POSITIVE, min_size=1)


@given(POSITIVE, st.floats(-1e15, 1e15))
def test_no_value_leaves_its_span(top, value):
    for scale in (linear((0, top), (100, 20)), logarithmic((top / 1e3, top), (100, 20))):
        assert 20 - 1e-9 <= scale(value) <= 100 + 1e-9


def test_ends_of_the_domain_are_ends_of_the_span():
    assert [linear((10, 20), (0, 5))(value) for value in (10, 15, 20)] == [0, 2.5, 5]
    assert [logarithmic((1, 100), (0, 5))(value) for value in (1, 10, 100)] == [0, 2.5, 5]


def test_a_domain_of_one_number_is_in_the_middle():
    assert linear((3, 3), (0, 10))(3) == 5


@pytest.mark.parametrize(
    ("value", "top"), [(0, 1), (0.3, 0.5), (1, 1), (1.1, 2), (2.2, 2.5), (26_000, 50_000), (70, 100)]
)
def test_the_top_of_an_axis_is_a_round_number(value, top):
    assert nice_top(value) == pytest.approx(top)


def test_ticks_of_a_logarithmic_axis_are_1_2_and_5_and_few():
    assert decade_ticks((8, 600)) == [10, 20, 50, 100, 200, 500]
    assert decade_ticks((1, 1e6)) == [10**exponent for exponent in range(7)]


@settings(deadline=None)
@given(VALUES, st.floats(0, 100))
def test_a_percentile_is_a_value_that_so_many_do_not_exceed(values, percent):
    ordered = sorted(values)
    found = percentile(ordered, percent)
    assert found in ordered
    assert sum(value <= found for value in ordered) >= percent / 100 * len(ordered) - 1e-9


@settings(deadline=None)
@given(VALUES)
def test_every_value_is_in_a_bin(values):
    assert sum(bins(values, [1, 10, 100])) == len(values)


@settings(deadline=None)
@given(VALUES, st.integers(1, 50))
def test_what_is_thinned_is_short_and_keeps_its_ends(values, most):
    found = thinned(values, most, max)
    assert len(found) <= most
    assert max(found) == max(values)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.1234, "0.123"), (41.234, "41.2"), (41.0, "41"), (1234.5, "1,234"), (150, "150"), (1e-9, "0")],
)
def test_numbers_have_the_digits_that_count(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (1.25, "1.2 s"), (59.99, "1 min"), (812, "13 min 32 s"), (3600, "1 h"), (7920, "2 h 12 min")],
)
def test_times_are_told_in_the_units_that_people_use(seconds, text):
    assert duration(seconds) == text
