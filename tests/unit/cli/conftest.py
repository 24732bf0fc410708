# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest that is attached to: its kernel is simulated, behind what ``attach`` returns."""

import socket
from uuid import UUID

import pytest

import kvmi_host
from kvmi_host.introspect import PeerInfo, Session, Vm
from kvmi_host.testing.peer import SimulatedKernel

PEER = PeerInfo(UUID(int=7), "webserver", 1_700_000_000, 1234, "vm-fd")


@pytest.fixture
def kernel(monkeypatch):
    """The kernel that ``kvmi-host attach`` gets to talk to."""
    ours, kernels = socket.socketpair()
    with kernels, SimulatedKernel(kernels, vcpus=2) as simulated:

        def attach(vm, *, tap=None, **settings):
            return Vm(Session(ours, peer=PEER, timeout=5, tap=tap))

        monkeypatch.setattr(kvmi_host, "attach", attach)
        yield simulated
    ours.close()
