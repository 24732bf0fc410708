# SPDX-License-Identifier: LGPL-2.1-or-later
"""Commands, and what they answer."""

from __future__ import annotations

import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvmi_host.introspect import Session
from kvmi_host.protocol import Command, CommandError, ErrorCode, EventId
from kvmi_host.protocol.framing import Frame
from kvmi_host.testing.live import LiveGuest, Walker, Wire
from kvmi_host.testing.modewalk import CONTROL_ADDRESS, HYPERCALL, HYPERCALL_EVENT, Actions, Header, Station
from kvmi_host.testing.puppet import UD, Puppet

pytestmark = pytest.mark.hardware

SERVED = {*range(2, 12), *range(13, 22), 23, 27, 29}
EVENTS_SERVED = set(range(12))
PAGE = 4096
VCPU_0 = bytes(8)
MSR_EFER = 0xC0000080
MSR_LSTAR = 0xC0000082


def error_of(answer: Frame) -> int:
    return struct.unpack_from("<i", answer.payload)[0]


def code(refused: pytest.ExceptionInfo[CommandError]) -> int:
    return refused.value.code


@pytest.mark.rule("3.1")
def test_get_version_answers_version_1_of_dialect_v6(session: Session) -> None:
    version = session.get_version()
    assert (version.version, version.dialect) == (1, "v6")


@pytest.mark.rule("3.4")
def test_get_guest_info_counts_the_vcpus(session: Session, guest: LiveGuest) -> None:
    assert session.guest_info() == guest.vcpus


@pytest.mark.rule("3.5")
def test_get_vcpu_info_tells_the_tsc_frequency(session: Session) -> None:
    assert 10**8 < session.vcpu_info(0) < 10**11


@pytest.mark.rule("5.6")
def test_all_allows_what_is_served_and_no_more(session: Session) -> None:
    assert {n for n in range(40) if session.check_command(n)} == SERVED
    assert {n for n in range(20) if session.check_event(n)} == EVENTS_SERVED


@pytest.mark.rule("3.43")
def test_get_max_gfn_is_the_highest_frame_of_a_memory_slot(session: Session) -> None:
    # QEMU maps the firmware up to 4 GiB.
    assert session.max_gfn() == 2**32 // PAGE - 1


@pytest.mark.rule("3.24")
def test_read_physical_reads_the_guests_memory(session: Session, guest: LiveGuest) -> None:
    header = Header.unpack(session.read_physical(CONTROL_ADDRESS, 16))
    assert header.ready
    assert header.online == guest.vcpus


@pytest.mark.rule("3.27")
def test_write_physical_writes_the_guests_memory(session: Session) -> None:
    data = bytes(range(256)) * 16
    session.write_physical(0x300000, data)
    assert session.read_physical(0x300000, PAGE) == data
    session.write_physical(0x300000 + 5, b"xyz")
    assert session.read_physical(0x300000 + 4, 5) == b"\x04xyz\x08"


@pytest.mark.rule("3.25")
@pytest.mark.parametrize("gpa", [0x8000000, 1 << 40, (1 << 64) - PAGE], ids=hex)
def test_read_physical_refuses_what_is_no_memory(session: Session, gpa: int) -> None:
    with pytest.raises(CommandError) as refused:
        session.read_physical(gpa, 1)
    assert code(refused) == ErrorCode.EINVAL


@pytest.mark.rule("3.28")
def test_write_physical_refuses_read_only_memory(session: Session) -> None:
    with pytest.raises(CommandError) as refused:
        session.write_physical(0xFFFFF000, b"\0")
    assert code(refused) == ErrorCode.EINVAL
    assert session.read_physical(0xFFFFFFF0, 1) != b"\0"


@pytest.mark.rule("3.16", "4.70")
def test_get_registers_agrees_with_the_event_of_the_same_stop(walker: Walker) -> None:
    walker.hold(0, Station.LONG64, Actions.HYPERCALL)
    walker.enable(EventId.HYPERCALL, 0)
    event = walker.event()
    state = walker.session.get_registers(0, [MSR_EFER, MSR_LSTAR])
    assert state.mode == event.mode
    assert state.registers == event.registers
    assert state.sregs == event.sregs
    assert dict(state.msrs) == {MSR_EFER: event.msrs.efer, MSR_LSTAR: event.msrs.lstar}
    assert (event.registers.rax, event.registers.rdi) == (HYPERCALL, HYPERCALL_EVENT)
    assert event.msrs.efer == event.sregs.efer


@pytest.mark.rule("3.17")
def test_get_registers_refuses_an_msr_that_there_is_not(session: Session) -> None:
    with pytest.raises(CommandError) as refused:
        session.get_registers(0, [0xDEAD])
    assert code(refused) == ErrorCode.EINVAL


@pytest.mark.rule("3.17")
def test_get_registers_refuses_more_msrs_than_an_answer_holds(session: Session) -> None:
    with pytest.raises(CommandError) as refused:
        session.get_registers(0, [MSR_EFER] * 490)
    assert code(refused) == ErrorCode.EINVAL
    assert set(session.get_registers(0, [MSR_EFER] * 470).msrs) == {MSR_EFER}


