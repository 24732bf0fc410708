# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest that is attached to: its kernel is simulated, behind what ``attach`` returns."""

import socket
from uuid import UUID

import pytest

from kvmi_host import attach as attaching
from kvmi_host.attach import Attached, Target
from kvmi_host.attach.session import facts_of
from kvmi_host.introspect import Session
from kvmi_host.testing.peer import SimulatedKernel

TARGET = Target(1234, "webserver", UUID(int=7), 1_700_000_000)


@pytest.fixture
def kernel(monkeypatch):
    """The kernel that ``kvmi-host attach`` gets to talk to."""
    ours, kernels = socket.socketpair()
    with kernels, SimulatedKernel(kernels, vcpus=2) as simulated:

        def attach(vm, *, tap=None, **settings):
            session = Session(ours, timeout=5, tap=tap)
            return Attached(session, facts_of(session, TARGET))

        monkeypatch.setattr(attaching, "attach", attach)
        yield simulated
    ours.close()
