# SPDX-License-Identifier: LGPL-2.1-or-later
"""A session with the simulated kernel: commands, events, and what a bad peer may do to us."""

import socket
from collections.abc import Iterator

import pytest

from kvmi_host.introspect import Session, SessionClosed, SessionTimeout
from kvmi_host.introspect.session import MAX_WAITING_EVENTS
from kvmi_host.protocol import (
    Access,
    Action,
    Command,
    CommandError,
    ErrorCode,
    EventId,
    MemoryType,
    PageFaultReply,
    ProtocolError,
    Registers,
    SingleStep,
    UnsupportedDialect,
    frame,
    messages,
)
from kvmi_host.testing.peer import next_reply

CR3_WRITE = bytes.fromhex("0300 000000000000 0010000000000000 0020000000000000")
HYPERCALL_EVENT = bytes.fromhex("2002 0000 05 000000 08") + bytes(535)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Session]]:
    """A bare peer's socket, and a session with it that waits a tenth of a second at most."""
    ours, theirs = socket.socketpair()
    with theirs, Session(ours, timeout=0.1) as session:
        yield theirs, session


# -- commands


def test_the_commands_work(pair):
    kernel, session = pair(vcpus=2)
    assert session.get_version() == (1, "v6", None)
    assert session.check_command(Command.READ_PHYSICAL)
    assert session.check_event(EventId.CR)
    assert session.guest_info() == 2
    assert session.vcpu_info(1) == 2_000_000_000
    assert session.max_gfn() == 3
    state = session.get_registers(0, [0x10])
    assert (state.mode, state.msrs) == (8, {0x10: 0x11})
    session.set_registers(0, Registers(*range(18)))
    session.write_physical(0x1FFC, b"\xde\xad\xbe\xef")
    assert kernel.memory[0x1FFC:0x2000] == b"\xde\xad\xbe\xef"
    assert session.read_physical(0x1FFE, 2) == b"\xbe\xef"
    assert session.cpuid(1, 7, 1) == (7, 1, 0, 0)
    assert session.xsave(0) == bytes(4096)
    assert session.mtrr_type(0) is MemoryType.WRITE_BACK


def test_events_are_switched_where_they_belong(pair):
    kernel, session = pair(vcpus=2)
    session.control_vm_events(EventId.UNHOOK, True)
    session.control_events(1, EventId.CR, True)
    session.control_cr(1, 3, True)
    assert kernel.enabled(EventId.UNHOOK)
    assert [kernel.enabled(EventId.CR, vcpu) for vcpu in (0, 1)] == [False, True]
    assert [kernel.watched_registers(vcpu) for vcpu in (0, 1)] == [frozenset(), frozenset({3})]
    session.control_events(1, EventId.CR, False)
    session.control_cr(1, 3, False)
    assert not kernel.enabled(EventId.CR, 1)
    assert kernel.watched_registers(1) == frozenset()


def test_msrs_are_watched_on_their_vcpu(pair):
    kernel, session = pair(vcpus=2)
    session.control_msr(1, 0xC0000082, True)
    assert [kernel.watched_msrs(vcpu) for vcpu in (0, 1)] == [frozenset(), frozenset({0xC0000082})]
    session.control_msr(1, 0xC0000082, False)
    assert kernel.watched_msrs(1) == frozenset()


def test_pages_keep_the_access_that_was_set(pair):
    _, session = pair()
    session.set_page_access({0x1000: Access.R, 0x2000: Access.NONE})
    assert session.page_access(0, 0x1000, 0x2000) == (Access.ALL, Access.R, Access.NONE)
    assert session.page_access() == ()
    session.set_page_access({0x1000: Access.ALL})
    assert session.page_access(0x1FFF) == (Access.ALL,)


@pytest.mark.parametrize(("vector", "error_code", "address"), [(6, None, 0), (13, 0, 0), (14, 2, 0x1234)])
def test_a_vcpu_takes_one_exception_at_a_time(pair, vector, error_code, address):
    kernel, session = pair(vcpus=2)
    session.inject_exception(1, vector, error_code, address)
    with pytest.raises(CommandError) as caught:
        session.inject_exception(1, 6)
    assert caught.value.code is ErrorCode.EBUSY
    assert kernel.take_exception(0) is None
    assert kernel.take_exception(1) == (vector, error_code, address)
    session.inject_exception(1, 6)


