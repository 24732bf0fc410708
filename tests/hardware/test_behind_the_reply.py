# SPDX-License-Identifier: LGPL-2.1-or-later
"""A command that comes behind the reply, before its vCPU has read either, is served all the same."""

from __future__ import annotations

import pytest

from kvmi_host.protocol import Event, EventId, messages
from kvmi_host.protocol.events import Reply
from kvmi_host.testing.modewalk import HYPERCALL, HYPERCALL_EVENT
from kvmi_host.testing.puppet import Puppet

pytestmark = pytest.mark.hardware


def asks(puppet: Puppet, vcpu: int) -> Event:
    """Have a vCPU make its hypercall, and nothing that would be an event after it."""
    puppet.session.control_events(vcpu, EventId.HYPERCALL, True)
    puppet.start(vcpu, puppet.hypercall(vcpu), rax=HYPERCALL, rdi=HYPERCALL_EVENT)
    return puppet.event()


def test_a_command_behind_the_reply_is_served_by_a_vcpu_that_has_gone_on(puppet: Puppet) -> None:
    # What comes is read by the vCPU that waits first, whoever it is for: so the other one is handed both at once.
    reader, other = (asks(puppet, vcpu) for vcpu in (0, 1))
    session = puppet.session
    _, frequency = session.ask_all([Reply(other), messages.vcpu_info(1)])
    assert frequency == session.vcpu_info(0)
    session.reply(reader)
    for vcpu in (0, 1):
        puppet.finish(vcpu)
