# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whoever dies, and whenever: nothing hangs, nothing is left behind, and the guest goes on if it can."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from time import monotonic

import pytest

from kvmi_host.attach import attach
from kvmi_host.host.footprint import receivers, users_of_kvm
from kvmi_host.introspect import Session
from kvmi_host.protocol import EventId
from kvmi_host.testing.live import DEADLINE, LiveGuest, Walker, await_end
from kvmi_host.testing.modewalk import Actions, Station

pytestmark = pytest.mark.hardware

AGENT = """
import sys
from kvmi_host.attach import attach
from kvmi_host.protocol import EventId
session = attach(sys.argv[1], allow="full", timeout=60).session
for vcpu in range(session.guest_info()):
    session.control_events(vcpu, EventId.HYPERCALL, True)
print(session.next_event(60), flush=True)
sys.stdin.read()
"""


def until(reached: Callable[[], bool]) -> None:
    deadline = monotonic() + DEADLINE
    while not reached():
        assert monotonic() < deadline, "not reached in time"
        os.sched_yield()


@pytest.mark.rule("2.25")
@pytest.mark.parametrize("state", ["walking", "waiting for a reply", "paused"])
def test_a_vm_that_is_killed_ends_its_session(own_guest: LiveGuest, hooked: Callable[..., Session], state: str) -> None:
    before = users_of_kvm()
    session = hooked(own_guest)
    walker = Walker(session, own_guest.vcpus)
    if state == "waiting for a reply":
        walker.enable(EventId.HYPERCALL)
        assert {walker.event().vcpu for _ in walker.vcpus} == set(walker.vcpus)
    elif state == "paused":
        session.pause_vcpu(0)
        walker.event()
    own_guest.kill()
    await_end(session)
    until(lambda: users_of_kvm() < before)


@pytest.mark.rule("2.21")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_vm_that_is_told_to_end_does_so_once_its_vcpus_are_let_go(
    own_guest: LiveGuest, hooked: Callable[..., Session], how: signal.Signals
) -> None:
    session = hooked(own_guest)
    walker = Walker(session, own_guest.vcpus)
    walker.enable(EventId.HYPERCALL, 0)
    walker.event()
    os.kill(own_guest.pid, how)
    session.close()
    assert own_guest.wait() == 0


@pytest.mark.rule("2.20", "2.21")
def test_an_introspector_that_is_killed_while_every_vcpu_waits_lets_the_guest_go_on(guest: LiveGuest) -> None:
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, guest.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with agent:
        assert agent.stdout
        assert "hypercall" in agent.stdout.readline()
        agent.kill()
    guest.goes_on()
    attach(guest.name, timeout=DEADLINE).close()


@pytest.mark.rule("2.21", "2.8")
def test_closing_the_session_lets_every_vcpu_go_on(guest: LiveGuest, walker: Walker) -> None:
    walker.enable(EventId.HYPERCALL)
    walker.enable(EventId.CR, cr=3)
    assert {walker.event().vcpu for _ in walker.vcpus} == set(walker.vcpus)
    walker.session.close()
    guest.goes_on()


@pytest.mark.rule("5.19", "2.23")
def test_a_new_session_sees_no_event_that_the_last_one_enabled(
    guest: LiveGuest, hooked: Callable[..., Session]
) -> None:
    first = Walker(hooked(guest), guest.vcpus)
    first.hold(0, Station.LONG64, Actions.ALL)
    first.enable(EventId.CR, 0, cr=3)
    first.enable(EventId.HYPERCALL, 0)
    first.event()
    first.session.close()
    second = Walker(hooked(guest), guest.vcpus)
    for _ in range(5):
        second.advances(0)
    assert second.session.waiting == 0


@pytest.mark.rule("5.18")
def test_hook_and_unhook_a_hundred_times_leaves_nothing_behind(own_guest: LiveGuest) -> None:
    until(lambda: receivers(own_guest.pid) == 0)
    before = users_of_kvm()
    for round_ in range(100):
        session = attach(own_guest.name, allow="full", timeout=DEADLINE).session
        walker = Walker(session, own_guest.vcpus)
        walker.enable(EventId.HYPERCALL)
        walker.enable(EventId.CR, cr=3)
        if round_ % 2:
            list(walker.answered(3))
        else:
            walker.event()
        session.close()
    own_guest.goes_on()
    until(lambda: receivers(own_guest.pid) == 0 and users_of_kvm() == before)


@pytest.mark.rule("2.25")
def test_a_vm_can_be_hooked_and_killed_over_and_over(hooked: Callable[..., Session], own_guest: LiveGuest) -> None:
    before = users_of_kvm()
    for _ in range(5):
        with LiveGuest(2) as guest:
            walker = Walker(hooked(guest.booted()), 2)
            walker.enable(EventId.HYPERCALL)
            walker.event()
            guest.kill()
            await_end(walker.session)
    until(lambda: users_of_kvm() == before)
    own_guest.goes_on()
