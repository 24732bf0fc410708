# SPDX-License-Identifier: LGPL-2.1-or-later
"""What introspection costs, counted in instructions: the figures repeat, so they can be held to."""

from __future__ import annotations

import pytest

from kvmi_host.host.kernels import Series
from kvmi_host.lab import images
from kvmi_host.lab.counting import Report, count

EXITS = ("pio", "cpuid", "msr", "hypercall")
"""What leaves the guest with stock modules, too."""

DEARER = 1.01
"""How much dearer an exit of a VM that is not hooked may be."""

EVENTS = {"msr": 34_500, "cr3": 34_500, "hypercall": 34_500, "breakpoint": 36_500, "page": 39_500}
"""
Instructions that an event may cost. Which of the two threads the host's scheduler runs first is the same in each run,
but not after each change, which makes a difference of up to a tenth: that is how far these are above what was counted.
"""


@pytest.fixture(scope="module", params=Series.packaged())
def series(request: pytest.FixtureRequest) -> Series:
    """Each of Debian's kernel series."""
    return Series(request.param)


@pytest.fixture(scope="module")
def report(series: Series) -> Report:
    """Its exits and events."""
    image = images.host_image()
    with images.kvm_modules(series, None) as built:
        modules = built()
    assert modules
    return count(image.kernel(series), modules)


def test_a_vm_that_is_not_hooked_pays_a_hundredth_at_most(report: Report) -> None:
    ratios = {kind: report.ours[kind] / report.stock[kind] for kind in EXITS}
    assert max(ratios.values()) <= DEARER, ratios


def test_an_event_costs_no_more_than_it_did(report: Report) -> None:
    assert set(report.events) == set(EVENTS)
    dearer = {kind: cost for kind, cost in report.events.items() if cost > EVENTS[kind]}
    assert not dearer