@pytest.mark.parametrize(
    ("command", "payload", "vcpu"),
    [
        (Command.CONTROL_MSR, "02 00 0000 820000c0", 0),
        (Command.CONTROL_MSR, "01 01 0000 820000c0", 0),
        (Command.CONTROL_MSR, "01 00 0000 00200000", 0),
        (Command.INJECT_EXCEPTION, "20 00 0000 00000000 0000000000000000", 0),
        (Command.INJECT_EXCEPTION, "0d 02 0000 00000000 0000000000000000", 0),
        (Command.INJECT_EXCEPTION, "0d 01 0100 00000000 0000000000000000", 0),
        (Command.INJECT_EXCEPTION, "0d 00 0000 00000000 0000000000000000", 0),
        (Command.INJECT_EXCEPTION, "06 01 0000 00000000 0000000000000000", 0),
        (Command.INJECT_EXCEPTION, "02 00 0000 00000000 0000000000000000", 0),
        (Command.CHECK_COMMAND, "0200 0100 00000000", None),
        (Command.CHECK_EVENT, "0200 0000 01000000", None),
        (Command.CONTROL_EVENTS, "0a00 00 00 00000000", 0),
        (Command.GET_REGISTERS, "0100 0000 00000000 adde0000", 0),
        (Command.GET_REGISTERS, "e201 0000 00000000" + "740100c0" * 482, 0),
        (Command.GET_MTRR_TYPE, "0000000000001000", None),
        (Command.GET_PAGE_ACCESS, "0100 0100 00000000 0000000000000000", None),
        (Command.GET_PAGE_ACCESS, "0000 0200 00000000 0000000000000000", None),
        (Command.GET_PAGE_ACCESS, "0000 0100 01000000 0000000000000000", None),
        (Command.GET_PAGE_ACCESS, "0000 0100 00000000 0000000000000001", None),
        (Command.SET_PAGE_ACCESS, "0000 0100 00000000 0000000000000000 08 00 0000 00000000", None),
        (Command.SET_PAGE_ACCESS, "0000 0100 00000000 0000000000000000 01 01 0000 00000000", None),
        (Command.SET_PAGE_ACCESS, "0000 0100 00000000 0000000000000000 02 00 0000 00000000", None),
    ],
)
def test_a_bad_field_is_einval(pair, command, payload, vcpu):
    _, session = pair()
    with pytest.raises(CommandError) as caught:
        session.request(command, bytes.fromhex(payload), vcpu)
    assert caught.value.code is ErrorCode.EINVAL
    assert session.page_access(0) == (Access.ALL,)


def test_an_observer_cannot_touch_pages_or_inject(pair):
    _, session = pair(observe=True)
    for command in (Command.SET_PAGE_ACCESS, Command.INJECT_EXCEPTION):
        assert not session.check_command(command)
    assert session.check_command(Command.GET_PAGE_ACCESS)


def test_a_page_fault_is_answered_with_its_own_data(pair):
    kernel, session = pair()
    replies = kernel.fire(EventId.PF, own=bytes(24))
    session.reply(session.next_event(), Action.RETRY, page_fault=PageFaultReply(singlestep=True))
    reply = next_reply(replies)
    assert reply.action == Action.RETRY
    assert reply.own == bytes(12) + b"\1" + bytes(259)


def test_what_is_not_allowed_is_eperm_and_the_session_goes_on(pair):
    _, session = pair(commands=[Command.GET_GUEST_INFO])
    assert not session.check_command(Command.GET_MAX_GFN)
    with pytest.raises(CommandError) as caught:
        session.max_gfn()
    assert caught.value.code is ErrorCode.EPERM
    assert session.guest_info() == 1


def test_an_unknown_command_is_eopnotsupp_and_the_session_goes_on(pair):
    _, session = pair()
    with pytest.raises(CommandError) as caught:
        session.request(61, b"whatever")
    assert caught.value.code is ErrorCode.EOPNOTSUPP
    assert session.guest_info() == 1


def test_a_vcpu_index_out_of_range_is_einval(pair):
    _, session = pair(vcpus=2)
    with pytest.raises(CommandError) as caught:
        session.get_registers(2)
    assert caught.value.code is ErrorCode.EINVAL


