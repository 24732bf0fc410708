# SPDX-License-Identifier: LGPL-2.1-or-later
"""From numbers to places on a chart, and to words: scales, ticks, percentiles, bins."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from datetime import timedelta
from math import ceil, floor, log10

Scale = Callable[[float], float]


def linear(domain: tuple[float, float], span: tuple[float, float]) -> Scale:
    """Maps `domain` to `span`; a domain of one number goes to the middle."""
    (low, high), (start, end) = domain, span
    if high <= low:
        return lambda value: (start + end) / 2
    return lambda value: start + (min(max(value, low), high) - low) / (high - low) * (end - start)


def logarithmic(domain: tuple[float, float], span: tuple[float, float]) -> Scale:
    """The same by orders of magnitude; `domain` is above 0."""
    inner = linear((log10(domain[0]), log10(domain[1])), span)
    return lambda value: inner(log10(max(value, domain[0])))


def nice_top(value: float) -> float:
    """The least of 1, 2, 2.5, 5 and 10 times a power of ten that is not below `value`; 1 for what is not above 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** floor(log10(value))
    return next((step * power for step in (1, 2, 2.5, 5) if value <= step * power), 10 * power)


def decade_ticks(domain: tuple[float, float]) -> list[float]:
    """1, 2 and 5 times each power of ten within a domain above 0; only the powers where there are many."""
    low, high = domain
    powers = [10.0**exponent for exponent in range(floor(log10(low)), ceil(log10(high)) + 1)]
    steps = (1, 2, 5) if high / low <= 200 else (1,)
    return [step * power for power in powers for step in steps if low <= step * power <= high]


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value that `percent` of the values do not exceed, by nearest rank. Values are in order, at least one."""
    return ordered[max(0, ceil(len(ordered) * percent / 100) - 1)]


def bins(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    """How many values are between neighbouring edges; what is outside counts with the nearest."""
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[min(max(bisect_right(edges, value) - 1, 0), len(counts) - 1)] += 1
    return counts


def thinned(values: Sequence[float], most: int, together: Callable[[Sequence[float]], float]) -> list[float]:
    """At most `most` values: neighbours are put `together`."""
    size = max(1, ceil(len(values) / most))
    return [together(values[start : start + size]) for start in range(0, len(values), size)]


def number(value: float) -> str:
    """Three digits that count, or all of those before the point: 0.123, 41.2, 1,234."""
    if value == 0:
        return "0"
    decimals = min(max(0, 2 - floor(log10(abs(value)))), 6)
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def duration(seconds: float) -> str:
    """1.2 s, 13 min 32 s, 2 h 12 min."""
    if seconds < 59.95:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    whole = timedelta(seconds=min(round(seconds), 10**9))
    hours, rest = divmod(int(whole.total_seconds()), 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours:,} h {minutes} min" if minutes else f"{hours:,} h"
    return f"{minutes} min {left} s" if left else f"{minutes} min"
