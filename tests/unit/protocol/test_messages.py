# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every command's bytes and answer's meaning, against vectors written by hand from the protocol's tables."""

import pytest

from kvmi_host.protocol import (
    Access,
    Command,
    CommandError,
    Connection,
    Event,
    MemoryType,
    ProtocolError,
    Registers,
    State,
    frame,
    messages,
)
from kvmi_host.protocol.connection import MAX_UNANSWERED, Answer

REGISTERS = Registers(*range(1, 19))

REQUESTS = [
    (messages.get_version(), 2, ""),
    (messages.check_command(17), 3, "1100 0000 00000000"),
    (messages.check_event(1), 4, "0100 0000 00000000"),
    (messages.guest_info(), 5, ""),
    (messages.vcpu_info(3), 6, "0300 0000 00000000"),
    (messages.pause_vcpu(2), 7, "0200 0000 00000000  00 00 0000 00000000"),
    (messages.pause_vcpu(2, wait=True), 7, "0200 0000 00000000  01 00 0000 00000000"),
    (messages.control_vm_events(9, True), 8, "0900 01 00 00000000"),
    (messages.control_events(1, 5, True), 9, "0100 0000 00000000  0500 01 00 00000000"),
    (messages.control_events(1, 5, False), 9, "0100 0000 00000000  0500 00 00 00000000"),
    (messages.control_cr(0, 3, True), 10, "0000 0000 00000000  01 00 0000 03000000"),
    (messages.control_msr(1, 0xC0000082, True), 11, "0100 0000 00000000  01 00 0000 820000c0"),
    (messages.control_msr(1, 0x174, False), 11, "0100 0000 00000000  00 00 0000 74010000"),
    (messages.cpuid(2, 0xD, 1), 15, "0200 0000 00000000  0d000000 01000000"),
    (messages.xsave(2), 16, "0200 0000 00000000"),
    (messages.inject_exception(0, 6), 19, "0000 0000 00000000  06 00 0000 00000000 0000000000000000"),
    (messages.inject_exception(1, 13, 0x18), 19, "0100 0000 00000000  0d 01 0000 18000000 0000000000000000"),
    (messages.inject_exception(1, 17, 0), 19, "0100 0000 00000000  11 01 0000 00000000 0000000000000000"),
    (messages.inject_exception(1, 14, 2, 0x1234), 19, "0100 0000 00000000  0e 01 0000 02000000 3412000000000000"),
    (messages.page_access([]), 20, "0000 0000 00000000"),
    (messages.page_access([0x1000, 0x3000]), 20, "0000 0200 00000000  0010000000000000 0030000000000000"),
    (
        messages.set_page_access({0x1000: Access.R | Access.X, 0x3000: Access.NONE}),
        21,
        "0000 0200 00000000  0010000000000000 05 00 0000 00000000  0030000000000000 00 00 0000 00000000",
    ),
    (messages.mtrr_type(0xA0000), 23, "00000a0000000000"),
    (messages.get_registers(1), 13, "0100 0000 00000000  0000 0000 00000000"),
    (
        messages.get_registers(1, [0x10, 0xC0000080]),
        13,
        "0100 0000 00000000  0200 0000 00000000  10000000 800000c0",
    ),
    (
        messages.set_registers(4, REGISTERS),
        14,
        "0400 0000 00000000" + "".join(f"{n:02x}00000000000000" for n in range(1, 19)),
    ),
    (messages.read_physical(0x1FF0, 16), 17, "f01f000000000000 1000000000000000"),
    (messages.write_physical(0x2000, b"\xde\xad"), 18, "0020000000000000 0200000000000000 dead"),
    (messages.control_cmd_response(False, True), 27, "00 01 0000 00000000"),
    (messages.control_cmd_response(True, False), 27, "01 00 0000 00000000"),
    (messages.max_gfn(), 29, ""),
]


@pytest.mark.parametrize(("request_", "command", "payload"), REQUESTS)
def test_a_command_has_the_bytes_of_the_protocol(request_, command, payload):
    assert request_.command == command
    assert request_.payload == bytes.fromhex(payload)