def test_a_vcpu_that_was_not_started_is_eagain(pair):
    _, session = pair(vcpus=2, not_started=[1])
    with pytest.raises(CommandError) as caught:
        session.get_registers(1)
    assert caught.value.code is ErrorCode.EAGAIN


def test_any_command_can_be_sent_by_its_number(pair):
    _, session = pair()
    assert session.request(Command.GET_VERSION) == bytes.fromhex("01000000 00000000")
    assert session.request(Command.CONTROL_CR, bytes.fromhex("01 00 0000 03000000"), vcpu=0) == b""


def test_with_answers_off_commands_return_at_once(pair):
    kernel, session = pair()
    session.control_cmd_response(False)
    session.control_cr(0, 3, True)
    session.control_cmd_response(True)
    assert kernel.watched_registers() == frozenset({3})
    assert session.guest_info() == 1


# -- many commands at once


def test_many_commands_are_answered_in_their_order(pair):
    kernel, session = pair(pages=4)
    kernel.memory[:] = b"".join(bytes([page]) * 4096 for page in range(4))
    requests = [messages.read_physical(4096 * page, 4096) for page in (2, 0, 3, 1)]
    assert session.ask_all(requests) == [bytes([page]) * 4096 for page in (2, 0, 3, 1)]
    assert session.ask_all([]) == []


def test_more_commands_and_answers_than_the_socket_holds_go_through(pair):
    _, session = pair(pages=1)
    requests = [messages.write_physical(0, bytes([n % 256]) * 4096) for n in range(500)]
    reads = [messages.read_physical(0, 4096) for _ in range(500)]
    assert session.ask_all(requests + reads) == [None] * 500 + [bytes([499 % 256]) * 4096] * 500


def test_of_many_commands_the_first_refusal_is_raised_when_all_were_answered(pair):
    kernel, session = pair(commands=[Command.GET_GUEST_INFO, Command.CONTROL_CR])
    requests = [
        messages.guest_info(),
        messages.control_cr(7, 3, True),
        messages.max_gfn(),
        messages.control_cr(0, 3, True),
    ]
    with pytest.raises(CommandError) as caught:
        session.ask_all(requests)
    assert (caught.value.command, caught.value.code) == (Command.CONTROL_CR, ErrorCode.EINVAL)
    assert kernel.watched_registers() == frozenset({3})
    assert session.guest_info() == 1


def test_events_that_come_among_many_answers_are_kept(pair):
    kernel, session = pair(vcpus=2)
    kernel.fire(EventId.HYPERCALL, vcpu=1)
    assert session.ask_all([messages.guest_info()] * 3) == [2, 2, 2]
    assert session.waiting == 1
    assert session.next_event().vcpu == 1


def test_with_answers_off_many_commands_wait_for_none(pair):
    kernel, session = pair()
    session.ask_all(
        [
            messages.control_cmd_response(False, now=True),
            messages.control_cr(0, 3, True),
            messages.control_cmd_response(True, now=True),
        ]
    )
    assert kernel.watched_registers() == frozenset({3})


# -- many pages


def test_many_pages_are_read_in_place(pair):
    kernel, session = pair(pages=1100)
    kernel.memory[:] = b"".join(page.to_bytes(4, "little") * 1024 for page in range(1100))
    buffer = bytearray(1099 * 4096)
    session.read_pages(4096, buffer)
    assert buffer == kernel.memory[4096:]


def test_events_that_come_among_pages_are_kept(pair):
    kernel, session = pair(vcpus=2, pages=4)
    kernel.memory[:] = b"".join(bytes([page]) * 4096 for page in range(4))
    buffer = bytearray(4 * 4096)
    for vcpu in range(2):
        replies = kernel.fire(EventId.HYPERCALL, vcpu=vcpu)
        session.read_pages(0, buffer)
        assert buffer == kernel.memory
        session.reply(session.next_event())
        assert next_reply(replies).action == Action.CONTINUE