@pytest.mark.rule("3.19")
def test_set_registers_without_a_pending_event_is_dropped_with_success(walker: Walker) -> None:
    walker.hold(0, Station.LONG64)
    registers = walker.session.get_registers(0).registers
    walker.session.set_registers(0, registers._replace(rip=0, rsp=0))
    walker.advances(0)


@pytest.mark.rule("4.15")
def test_the_guest_gets_zero_from_its_hypercall(walker: Walker) -> None:
    walker.hold(0, Station.LONG64, Actions.HYPERCALL)
    assert walker.record(0).result == struct.unpack("<I", struct.pack("<i", -1000))[0]
    walker.enable(EventId.HYPERCALL, 0)
    list(walker.answered(2))
    event = walker.event()
    assert walker.record(0).result == 0
    walker.session.reply(event)


@pytest.mark.rule("4.34", "4.35")
def test_an_event_that_is_off_is_not_sent(walker: Walker) -> None:
    walker.hold(0, Station.LONG64)
    walker.hold(1, Station.LONG64)
    walker.enable(EventId.HYPERCALL, 0)
    walker.enable(EventId.CR, 1, cr=4)
    kinds = {(event.vcpu, event.event, event.data and event.data.cr) for event in walker.answered(40)}
    assert kinds == {(0, EventId.HYPERCALL, None), (1, EventId.CR, 4)}


@pytest.mark.rule("4.4")
@pytest.mark.parametrize("cr", [0, 3, 4])
def test_control_cr_alone_or_the_event_alone_brings_no_event(walker: Walker, cr: int) -> None:
    walker.hold(0, Station.LONG64)
    walker.session.control_cr(0, cr, True)
    walker.advances(0)
    walker.advances(0)
    assert walker.session.waiting == 0
    walker.session.control_events(0, EventId.CR, True)
    event = walker.event()
    assert event.data.cr == cr
    walker.session.control_cr(0, cr, False)
    walker.session.reply(event)
    walker.advances(0)
    walker.advances(0)
    assert walker.session.waiting == 0


@pytest.mark.rule("3.6")
def test_pause_owes_one_event_for_each_command(walker: Walker) -> None:
    for _ in range(5):
        walker.session.pause_vcpu(0)
    assert [event.event for event in walker.answered(5)] == [EventId.PAUSE_VCPU] * 5
    walker.advances(0)
    assert walker.session.waiting == 0


@pytest.mark.rule("3.9")
def test_pause_with_wait_finds_the_vcpu_out_of_the_guest(walker: Walker) -> None:
    walker.hold(0, Station.LONG64)
    walker.session.pause_vcpu(0, wait=True)
    before = walker.iterations(0)
    event = walker.event()
    assert walker.iterations(0) == before
    walker.session.reply(event)


@pytest.mark.rule("3.7")
def test_more_pauses_than_a_vcpu_may_owe_are_refused(walker: Walker) -> None:
    walker.enable(EventId.HYPERCALL, 0)
    event = walker.event()
    for _ in range(1000):
        walker.session.pause_vcpu(0)
    with pytest.raises(CommandError) as refused:
        walker.session.pause_vcpu(0)
    assert code(refused) == ErrorCode.EBUSY
    walker.session.control_events(0, EventId.HYPERCALL, False)
    walker.session.reply(event)
    assert {paused.event for paused in walker.answered(1000)} == {EventId.PAUSE_VCPU}


@pytest.mark.rule("3.8")
def test_pause_needs_its_event_to_be_allowed(guest: LiveGuest, hooked: Callable[..., Session]) -> None:
    session = hooked(guest, allow="pause-vcpu,event:cr")
    with pytest.raises(CommandError) as refused:
        session.pause_vcpu(0)
    assert code(refused) == ErrorCode.EPERM


@pytest.mark.rule("3.49")
def test_a_vcpu_at_home_wakes_up_for_commands_and_sleeps_on(walker: Walker) -> None:
    for _ in range(20):
        walker.session.get_registers(0)
        walker.session.pause_vcpu(0)
        walker.session.reply(walker.event())
    assert walker.record(0).exception == 0
    walker.advances(0)


@pytest.mark.rule("3.49")
def test_a_vcpu_that_nothing_wakes_up_does_for_commands(puppet: Puppet) -> None:
    puppet.sleep(0)
    for _ in range(100):
        puppet.session.get_registers(0)
    assert puppet.wake(0).vector == UD


@pytest.mark.rule("3.48", "2.1")
def test_commands_are_answered_in_their_order(wire: Wire) -> None:
    sent = list(range(1000, 1200))
    for seq in sent:
        wire.send(Command.GET_VCPU_INFO, VCPU_0, seq)
    assert [wire.receive().seq for _ in sent] == sent


@pytest.mark.rule("3.50")
def test_a_vcpu_that_is_sent_more_than_it_can_queue_leaves_no_command_unanswered(wire: Wire) -> None:
    with ThreadPoolExecutor() as pool:
        answers = pool.submit(lambda: [wire.receive() for _ in range(5000)])
        for seq in range(5000):
            wire.send(Command.GET_VCPU_INFO, VCPU_0, seq)
        received = answers.result()
    assert sorted(answer.seq for answer in received) == list(range(5000))
    assert {error_of(answer) for answer in received} <= {0, ErrorCode.EBUSY}
