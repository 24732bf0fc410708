# SPDX-License-Identifier: LGPL-2.1-or-later
"""A session with the simulated kernel, for tests without KVM."""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from kvmi_host.introspect import Session, Tap
from kvmi_host.testing.peer import SimulatedKernel

Pair = tuple[SimulatedKernel, Session]


@pytest.fixture
def pair() -> Iterator[Callable[..., Pair]]:
    """Makes a simulated kernel with the given settings, and a session with it."""
    with ExitStack() as stack:

        def make(vcpus: int = 1, *, timeout: float = 5.0, tap: Tap | None = None, **settings: object) -> Pair:
            ours, kernels = socket.socketpair()
            with kernels:
                kernel = stack.enter_context(SimulatedKernel(kernels, vcpus, **settings))
            return kernel, stack.enter_context(Session(ours, timeout=timeout, tap=tap))

        yield make