def test_pages_that_are_refused_are_zero_and_the_others_there(pair):
    kernel, session = pair(pages=4)
    kernel.memory[:] = b"\xaa" * len(kernel.memory)
    buffer = bytearray(b"\xbb" * 6 * 4096)
    with pytest.raises(CommandError) as caught:
        session.read_pages(0, buffer)
    assert caught.value.code is ErrorCode.EINVAL
    assert buffer == kernel.memory + bytes(2 * 4096)
    assert session.guest_info() == 1


@pytest.mark.parametrize(("gpa", "size"), [(1, 4096), (4096, 4095)])
def test_pages_are_whole(pair, gpa, size):
    _, session = pair()
    with pytest.raises(ValueError, match="whole pages"):
        session.read_pages(gpa, bytearray(size))


# -- events


def test_an_event_waits_for_its_reply(pair):
    kernel, session = pair(vcpus=2)
    replies = kernel.fire(EventId.HYPERCALL, vcpu=1, mode=4)
    event = session.next_event()
    assert (event.seq, event.vcpu, event.event, event.mode) == (1, 1, EventId.HYPERCALL, 4)
    assert replies.empty()
    session.reply(event)
    assert next_reply(replies).action == Action.CONTINUE


def test_a_cr_write_goes_through_unless_told_otherwise(pair):
    kernel, session = pair()
    replies = kernel.fire(EventId.CR, own=CR3_WRITE)
    session.reply(session.next_event())
    assert next_reply(replies).own == bytes.fromhex("0020000000000000")


def test_a_cr_write_can_be_changed(pair):
    kernel, session = pair()
    replies = kernel.fire(EventId.CR, own=CR3_WRITE)
    session.reply(session.next_event(), new_val=0x3000)
    assert next_reply(replies).own == bytes.fromhex("0030000000000000")


def test_commands_are_served_while_a_vcpu_waits_and_its_event_is_kept(pair):
    kernel, session = pair()
    replies = kernel.fire(EventId.HYPERCALL)
    assert session.guest_info() == 1
    assert session.waiting == 1
    assert session.get_registers(0).mode == 8
    session.reply(session.next_event())
    assert next_reply(replies).action == Action.CONTINUE


def test_events_come_in_the_order_in_which_they_were_sent(pair):
    kernel, session = pair(vcpus=4)
    for vcpu in (2, 0, 3, 1):
        kernel.fire(EventId.HYPERCALL, vcpu=vcpu)
    session.guest_info()
    events = [session.next_event() for _ in range(4)]
    assert [event.vcpu for event in events] == [2, 0, 3, 1]
    assert [event.seq for event in events] == [1, 2, 3, 4]


def test_every_pause_is_one_event(pair):
    _, session = pair()
    session.pause_vcpu(0)
    session.pause_vcpu(0, wait=True)
    for _ in range(2):
        event = session.next_event()
        assert event.event is EventId.PAUSE_VCPU
        session.reply(event)
    assert session.next_event(0) is None


def test_no_event_in_time_is_none_and_not_an_error(pair):
    _, session = pair()
    assert session.next_event(0) is None
    assert session.next_event(0.01) is None
    assert session.guest_info() == 1


# -- the end


def test_the_end_of_the_session_is_told_after_its_last_event(pair):
    kernel, session = pair()
    kernel.fire(EventId.HYPERCALL)
    kernel.end("the VM died")
    assert session.next_event().event is EventId.HYPERCALL
    with pytest.raises(SessionClosed):
        session.next_event()
    with pytest.raises(SessionClosed):
        session.guest_info()


def test_a_closed_session_says_so(pair):
    kernel, session = pair()
    session.close()
    assert session.closed
    session.close()
    for use in (session.guest_info, session.next_event):
        with pytest.raises(SessionClosed):
            use()
    assert kernel.wait_ended() == "the introspector closed"


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("0000 1000 02000000  0000 0000 00000000  00 05 0000 00000000", "nobody waits"),
        ("0000 1000 01000000  0000 0100 00000000  00 05 0000 00000000", "padding"),
        ("0000 1000 01000000  0000 0000 00000000  00 05 0100 00000000", "padding"),
        ("0000 1000 01000000  0000 0000 00000000  00 05 0000 01000000", "padding"),
        ("0000 1800 01000000  0000 0000 00000000  00 05 0000 00000000 0000000000000000", "own data"),
        ("0000 0900 01000000  0000 0000 00000000  00", "9 bytes"),
    ],
)
def test_an_invalid_reply_ends_the_session(pair, reply, why):
    kernel, session = pair()
    replies = kernel.fire(EventId.HYPERCALL)
    session.next_event()
    session.send_raw(bytes.fromhex(reply))
    assert why in kernel.wait_ended()
    assert next_reply(replies) is None
    with pytest.raises(SessionClosed):
        session.next_event()


