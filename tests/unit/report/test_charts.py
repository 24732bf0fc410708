# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules of the charts: each says in words what it shows, and what is bad is of another shape."""

import re
from datetime import UTC, datetime, timedelta
from xml.etree import ElementTree

import pytest

from kvmi_host.report import charts
from kvmi_host.report.history import PastHost, PastNight

GOOD, BAD = PastHost("finished", 100, 0, 3, 40.0), PastHost("finished", 98, 2, 3, 41.0)
DIED = PastHost("died", 0, 1, 0)


def nights(*hosts):
    """Nights in which "amd" came to that; None: it was not there."""
    start = datetime(2026, 11, 1, tzinfo=UTC)
    return [
        PastNight(start + timedelta(days=day), True, {"amd": host} if host else {}) for day, host in enumerate(hosts)
    ]


def words(chart):
    svg = ElementTree.fromstring(chart)
    return f"{svg.findtext('title')}. {svg.findtext('desc')}"


def kinds(chart):
    """The classes of its shapes, without axes and texts."""
    found = [element.get("class") for element in ElementTree.fromstring(chart).iter() if element.get("class")]
    return [kind for kind in found if kind not in {"chart", "grid", "middle", "end"}]


def test_latencies_are_told_in_words():
    assert words(charts.latency([10.0] * 98 + [20.0, 400.0], (5, 500), "µs")) == (
        "Round trip of an event: how long it took. 100 events, from 10 to 400 µs; half took at most 10, "
        "99 % at most 20 µs. The axis is logarithmic."
    )


def test_a_single_event_is_seen_beside_many():
    chart = ElementTree.fromstring(charts.latency([10.0] * 100_000 + [400.0], (5, 500), "µs"))
    bars = [float(bar.get("height")) for bar in chart.iter("rect")]
    assert len(bars) == 2
    assert min(bars) >= 1


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        (None, "gaps were not counted."),
        ([(0, 0), (10, 0)], "no gaps."),
        ([(0, 0), (10, 3)], "3 gaps, in 1 of 2 samples."),
    ],
)
def test_a_soak_says_its_rates_and_gaps_in_words(gaps, said):
    assert words(charts.soak([(0, 100), (10, 300)], gaps)) == (
        "Events a second while the host was soaked. Over 10 s, between 100 and 300 events a second, 200 on the "
        f"average; {said}"
    )


def test_a_gap_has_a_mark_at_its_time():
    assert "bad" not in kinds(charts.soak([(0, 100), (10, 300)], [(0, 0), (10, 0)]))
    assert kinds(charts.soak([(0, 100), (10, 300)], [(0, 0), (10, 3)])).count("bad") == 1


def test_a_long_soak_has_a_bounded_number_of_points():
    chart = charts.soak([(second, 100.0) for second in range(100_000)], None)
    assert len(re.search(r'<polyline[^>]*points="([^"]+)"', chart)[1].split()) <= 160


def test_a_hosts_nights_differ_by_shape():
    chart = charts.strip("amd", nights(GOOD, BAD, DIED, None))
    assert kinds(chart) == ["good", "bad", "cross", "absent"]
    said = [title.text for title in ElementTree.fromstring(chart).iter("title")]
    assert said == ["amd: its nights", "1 Nov: 100 passed", "2 Nov: 2 failed", "3 Nov: died", "4 Nov: was not there"]


def test_failures_are_counted_by_night():
    chart = charts.pass_rate(nights(GOOD, BAD))
    assert words(chart).endswith(
        "2 nights from 1 Nov to 2 Nov: between 98.0 % and 100.0 % passed, at most 2 failed in a night."
    )
    assert kinds(chart).count("bad") == 1


@pytest.mark.parametrize("hosts", [(None, None), (DIED, DIED), (GOOD, None)], ids=["none", "died", "once"])
def test_nights_without_tests_have_no_rate_and_a_chart(hosts):
    assert "nan" not in charts.pass_rate(nights(*hosts))


def test_noise_looks_like_noise():
    """What differs by a hundredth stays within a tenth of the height."""
    chart = ElementTree.fromstring(charts.sparkline("amd", [100.0, 101.0, None, 99.0]))
    places = [float(place.split(",")[1]) for place in chart.find("polyline").get("points").split()]
    assert max(places) - min(places) < float(chart.get("height")) / 10