def test_every_command_that_has_a_layout_has_a_vector():
    without_layout = {Command.EVENT_REPLY, Command.EVENT, Command.CONTROL_VE, Command.GET_MAP_TOKEN, *range(24, 27)}
    assert {number for _, number, _ in REQUESTS} == set(Command) - without_layout


def test_a_message_is_id_size_seq_and_payload():
    seq, answered, data = Connection().command(messages.check_event(1))
    assert (seq, answered) == (1, True)
    assert data == bytes.fromhex("0400 0800 01000000" + "0100 0000 00000000")


def test_the_commands_of_a_session_count_from_one():
    connection = Connection()
    assert [connection.command(messages.max_gfn())[0] for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("request_", "answer", "meaning"),
    [
        (messages.check_command(17), "", None),
        (messages.check_event(1), "", None),
        (messages.pause_vcpu(0), "", None),
        (messages.control_vm_events(0, True), "", None),
        (messages.control_events(0, 1, True), "", None),
        (messages.set_registers(0, REGISTERS), "", None),
        (messages.write_physical(0, b"x"), "", None),
        (messages.control_cmd_response(True, True), "", None),
        (messages.guest_info(), "04000000 00000000 00000000 00000000", 4),
        (messages.vcpu_info(0), "00ca9a3b00000000", 1_000_000_000),
        (messages.read_physical(0, 3), "010203", b"\x01\x02\x03"),
        (messages.max_gfn(), "ffff0f0000000000", 0xFFFFF),
        (messages.max_gfn(), "ffff0f0000000000 77", 0xFFFFF),
        (messages.control_cr(0, 3, True), "", None),
        (messages.control_msr(0, 0x174, True), "", None),
        (messages.cpuid(0, 1), "01000000 02000000 03000000 04000000", (1, 2, 3, 4)),
        (messages.xsave(0), "ab" * 4096, b"\xab" * 4096),
        (messages.xsave(0), "ab" * 5000, b"\xab" * 5000),
        (messages.inject_exception(0, 6), "", None),
        (messages.page_access([0, 0x1000]), "0705", (Access.ALL, Access.R | Access.X)),
        (messages.page_access([0]), "00 00000000000000", (Access.NONE,)),
        (messages.set_page_access({0: 7}), "", None),
        (messages.mtrr_type(0), "06 00000000000000", MemoryType.WRITE_BACK),
        (messages.mtrr_type(0), "00 00000000000000", MemoryType.UNCACHEABLE),
        (messages.raw(61, b""), "cafe", b"\xca\xfe"),
    ],
)
def test_an_answer_means_what_the_protocol_says(request_, answer, meaning):
    assert request_.decode(bytes.fromhex(answer)) == meaning


def test_the_registers_answer_is_mode_regs_sregs_and_msrs():
    answer = bytes.fromhex("08000000 00000000")
    answer += b"".join(n.to_bytes(8, "little") for n in range(1, 19))
    answer += bytes(312)
    answer += bytes.fromhex("02000000 00000000")
    answer += bytes.fromhex("800000c0 00000000 010d000000000000")
    answer += bytes.fromhex("77020000 00000000 0607050407060504")
    state = messages.get_registers(0, [0xC0000080, 0x277]).decode(answer)
    assert state.mode == 8
    assert state.registers == REGISTERS
    assert state.sregs.cr3 == 0
    assert state.msrs == {0xC0000080: 0xD01, 0x277: 0x0405060704050706}


@pytest.mark.parametrize(
    ("request_", "answer", "field"),
    [
        (messages.guest_info(), "040000", "vcpu_count"),
        (messages.vcpu_info(0), "00000000", "tsc_speed"),
        (messages.max_gfn(), "", "gfn"),
        (messages.read_physical(0, 4), "000000", "the bytes"),
        (messages.get_registers(0), "0800", "mode"),
        (messages.cpuid(0, 1), "01000000 02000000 03000000", "edx"),
        (messages.xsave(0), "ab" * 4095, "region"),
        (messages.page_access([0, 0x1000]), "07", r"access\[2\]"),
        (messages.mtrr_type(0), "", "type"),
        (messages.get_registers(0), "08000000 00000000 00", "regs"),
        (messages.get_registers(0), "00" * 200, "sregs"),
        (messages.get_registers(0), "00" * 464, "nmsrs"),
        (messages.get_registers(0), "00" * 464 + "01000000 00000000", "entries"),
    ],
)
def test_a_short_answer_names_the_field_that_is_missing(request_, answer, field):
    with pytest.raises(ProtocolError, match=field):
        request_.decode(bytes.fromhex(answer))