@pytest.mark.parametrize("payload", ["", "0000 0000 000000"])
def test_a_vcpu_command_without_a_whole_vcpu_header_ends_the_session(pair, payload):
    kernel, session = pair()
    session.send_raw(frame(Command.GET_VCPU_INFO, 1, bytes.fromhex(payload)))
    assert "vCPU header" in kernel.wait_ended()


@pytest.mark.parametrize("payload", ["0100 02 00 00000000", "0100 01 01 00000000", "0100 01 00 00000001", "0100 01"])
def test_arguments_that_are_none_are_einval(pair, payload):
    _, session = pair()
    with pytest.raises(CommandError) as caught:
        session.request(Command.CONTROL_EVENTS, bytes.fromhex(payload), vcpu=0)
    assert caught.value.code is ErrorCode.EINVAL


def test_an_action_that_the_event_does_not_accept_is_continue(pair):
    kernel, session = pair()
    replies = kernel.fire(EventId.HYPERCALL)
    session.reply(session.next_event(), Action.RETRY)
    assert next_reply(replies).action == Action.CONTINUE


@pytest.mark.parametrize("common", ["00 05", "00 05 00", "00 05 0000 000000"])
def test_a_short_reply_of_an_older_introspector_is_accepted(pair, common):
    kernel, session = pair()
    replies = kernel.fire(EventId.HYPERCALL)
    session.next_event()
    session.send_raw(frame(0, 1, bytes(8) + bytes.fromhex(common)))
    assert next_reply(replies).action == Action.CONTINUE


@pytest.mark.parametrize("change", [{"action": Action.CRASH}, {"new_val": 0x3000}])
def test_a_session_that_observes_cannot_change_the_guest(pair, change):
    kernel, session = pair(observe=True)
    kernel.fire(EventId.CR, own=CR3_WRITE)
    session.reply(session.next_event(), **change)
    assert "observes" in kernel.wait_ended()
    assert not kernel.enabled(EventId.CR)


# -- bad peers


def test_a_v7_kernels_events_are_read_as_v7s_once_it_was_asked(ends):
    peer, session = ends
    peer.sendall(frame(2, 1, bytes(8) + bytes.fromhex("01000000 00000000 01 00 00 00 00000000")))
    assert session.get_version() == (1, "v7", (1, 0, 0, 0))
    peer.sendall(frame(1, 1, HYPERCALL_EVENT[:4] + b"\x0b" + HYPERCALL_EVENT[5:] + b"\1" + bytes(7)))
    assert session.next_event().data == SingleStep(failed=1)


def test_a_v12_kernel_is_refused_by_name(ends):
    peer, session = ends
    peer.sendall(frame(2, 1, bytes(8) + bytes.fromhex("01000000 f81f0000")))
    with pytest.raises(UnsupportedDialect, match="the kernel speaks KVMI v12"):
        session.get_version()


def test_a_peer_that_does_not_answer_is_a_timeout(ends):
    _, session = ends
    with pytest.raises(SessionTimeout, match=r"get-max-gfn: no answer in 0\.1 s"):
        session.max_gfn()


def test_one_of_many_answers_that_does_not_come_is_a_timeout(ends):
    peer, session = ends
    peer.sendall(bytes.fromhex("1d00 1000 01000000 00000000 00000000 0700000000000000"))
    with pytest.raises(SessionTimeout, match=r"2 of 3 commands: no answer in 0\.1 s"):
        session.ask_all([messages.max_gfn()] * 3)


def test_many_commands_that_a_peer_does_not_read_are_a_timeout(ends):
    _, session = ends
    with pytest.raises(SessionTimeout, match="1000 of 1000 commands"):
        session.ask_all([messages.write_physical(0, bytes(4096))] * 1000)


