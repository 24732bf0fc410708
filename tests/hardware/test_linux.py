# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real Linux guest, defined and started through libvirt, and introspected while it runs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import libvirt
import pytest

from kvmi_host.attach import attach
from kvmi_host.introspect import Session
from kvmi_host.protocol import EventId
from kvmi_host.provision import Guest, define, destroy, find_domain, find_image
from kvmi_host.testing.linux import LinuxGuest, linux_guest
from kvmi_host.testing.live import DEADLINE, Walker

pytestmark = [pytest.mark.hardware, pytest.mark.libvirt]

VCPUS = 2
LIBRARY_PAGE = Path(__file__).with_name("library.md")
EFER_LMA = 1 << 10


@pytest.fixture(scope="module")
def linux() -> Iterator[LinuxGuest]:
    with linux_guest("hwtest-linux", VCPUS) as guest:
        yield guest


@pytest.fixture
def session(linux: LinuxGuest) -> Iterator[Session]:
    attached = attach(linux.name, uri="qemu:///system", allow="full", timeout=DEADLINE)
    with attached:
        yield attached.session
    linux.await_growth()


@pytest.mark.rule("4.70", "4.73")
def test_all_vcpus_are_paused_read_and_resumed(session: Session, linux: LinuxGuest) -> None:
    walker = Walker(session, VCPUS)
    for vcpu in walker.vcpus:
        session.pause_vcpu(vcpu)
    paused = {event.vcpu: event for event in (walker.event() for _ in walker.vcpus)}
    assert set(paused) == set(walker.vcpus)
    for vcpu, event in paused.items():
        state = session.get_registers(vcpu)
        assert (event.mode, state.mode) == (8, 8)
        assert state.registers == event.registers
        assert state.sregs.efer & EFER_LMA
        assert event.msrs.lstar >> 47 == 0x1FFFF
    for event in paused.values():
        session.reply(event)


@pytest.mark.rule("4.3")
def test_cr3_writes_of_its_processes_are_seen(session: Session) -> None:
    walker = Walker(session, VCPUS)
    walker.enable(EventId.CR, cr=3)
    events = list(walker.answered(40))
    assert {event.mode for event in events} == {8}
    assert [event.seq for event in events] == list(range(1, 41))
    assert len({event.data.new & ~0xFFF for event in events}) > 1
    for vcpu in Counter(event.vcpu for event in events):
        mine = [event.data for event in events if event.vcpu == vcpu]
        # What was written is what the next write finds.
        assert all(after.old == before.new for before, after in pairwise(mine))
    for vcpu in walker.vcpus:
        session.control_cr(vcpu, 3, False)


@pytest.mark.rule("3.24")
def test_guest_memory_is_where_the_page_tables_say(session: Session) -> None:
    session.pause_vcpu(0)
    event = session.next_event(DEADLINE)
    assert event is not None
    table = session.read_physical(event.cr3 & ~0xFFF & (1 << 52) - 1, 4096)
    kernel_half = [table[8 * entry] & 1 for entry in range(256, 512)]
    assert any(kernel_half)
    session.reply(event)


def test_suspended_by_libvirt_it_can_be_hooked_and_unhooked(linux: LinuxGuest) -> None:
    domain = linux.domain
    domain.suspend()
    try:
        with attach(linux.name, uri="qemu:///system", timeout=DEADLINE) as attached:
            assert attached.session.guest_info() == VCPUS
            assert attached.session.max_gfn() > 0
    finally:
        domain.resume()
    linux.await_growth()


@pytest.fixture
def not_started(linux: LinuxGuest) -> Iterator[str]:
    """A modewalk guest that libvirt has made, and whose vCPUs have not run."""
    name = "hwtest-paused"
    define(linux.connection, Guest(name=name, image=find_image("modewalk"), vcpus=VCPUS))
    try:
        find_domain(linux.connection, name).createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
        yield name
    finally:
        destroy(linux.connection, name)


@pytest.mark.rule("4.76", "4.78", "2.26")
def test_vcpus_announce_themselves_when_they_start(
    linux: LinuxGuest, not_started: str, check_refused: Callable[[Session], None]
) -> None:
    with attach(not_started, uri="qemu:///system", allow="full", timeout=DEADLINE) as attached:
        session = attached.session
        check_refused(session)
        session.control_vm_events(EventId.CREATE_VCPU, True)
        find_domain(linux.connection, not_started).resume()
        walker = Walker(session, VCPUS)
        created = []
        while len(created) < VCPUS:
            event = walker.event()
            assert event.event == EventId.CREATE_VCPU
            created.append(event.vcpu)
            session.reply(event)
        assert sorted(created) == [0, 1]


@pytest.fixture
def check_refused() -> Callable[[Session], None]:
    """A vCPU that waits to be started is refused -EAGAIN."""
    from kvmi_host.protocol import CommandError, ErrorCode

    def check(session: Session) -> None:
        with pytest.raises(CommandError) as refused:
            session.vcpu_info(1)
        assert refused.value.code == ErrorCode.EAGAIN
        with pytest.raises(CommandError) as refused:
            session.pause_vcpu(1)
        assert refused.value.code == ErrorCode.EAGAIN

    return check


@pytest.mark.rule("4.77")
def test_vcpus_that_run_announce_themselves_once_when_it_is_enabled(session: Session) -> None:
    session.control_vm_events(EventId.CREATE_VCPU, True)
    walker = Walker(session, VCPUS)
    events = list(walker.answered(VCPUS))
    assert sorted(event.vcpu for event in events) == [0, 1]
    assert {event.event for event in events} == {EventId.CREATE_VCPU}
    session.control_vm_events(EventId.CREATE_VCPU, False)
    session.control_vm_events(EventId.CREATE_VCPU, True)
    assert session.next_event(0.5) is None


PROGRAMS = dict(
    zip(
        ["a look", "breakpoints", "handlers", "asyncio"],
        re.findall(r"^```python\n(.*?)^```$", LIBRARY_PAGE.read_text(), re.MULTILINE | re.DOTALL),
        strict=True,
    )
)
SAYS = {
    "a look": r"2 vCPUs, KVMI v6\n0 [248] 0x.*\n1 [248] 0x.*\n([0-9a-f]{2} ?){16}\n[1-9]\d* address spaces",
    "breakpoints": r"0xf\w+ is at 0x\w+ in a page of \d+\n([0-9a-f]{2} ?){8}\nthe most frequent .*: \[\(\d+, ",
    "handlers": r"address spaces were switched: \{\d: ",
    "asyncio": r"0 0x.*\n1 0x.*\n\d+ \d 8 0x",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_programs_of_the_librarys_page_run(linux: LinuxGuest, program: str) -> None:
    code = PROGRAMS[program].replace('"webserver"', repr(linux.name))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=2 * DEADLINE)
    assert not result.stderr, result.stderr
    assert result.returncode == 0
    assert re.match(SAYS[program], result.stdout), result.stdout
    linux.await_growth()
