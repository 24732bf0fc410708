# SPDX-License-Identifier: LGPL-2.1-or-later
"""In which turn a vCPU does what it is asked for at once, and that it does all of it."""

from __future__ import annotations

import pytest

from kvmi_host.protocol import Event, EventId, messages
from kvmi_host.protocol.events import Reply
from kvmi_host.testing.modewalk import HYPERCALL, HYPERCALL_EVENT
from kvmi_host.testing.puppet import Puppet

pytestmark = pytest.mark.hardware

GP = 13


def asks(puppet: Puppet, vcpu: int) -> Event:
    """Have a vCPU make its hypercall, and nothing that would be an event after it."""
    puppet.session.control_events(vcpu, EventId.HYPERCALL, True)
    puppet.start(vcpu, puppet.hypercall(vcpu), rax=HYPERCALL, rdi=HYPERCALL_EVENT)
    return puppet.event()


@pytest.mark.rule("4.52")
def test_a_command_behind_the_reply_is_served_by_a_vcpu_that_has_gone_on(puppet: Puppet) -> None:
    # What comes is read by the vCPU that waits first, whoever it is for: so the other one is handed both at once.
    reader, other = (asks(puppet, vcpu) for vcpu in (0, 1))
    session = puppet.session
    _, frequency = session.ask_all([Reply(other), messages.vcpu_info(1)])
    assert frequency == session.vcpu_info(0)
    session.reply(reader)
    for vcpu in (0, 1):
        puppet.finish(vcpu)


@pytest.mark.rule("3.52")
def test_a_pause_comes_after_the_event_of_an_exception_that_is_injected(puppet: Puppet) -> None:
    session = puppet.session
    session.control_events(0, EventId.TRAP, True)
    event = asks(puppet, 0)
    session.pause_vcpu(0)
    session.inject_exception(0, GP, 0)
    session.reply(event)
    for expected in (EventId.TRAP, EventId.PAUSE_VCPU):
        event = puppet.event()
        assert event.event == expected
        session.reply(event)
    assert puppet.finish(0).exceptions == 1
