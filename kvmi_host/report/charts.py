# SPDX-License-Identifier: LGPL-2.1-or-later
"""The charts of the page: small SVG images, each with a title and a description in words.

Colours are the style sheet's, by class. What is red is of another shape, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from math import ceil, log10
from statistics import fmean, median
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup

from kvmi_host.report.history import PastNight
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

Point = tuple[float, float]

_WIDTH = 340  # of a host's charts, in pixels
_LEFT, _RIGHT = 44, 8  # what labels beside the plot take
_TREND = 400  # that few nights take together
_LABEL = 52  # pixels that a date takes
_MOST_POINTS = 160
_BINS = 48
_NIGHT = 12  # pixels that a night takes in a strip
_STRIP = 500  # ... and that many nights take together, if they can


def latency(values: Sequence[float], domain: tuple[float, float], unit: str) -> Markup:
    """How values spread, on a logarithmic axis, with the median and the 99th percentile marked.

    :param values: above 0 and in order, at least one.
    :param domain: of the axis, above 0: the same for all hosts, so that they can be compared.
    """
    height, base, top = 104, 84, 8
    middle, high = percentile(values, 50), percentile(values, 99)
    chart = _svg(
        _WIDTH,
        height,
        "Round trip of an event: how long it took",
        f"{len(values):,} events, from {number(values[0])} to {number(values[-1])} {unit}; "
        f"half took at most {number(middle)}, 99 % at most {number(high)} {unit}. The axis is logarithmic.",
    )
    x = logarithmic(domain, (_RIGHT, _WIDTH - _RIGHT))
    ratio = log10(domain[1] / domain[0])
    edges = [domain[0] * 10 ** (ratio * index / _BINS) for index in range(_BINS + 1)]
    counts = bins(values, edges)
    y = linear((0, max(counts)), (base, top))
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        if count:
            place = min(y(count), base - 1)  # one event is seen, too
            _add(chart, "rect", "bar", x=x(left), y=place, width=max(x(right) - x(left) - 1, 1), height=base - place)
    _axis(chart, [(x(tick), number(tick)) for tick in decade_ticks(domain)], base)
    for value, kind in ((middle, "mark"), (high, "mark dashed")):
        _add(chart, "line", kind, x1=x(value), x2=x(value), y1=top - 4, y2=base)
    return _text_of(chart)


def soak(rates: Sequence[Point], gaps: Sequence[Point] | None) -> Markup:
    """Events a second over the time of a soak, and below when events were missing.

    :param rates: seconds since it began, in order, and events a second; at least one.
    :param gaps: seconds, and events that were missing; None where nobody counted.
    """
    height, top, base, lane = 124, 8, 76, 98
    missing = [(when, gap) for when, gap in gaps or () if gap > 0]
    lost = (
        f"{number(sum(gap for _, gap in missing))} gaps, in {len(missing)} of {len(gaps)} samples"
        if gaps and missing
        else "no gaps"
    )
    heights, end = [rate for _, rate in rates], rates[-1][0]
    chart = _svg(
        _WIDTH,
        height,
        "Events a second while the host was soaked",
        f"Over {duration(end)}, between {number(min(heights))} and {number(max(heights))} events a second, "
        f"{number(fmean(heights))} on the average; {'gaps were not counted' if gaps is None else lost}.",
    )
    x = linear((min(rates[0][0], 0), end), (_LEFT, _WIDTH - _RIGHT))
    ceiling = nice_top(max(heights))
    y = linear((0, ceiling), (base, top))
    for tick in (ceiling / 2, ceiling):
        _add(chart, "line", "grid", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y(tick), y2=y(tick))
        _add(chart, "text", "end", _short(tick), x=_LEFT - 5, y=y(tick) + 4)
    _add(chart, "text", "end", "0", x=_LEFT - 5, y=base + 4)
    lefts = thinned([x(when) for when, _ in rates], _MOST_POINTS, fmean)
    ups = thinned([y(rate) for rate in heights], _MOST_POINTS, fmean)
    line = _points(zip(lefts, ups, strict=True))
    _add(chart, "polygon", "area", points=f"{_px(lefts[0])},{base} {line} {_px(lefts[-1])},{base}")
    _add(chart, "polyline", "line", points=line)
    if gaps is not None:
        _add(chart, "text", "end", "gaps", x=_LEFT - 5, y=lane - 1)
        for place in sorted({round(x(when)) for when, _ in missing}):
            _add(chart, "rect", "bad", x=place - 1, y=lane - 12, width=2, height=12)
    bottom = base if gaps is None else lane
    _add(chart, "line", "grid", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=bottom, y2=bottom)
    _axis(chart, ((x(0), "0"), (x(end) - 14, duration(end))), bottom)
    return _text_of(chart)


def pass_rate(nights: Sequence[PastNight]) -> Markup:
    """Per night, what part of the tests passed, and below how many failed."""
    step = min(max(_TREND / len(nights), _NIGHT), 44)
    width, height = _LEFT + len(nights) * step + 30, 176
    rates = [_rate(night) for night in nights]
    failures = [sum(host.failed for host in night.hosts.values()) for night in nights]
    known = [rate for rate in rates if rate is not None]
    chart = _svg(
        width,
        height,
        "Tests that passed, and tests that failed, by night",
        f"{len(nights)} nights from {_day(nights[0].started)} to {_day(nights[-1].started)}: "
        + (f"between {min(known):.1f} % and {max(known):.1f} % passed, " if known else "")
        + f"at most {max(failures)} failed in a night.",
    )
    bottom = next(floor for floor in (99, 98, 95, 90, 80, 50, 0) if floor <= min(known, default=99))
    y = linear((bottom, 100), (76, 10))
    for tick in (bottom, (bottom + 100) / 2, 100):
        _add(chart, "line", "grid", x1=_LEFT, x2=width - 30, y1=y(tick), y2=y(tick))
        _add(chart, "text", "end", f"{number(tick)} %", x=_LEFT - 5, y=y(tick) + 4)
    centres = [_LEFT + (index + 0.5) * step for index in range(len(nights))]
    line = [(x, y(rate)) for x, rate in zip(centres, rates, strict=True) if rate is not None]
    _add(chart, "polyline", "line", points=_points(line))
    for x, up in line:
        _add(chart, "circle", "dot", cx=x, cy=up, r=2.5)

    base, top = 150, 104
    tall = linear((0, nice_top(max(failures))), (0, base - top))
    _add(chart, "line", "grid", x1=_LEFT, x2=width - 30, y1=base, y2=base)
    _add(chart, "text", "end", "failed", x=_LEFT - 5, y=base)
    for x, count, night in zip(centres, failures, nights, strict=True):
        if count:
            bar = _add(chart, "rect", "bad", x=x - 5, y=base - tall(count), width=10, height=tall(count))
            SubElement(bar, "title").text = f"{_day(night.started)}: {count} failed"
            _add(chart, "text", "middle", str(count), x=x, y=base - tall(count) - 4)
    every = ceil(_LABEL / step)
    shown = range(len(nights) - 1, -1, -every)
    _axis(chart, [(centres[index], _day(nights[index].started)) for index in shown], base)
    return _text_of(chart)


def strip(name: str, nights: Sequence[PastNight]) -> Markup:
    """A host's nights in a row: low where all passed, high where something failed, crossed where it did not finish."""
    failed = sum(1 for night in nights if (host := night.hosts.get(name)) and host.failed)
    here = sum(1 for night in nights if name in night.hosts)
    step = min(_NIGHT, max(_STRIP / len(nights), 8))
    wide = step - 2
    chart = _svg(
        len(nights) * step, 22, f"{name}: its nights", f"{here} nights, of which {failed} had failures; newest last."
    )
    for index, night in enumerate(nights):
        left = index * step + 1
        group = SubElement(chart, "g")
        host = night.hosts.get(name)
        if host is None:
            said = "was not there"
            _add(group, "circle", "absent", cx=left + wide / 2, cy=18, r=1.5)
        elif host.state != "finished":
            said = (
                f"was {host.state}" if host.state in ("lost", "refused", "interrupted", "unreachable") else host.state
            )
            _add(group, "path", "cross", d=f"M{_px(left + 1)} 9l{_px(wide - 2)} 10m0 -10l-{_px(wide - 2)} 10")
        elif host.failed:
            said = f"{host.failed} failed"
            _add(group, "rect", "bad", x=left, y=3, width=wide, height=17)
        else:
            said = f"{host.passed:,} passed"
            _add(group, "rect", "good", x=left, y=13, width=wide, height=7)
        SubElement(group, "title").text = f"{_day(night.started)}: {said}"
    return _text_of(chart)