def test_pages_that_do_not_come_are_a_timeout_and_are_not_taken_for_the_next_ones(ends):
    peer, session = ends
    late = frame(Command.READ_PHYSICAL, 1, bytes(8) + b"\xaa" * 4096) + frame(Command.READ_PHYSICAL, 2, bytes(8 + 4096))
    peer.sendall(late[:1000])
    with pytest.raises(SessionTimeout, match=r"2 pages: no answer in 0\.1 s"):
        session.read_pages(0, bytearray(2 * 4096))
    peer.sendall(late[1000:] + frame(Command.READ_PHYSICAL, 3, bytes(8) + b"\xcc" * 4096))
    buffer = bytearray(4096)
    session.read_pages(0, buffer)
    assert buffer == b"\xcc" * 4096


def test_a_peer_that_dies_in_the_middle_of_a_page_is_a_protocol_error(ends):
    peer, session = ends
    peer.sendall(frame(Command.READ_PHYSICAL, 1, bytes(8 + 4096))[:-1])
    peer.shutdown(socket.SHUT_WR)
    with pytest.raises(ProtocolError, match="middle of a message"):
        session.read_pages(0, bytearray(4096))


def test_the_end_between_two_pages_is_the_end(ends):
    peer, session = ends
    peer.sendall(frame(Command.READ_PHYSICAL, 1, bytes(8 + 4096)))
    peer.shutdown(socket.SHUT_WR)
    with pytest.raises(SessionClosed):
        session.read_pages(0, bytearray(2 * 4096))


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next_one(ends):
    peer, session = ends
    with pytest.raises(SessionTimeout):
        session.guest_info()
    peer.sendall(bytes.fromhex("0500 1800 01000000 00000000 00000000 07000000 00000000 00000000 00000000"))
    peer.sendall(bytes.fromhex("0500 1800 02000000 00000000 00000000 02000000 00000000 00000000 00000000"))
    assert session.guest_info() == 2


def test_a_peer_that_does_not_read_is_a_timeout(ends):
    _, session = ends
    with pytest.raises(SessionTimeout, match="has not read"):
        session.send_raw(bytes(16 << 20))


def test_garbage_is_a_protocol_error(ends):
    peer, session = ends
    peer.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(ProtocolError):
        session.next_event()


def test_an_oversized_message_is_a_protocol_error(ends):
    peer, session = ends
    peer.sendall(bytes.fromhex("0100 f91f 01000000"))
    with pytest.raises(ProtocolError, match="8185"):
        session.next_event()


def test_a_truncated_event_is_a_protocol_error(ends):
    peer, session = ends
    peer.sendall(frame(1, 1, HYPERCALL_EVENT[:100]))
    with pytest.raises(ProtocolError, match="regs"):
        session.next_event()


def test_a_peer_that_dies_in_the_middle_of_a_message_is_a_protocol_error(ends):
    peer, session = ends
    peer.sendall(frame(1, 1, HYPERCALL_EVENT)[:-1])
    peer.close()
    with pytest.raises(ProtocolError, match="middle of a message"):
        session.next_event()


def test_an_answer_that_nobody_asked_for_is_a_protocol_error(ends):
    peer, session = ends
    peer.sendall(bytes.fromhex("0200 1000 05000000 00000000 00000000 01000000 00000000"))
    with pytest.raises(ProtocolError, match="nobody asked"):
        session.next_event()


def test_a_peer_that_floods_instead_of_answering_does_not_fill_our_memory(ends):
    peer, session = ends
    session.timeout = 30.0
    peer.setblocking(False)

    class Flooding:
        """Refills the socket whenever the session has emptied it."""

        def __init__(self) -> None:
            self.left = b""
            self.sent = 0

        def refill(self) -> None:
            try:
                while self.sent <= MAX_WAITING_EVENTS + 200:
                    if not self.left:
                        self.sent += 1
                        self.left = frame(1, self.sent, HYPERCALL_EVENT)
                    self.left = self.left[peer.send(self.left) :]
            except BlockingIOError:
                pass

    flooding, receive = Flooding(), session._receive
    session._receive = lambda deadline: (flooding.refill(), receive(deadline))[1]
    with pytest.raises(ProtocolError, match="without waiting for a reply"):
        session.guest_info()
    assert session.closed
    assert session.waiting == MAX_WAITING_EVENTS