@pytest.mark.parametrize(("gpa", "size"), [(0, 0), (0, 4097), (0xFFF, 2), (0x1001, 4096)])
def test_a_range_that_leaves_its_page_is_refused_before_it_is_sent(gpa, size):
    with pytest.raises(ValueError, match="within one page"):
        messages.read_physical(gpa, size)
    with pytest.raises(ValueError, match="within one page"):
        messages.write_physical(gpa, bytes(size))


def test_a_memory_type_that_there_is_not_breaks_the_session():
    with pytest.raises(ProtocolError, match="no memory type 3"):
        messages.mtrr_type(0).decode(bytes([3]) + bytes(7))


def test_a_message_holds_so_many_pages_and_no_more():
    assert len(messages.page_access([0] * 1022).payload) == 8184
    assert len(messages.set_page_access(dict.fromkeys(range(511), 7)).payload) == 8184
    with pytest.raises(ValueError, match="1023 pages do not fit"):
        messages.page_access([0] * 1023)
    with pytest.raises(ValueError, match="512 pages do not fit"):
        messages.set_page_access(dict.fromkeys(range(512), 7))


def test_a_vcpu_event_is_not_switched_for_the_vm():
    with pytest.raises(ValueError, match="per vCPU"):
        messages.control_vm_events(1, True)


def test_a_payload_that_no_message_can_hold_is_refused():
    with pytest.raises(ValueError, match="8184"):
        messages.raw(18, bytes(8177), vcpu=0)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (-1, "-EPERM"),
        (-2, "-ENOENT"),
        (-11, "-EAGAIN"),
        (-12, "-ENOMEM"),
        (-14, "-EFAULT"),
        (-16, "-EBUSY"),
        (-22, "-EINVAL"),
        (-95, "-EOPNOTSUPP"),
        (-5, "-5"),
    ],
)
def test_a_refusal_names_the_command_and_the_code(code, name):
    with pytest.raises(CommandError, match=f"^get-max-gfn: {name}") as caught:
        Answer(Command.GET_MAX_GFN, 1, code, b"").result()
    assert caught.value.code == code
    assert caught.value.command is Command.GET_MAX_GFN


# -- the state machine


def answer(command, seq, error="00000000", data=""):
    payload = bytes.fromhex(error + "00000000" + data)
    return command.to_bytes(2, "little") + len(payload).to_bytes(2, "little") + seq.to_bytes(4, "little") + payload


def test_an_answer_is_matched_by_seq_in_any_order():
    connection = Connection()
    connection.command(messages.max_gfn())
    connection.command(messages.guest_info())
    connection.receive_data(answer(5, 2) + answer(29, 1))
    assert connection.next_message() == Answer(5, 2, 0, b"")
    assert connection.next_message() == Answer(29, 1, 0, b"")
    assert connection.next_message() is None


@pytest.mark.parametrize("message", [answer(2, 1), answer(29, 2), answer(0, 1), answer(29, 0)])
def test_an_answer_that_nobody_asked_for_breaks_the_session(message):
    connection = Connection()
    connection.command(messages.max_gfn())
    connection.receive_data(message)
    with pytest.raises(ProtocolError, match="nobody asked"):
        connection.next_message()
    with pytest.raises(ProtocolError, match="broken"):
        connection.next_message()
    with pytest.raises(ProtocolError, match="broken"):
        connection.receive_data(b"x")


def test_an_answer_comes_once():
    connection = Connection()
    connection.command(messages.max_gfn())
    connection.receive_data(answer(29, 1) * 2)
    connection.next_message()
    with pytest.raises(ProtocolError, match="nobody asked"):
        connection.next_message()


