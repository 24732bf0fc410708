# SPDX-License-Identifier: LGPL-2.1-or-later
"""What came in each second, and how much of each kind a second."""

from kvmi_host.cli.rates import HISTORY, Rates

SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND


def entered(*events):
    rates = Rates()
    for kind, seconds in events:
        rates.enter(kind, START + round(seconds * SECOND))
    return rates


def test_each_second_has_its_own_count_the_current_one_last():
    rates = entered(("cr", 0), ("cr", 0.9), ("msr", 2))
    assert rates.per_second(START + 2 * SECOND)[-4:] == [0, 2, 0, 1]
    assert len(rates.per_second(START)) == HISTORY


def test_seconds_without_events_pass():
    rates = entered(("cr", 0))
    assert rates.per_second(START + 3 * SECOND)[-4:] == [1, 0, 0, 0]
    assert not any(rates.per_second(START + 100 * SECOND))


def test_no_more_is_remembered_than_is_shown():
    rates = entered(*(("cr", second) for second in range(1000)))
    assert len(rates._seconds) == HISTORY
    assert rates.counts["cr"] == 1000


def test_the_peak_is_the_most_of_one_second():
    assert entered(("cr", 0), ("cr", 1), ("msr", 1.5), ("cr", 2)).peak == 2


def test_a_rate_is_the_mean_of_the_last_seconds():
    rates = entered(*(("cr", tenth / 10) for tenth in range(100)), ("msr", 9.99))
    assert round(rates.rate("cr", START + 10 * SECOND)) == 10
    assert rates.rate("msr", START + 10 * SECOND) == 0.25


def test_a_rate_of_the_first_moments_is_no_more_than_what_came():
    assert entered(("cr", 0), ("cr", 0.001)).rate("cr", START + SECOND // 500) == 2


def test_nothing_came():
    assert Rates().rate("cr", START) == 0
    assert not any(Rates().per_second(START))


def test_a_clock_that_is_set_back_loses_no_event():
    rates = entered(("cr", 10), ("cr", 3))
    assert rates.counts["cr"] == 2
    assert sum(rates.per_second(START + 10 * SECOND)) == 2