def sparkline(name: str, values: Sequence[float | None]) -> Markup:
    """A host's numbers by night, the newest marked; where there was none the line goes on."""
    step = min(_NIGHT, _STRIP / 2 / len(values))
    width, height = max(len(values), 2) * step, 26
    there = [(index, value) for index, value in enumerate(values) if value is not None]
    low, high = min(value for _, value in there), max(value for _, value in there)
    chart = _svg(
        width,
        height,
        f"{name}: median of an event's round trip, by night",
        f"Between {number(low)} and {number(high)} µs, {number(there[-1][1])} µs at last.",
    )
    # What is within a fifth of the others is noise, and looks like it.
    middle = median(value for _, value in there)
    y = linear((min(low, 0.8 * middle), max(high, 1.2 * middle)), (height - 4, 4))
    points = [((index + 0.5) * step, y(value)) for index, value in there]
    _add(chart, "polyline", "line", points=_points(points))
    _add(chart, "circle", "dot", cx=points[-1][0], cy=points[-1][1], r=2.5)
    return _text_of(chart)


def _rate(night: PastNight) -> float | None:
    """Percent of the tests that passed; None where none was run."""
    passed = sum(host.passed for host in night.hosts.values())
    run = passed + sum(host.failed for host in night.hosts.values())
    return 100 * passed / run if run else None


def _svg(width: float, height: float, title: str, description: str) -> Element:
    size = {"width": _px(width), "height": _px(height), "viewBox": f"0 0 {_px(width)} {_px(height)}"}
    chart = Element("svg", {**size, "class": "chart", "role": "img"})
    SubElement(chart, "title").text = title
    SubElement(chart, "desc").text = description
    return chart


def _add(parent: Element, tag: str, kind: str, text: str | None = None, **attributes: float | str) -> Element:
    places = {key: value if isinstance(value, str) else _px(value) for key, value in attributes.items()}
    element = SubElement(parent, tag, {"class": kind, **places})
    element.text = text
    return element


def _axis(chart: Element, ticks: Sequence[tuple[float, str]], base: float) -> None:
    for place, label in ticks:
        _add(chart, "line", "grid", x1=place, x2=place, y1=base, y2=base + 4)
        _add(chart, "text", "middle", label, x=place, y=base + 16)


def _points(places: Iterable[Point]) -> str:
    return " ".join(f"{_px(x)},{_px(y)}" for x, y in places)


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _day(time: datetime) -> str:
    return f"{time.day} {time:%b}"


def _short(value: float) -> str:
    return f"{number(value / 1000)}k" if value >= 1000 else number(value)


def _text_of(chart: Element) -> Markup:
    """ElementTree has escaped what came from hosts."""
    return Markup(tostring(chart, encoding="unicode"))