def test_an_answer_without_room_for_an_error_code_breaks_the_session():
    connection = Connection()
    connection.command(messages.max_gfn())
    connection.receive_data(bytes.fromhex("1d00 0400 01000000 00000000"))
    with pytest.raises(ProtocolError, match="error code"):
        connection.next_message()


def test_with_answers_off_now_neither_that_command_nor_the_next_is_answered():
    connection = Connection()
    assert connection.command(messages.control_cmd_response(False, now=True))[1] is False
    assert connection.command(messages.control_cr(0, 3, True))[1] is False
    assert connection.command(messages.control_cmd_response(True, now=True))[1] is True


def test_with_answers_off_from_the_next_command_that_command_is_answered():
    connection = Connection()
    assert connection.command(messages.control_cmd_response(False, now=False))[1] is True
    assert connection.command(messages.control_cr(0, 3, True))[1] is False
    assert connection.command(messages.control_cmd_response(True, now=False))[1] is False
    assert connection.command(messages.control_cr(0, 3, True))[1] is True


def test_a_refusal_comes_even_with_answers_off():
    connection = Connection()
    connection.command(messages.control_cmd_response(False, now=True))
    connection.command(messages.raw(61))
    connection.receive_data(answer(61, 2, "a1ffffff"))
    assert connection.next_message() == Answer(61, 2, -95, b"")


def test_answers_stay_on_when_switching_them_off_was_refused():
    connection = Connection()
    connection.command(messages.control_cmd_response(False, now=False))
    connection.receive_data(answer(27, 1, "ffffffff"))
    connection.next_message()
    assert connection.command(messages.max_gfn())[1] is True


def event(seq):
    return frame(1, seq, bytes.fromhex("2002 0300 05 000000") + bytes(536))


def received(*seqs):
    """A connection to which events with these numbers came, each whole."""
    connection = Connection()
    for seq in seqs:
        connection.receive_data(event(seq))
        assert connection.next_message().seq == seq
    return connection


@pytest.mark.parametrize(
    "seqs",
    [(1, 2, 3), (2, 1, 3), (1, 4, 3, 2, 5), (7, 8, 9), (70000, 70001), (0xFFFFFFFE, 0xFFFFFFFF, 0, 1), (1, 4098)],
)
def test_event_numbers_come_once_each_but_for_what_vcpus_overtake(seqs):
    received(*seqs)


@pytest.mark.parametrize(
    ("before", "seq", "why"),
    [
        ((1,), 1, "event 1 for the second time: the last one was 1"),
        ((1, 2, 3), 2, "event 2 for the second time: the last one was 3"),
        ((1, 3, 2), 2, "event 2 for the second time"),
        ((0xFFFFFFFF, 0), 0xFFFFFFFF, "event 4294967295 for the second time: the last one was 0"),
        ((1,), 4099, "event 4099 where 2 is due, more than 4096 skipped"),
        ((1, 4098), 4100, "event 4100 where 4099 is due, more than 4096 skipped"),
    ],
)
def test_a_number_that_came_before_or_leaves_too_many_out_breaks_the_session(before, seq, why):
    connection = received(*before)
    connection.receive_data(event(seq))
    with pytest.raises(ProtocolError, match=why):
        connection.next_message()
    assert connection.state is State.BROKEN


def test_a_peer_that_leaves_every_command_unanswered_does_not_fill_our_memory():
    connection = Connection()
    for _ in range(MAX_UNANSWERED):
        connection.command(messages.max_gfn())
    with pytest.raises(ProtocolError, match="65536 commands unanswered"):
        connection.command(messages.max_gfn())
    assert connection.state is State.BROKEN


def test_the_reply_to_an_event_repeats_its_seq_vcpu_and_kind():
    body = bytes.fromhex("2002 0300 05 000000") + bytes(536)
    event = Event(7, body)
    assert Connection().reply(event) == bytes.fromhex("0000 1000 07000000  0300 0000 00000000  00 05 0000 00000000")
