# SPDX-License-Identifier: LGPL-2.1-or-later
"""The vCPU mode that events and GET_REGISTERS tell: each row of the table, and virtual-8086 mode."""

from __future__ import annotations

import pytest

from kvmi_host.protocol import EventId
from kvmi_host.protocol.x86 import SpecialRegisters
from kvmi_host.testing.live import Walker
from kvmi_host.testing.modewalk import Actions, Station

pytestmark = pytest.mark.hardware

CR0_PE = 1
EFER_LMA = 1 << 10
RFLAGS_VM = 1 << 17

ROWS = {
    # station: EFER.LMA, CR0.PE, CS.L, CS.D/B
    Station.LONG64: (1, 1, 1, 0),
    Station.COMPAT16: (1, 1, 0, 0),
    Station.COMPAT32: (1, 1, 0, 1),
    Station.PROT16: (0, 1, 0, 0),
    Station.PROT32: (0, 1, 0, 1),
    Station.REAL16: (0, 0, 0, 0),
    Station.BIGREAL: (0, 0, 0, 1),
    Station.VM86: (0, 1, 0, 0),
}
RULES = {
    Station.LONG64: "4.59",
    Station.COMPAT16: "4.60",
    Station.COMPAT32: "4.61",
    Station.PROT16: "4.62",
    Station.PROT32: "4.63",
    Station.REAL16: "4.64",
    Station.BIGREAL: "4.65",
    Station.VM86: "4.66",
}
stations = pytest.mark.parametrize(
    "station", [pytest.param(s, id=s.label, marks=pytest.mark.rule(RULES[s], "4.67")) for s in Station]
)


def row(sregs: SpecialRegisters) -> tuple[int, int, int, int]:
    return int(bool(sregs.efer & EFER_LMA)), sregs.cr0 & CR0_PE, sregs.cs.l, sregs.cs.db


@stations
def test_a_hypercall_event_tells_the_mode(walker: Walker, station: Station) -> None:
    walker.hold(0, station, Actions.HYPERCALL)
    walker.enable(EventId.HYPERCALL, 0)
    event = walker.event()
    assert (event.event, event.vcpu) == (EventId.HYPERCALL, 0)
    assert row(event.sregs) == ROWS[station]
    assert event.mode == station.mode
    assert bool(event.registers.rflags & RFLAGS_VM) == (station is Station.VM86)
    walker.session.reply(event)


@stations
@pytest.mark.parametrize("cr", [0, 3, 4])
def test_a_cr_event_tells_the_mode(walker: Walker, station: Station, cr: int) -> None:
    action = {0: Actions.CR0, 3: Actions.CR3, 4: Actions.CR4}[cr]
    walker.hold(1, station, action)
    walker.enable(EventId.CR, 1, cr=cr)
    # Each of two writes undoes the other. At vm86 the way in and out writes CR0 as well: only the walk's are looked at.
    for event in walker.answered(4):
        assert (event.event, event.vcpu, event.data.cr) == (EventId.CR, 1, cr)
        assert event.data.old == {0: event.sregs.cr0, 3: event.cr3, 4: event.sregs.cr4}[cr]
        assert event.data.old != event.data.new
        assert event.mode == station.cr_mode


@stations
def test_a_paused_vcpu_tells_the_mode(walker: Walker, station: Station) -> None:
    walker.hold(2, station, Actions(0))
    walker.session.pause_vcpu(2)
    event = walker.event()
    assert (event.event, event.vcpu) == (EventId.PAUSE_VCPU, 2)
    assert row(event.sregs) == ROWS[station]
    assert event.mode == station.mode
    walker.session.reply(event)


@stations
def test_get_registers_tells_the_mode(walker: Walker, station: Station) -> None:
    walker.hold(3, station, Actions(0))
    state = walker.session.get_registers(3)
    assert row(state.sregs) == ROWS[station]
    assert state.mode == station.mode
