# SPDX-License-Identifier: LGPL-2.1-or-later
"""Four vCPUs in four modes at once: each tells its own, in an event of an instruction, in one of a pause, and in what
GET_REGISTERS answers. Each of them comes to every mode there is."""

from __future__ import annotations

import pytest

from kvmi_host.protocol import EventId
from kvmi_host.testing.live import Walker
from kvmi_host.testing.modewalk import Actions, Station

pytestmark = pytest.mark.hardware

STATIONS = list(Station)
RULES = ("4.59", "4.60", "4.61", "4.62", "4.63", "4.64", "4.65", "4.66", "4.67")


@pytest.mark.rule(*RULES)
@pytest.mark.parametrize("first", range(len(STATIONS)), ids=lambda first: f"from {STATIONS[first].label} on")
def test_each_vcpu_tells_its_own_mode(walker: Walker, first: int) -> None:
    at = {vcpu: STATIONS[(first + vcpu) % len(STATIONS)] for vcpu in walker.vcpus}
    for vcpu, station in at.items():
        walker.hold(vcpu, station, Actions.HYPERCALL)
    modes = {vcpu: station.mode for vcpu, station in at.items()}

    assert {vcpu: walker.session.get_registers(vcpu).mode for vcpu in walker.vcpus} == modes

    for vcpu in walker.vcpus:
        walker.session.pause_vcpu(vcpu)
    paused = {event.vcpu: event for event in (walker.event() for _ in walker.vcpus)}
    assert {event.event for event in paused.values()} == {EventId.PAUSE_VCPU}
    assert {vcpu: event.mode for vcpu, event in paused.items()} == modes

    walker.enable(EventId.HYPERCALL)
    for event in paused.values():
        walker.session.reply(event)
    called = {event.vcpu: event for event in (walker.event() for _ in walker.vcpus)}
    assert {event.event for event in called.values()} == {EventId.HYPERCALL}
    assert {vcpu: event.mode for vcpu, event in called.items()} == modes
    assert {vcpu: walker.session.get_registers(vcpu).mode for vcpu in walker.vcpus} == modes
