# SPDX-License-Identifier: LGPL-2.1-or-later
"""What introspection costs, counted in instructions: the figures repeat, so they can be held to."""

from __future__ import annotations

import pytest

from kvmi_host.host.kernels import Series
from kvmi_host.lab import images
from kvmi_host.lab.counting import Report, count

EXITS = ("pio", "cpuid", "msr", "hypercall")
"""What leaves the guest with stock modules, too."""

EVENTS = {"msr": 34_500, "cr3": 34_800, "hypercall": 34_300, "breakpoint": 37_500, "page": 41_500}
"""Instructions that an event may cost: about 3 % above what it was when that was last looked at."""


@pytest.fixture(scope="module", params=list(Series))
def report(request: pytest.FixtureRequest) -> Report:
    """Exits and events of a kernel series."""
    image = images.host_image()
    with images.kvm_modules(request.param, None) as built:
        modules = built()
    assert modules
    return count(image.kernel(request.param), modules)


def test_a_vm_that_is_not_hooked_pays_less_than_a_hundredth(report: Report) -> None:
    ratios = {kind: report.ours[kind] / report.stock[kind] for kind in EXITS}
    assert max(ratios.values()) <= 1.01, ratios


def test_an_event_costs_no_more_than_it_did(report: Report) -> None:
    assert set(report.events) == set(EVENTS)
    dearer = {kind: cost for kind, cost in report.events.items() if cost > EVENTS[kind]}
    assert not dearer
