# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which dialect a host's kernel speaks, and what v7 does otherwise."""

from __future__ import annotations

import struct
from fcntl import ioctl

import pytest

from kvmi_host.host import kvm
from kvmi_host.introspect import Session
from kvmi_host.protocol import Command, EventId, EventV7, TrapV7
from kvmi_host.testing.live import Wire
from kvmi_host.testing.puppet import Puppet
from kvmi_host.testing.rules import Host

pytestmark = pytest.mark.hardware

CAPABILITIES = {"v6": 999, "v7": 180}
UD = 6


@pytest.mark.rule("5.1")
def test_the_capability_of_the_dialect_answers_version_1(host: Host) -> None:
    with kvm.KVM_DEVICE.open("rb") as device:
        assert ioctl(device, kvm.KVM_CHECK_EXTENSION, CAPABILITIES[host.dialect]) == 1


@pytest.mark.rule("7.1")
def test_the_version_is_of_the_dialect_that_the_capability_tells(session: Session, host: Host) -> None:
    assert session.get_version().dialect == host.dialect


@pytest.mark.rule("7.2")
def test_the_version_goes_on_with_features(wire: Wire) -> None:
    wire.send(Command.GET_VERSION, b"", 1)
    answer = wire.receive().payload
    error, version, padding, features, end = struct.unpack("<q2I4sI", answer)
    assert (error, version, padding, end) == (0, 1, 0, 0)
    assert set(features) <= {0, 1}


@pytest.mark.rule("7.3")
def test_an_event_tells_the_view_of_its_vcpu(puppet: Puppet) -> None:
    puppet.session.pause_vcpu(0)
    event = puppet.event()
    assert isinstance(event, EventV7)
    assert event.view == 0
    puppet.session.reply(event)


@pytest.mark.rule("7.4")
def test_a_trap_tells_vector_error_code_and_cr2(puppet: Puppet) -> None:
    puppet.start(0, "spin")
    puppet.advances(0)
    puppet.session.control_events(0, EventId.TRAP, True)
    puppet.session.inject_exception(0, UD)
    event = puppet.event()
    assert isinstance(event.data, TrapV7)
    assert event.data[:2] == (UD, 0)
    puppet.session.reply(event)
    assert puppet.finish(0).vector == UD


@pytest.mark.rule("7.5")
def test_a_step_says_that_it_was_made(puppet: Puppet) -> None:
    puppet.start(0, "spin")
    puppet.advances(0)
    puppet.session.control_events(0, EventId.SINGLESTEP, True)
    event = puppet.event()
    assert event.event == EventId.SINGLESTEP
    assert event.data.failed == 0
    puppet.session.control_events(0, EventId.SINGLESTEP, False)
    puppet.session.reply(event)
    puppet.stop(0)
    puppet.finish(0)
