# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pages go where they belong, whatever comes between their answers and however the stream is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmi_host.protocol import Command, CommandError, Connection, Event, ProtocolError, frame, messages
from kvmi_host.protocol.pages import PageReads

PAGE = 4096
GPA = 0x7000
EVENT = bytes.fromhex("2002 0000 05 000000 08") + bytes(535)
GOOD, REFUSED, INTERRUPTED = "good", "refused", "an event before it"


def content(page: int) -> bytes:
    return bytes([page + 1]) * PAGE


def answer(seq: int, page: int, error: int = 0) -> bytes:
    data = b"" if error else content(page)
    return frame(Command.READ_PHYSICAL, seq, error.to_bytes(4, "little", signed=True) + bytes(4) + data)


def receive(connection: Connection, reads: PageReads, data: bytes) -> list[Event]:
    """Do with `data` what a session does with what its socket gives, until it has no more or needs no more."""
    events = []
    while data and reads.unanswered:
        if reads.laid_out or reads.resume():
            taken = 0
            for part in reads.room():
                piece = data[taken : taken + len(part)]
                part[: len(piece)] = piece
                taken += len(piece)
            data = data[taken:]
            reads.received(taken)
        else:
            connection.receive_data(data)
            data = b""
        while not reads.laid_out and (message := connection.next_message()) is not None:
            if isinstance(message, Event):
                events.append(message)
            else:
                reads.take(message)
    return events


@given(st.lists(st.sampled_from([GOOD, GOOD, GOOD, REFUSED, INTERRUPTED]), min_size=1, max_size=40), st.data())
def test_pages_events_and_refusals_come_out_however_the_stream_is_cut(fates, data):
    connection, buffer = Connection(), bytearray(b"\xee" * PAGE * len(fates))
    reads = PageReads(connection, GPA, memoryview(buffer))
    stream, sent = b"", 0
    for page, fate in enumerate(fates):
        if fate is INTERRUPTED:
            sent += 1
            stream += frame(Command.EVENT, sent, EVENT)
        stream += answer(1 + page, page, -22 if fate is REFUSED else 0)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    events = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        events += receive(connection, reads, stream[start:end])
    assert reads.unanswered == 0
    assert [event.seq for event in events] == list(range(1, sent + 1))
    for page, fate in enumerate(fates):
        assert buffer[page * PAGE : (page + 1) * PAGE] == (bytes(PAGE) if fate is REFUSED else content(page))
    if REFUSED in fates:
        with pytest.raises(CommandError):
            reads.result()
    else:
        reads.result()
    reads.leave()
    assert connection.next_message() is None
    assert connection.pending == 0


def test_the_commands_are_those_that_read_each_page():
    connection, same = Connection(), Connection()
    reads = PageReads(connection, GPA, memoryview(bytearray(3 * PAGE)))
    expected = [same.command(messages.read_physical(GPA + page * PAGE, PAGE))[2] for page in range(3)]
    assert bytes(reads.commands) == b"".join(expected)
    assert connection.command(messages.max_gfn())[0] == same.command(messages.max_gfn())[0]


def test_seqs_do_not_wrap_within_one_go():
    connection = Connection()
    connection._seq = 0xFFFFFFFE
    reads = PageReads(connection, 0, memoryview(bytearray(2 * PAGE)))
    assert receive(connection, reads, answer(1, 0) + answer(2, 1)) == []
    assert reads.unanswered == 0


def test_what_came_of_an_answer_before_is_no_obstacle():
    connection = Connection()
    seq, _, _ = connection.command(messages.max_gfn())
    late = frame(Command.GET_MAX_GFN, seq, bytes(16))
    connection.receive_data(late[:9])
    reads = PageReads(connection, 0, memoryview(bytearray(PAGE)))
    receive(connection, reads, late[9:] + answer(2, 0))
    assert reads.unanswered == 0


def test_who_gives_up_leaves_the_connection_at_a_messages_beginning():
    connection = Connection()
    reads = PageReads(connection, 0, memoryview(bytearray(2 * PAGE)))
    stream = answer(1, 0) + answer(2, 1)
    receive(connection, reads, stream[:5000])
    reads.leave()
    connection.receive_data(stream[5000:])
    assert connection.next_message().data == content(1)
    assert connection.pending == 0


@pytest.mark.parametrize(
    ("stream", "why"),
    [
        (frame(Command.READ_PHYSICAL, 7, bytes(8 + PAGE)), "nobody asked"),
        (answer(2, 1) + answer(1, 0) + answer(1, 0), "nobody asked"),
        (frame(Command.READ_PHYSICAL, 1, bytes(8 + PAGE - 1)), "the bytes"),
        (frame(Command.GET_MAX_GFN, 1, bytes(16)), "nobody asked"),
        (bytes.fromhex("1100 ffff 01000000 00000000 00000000"), "65535"),
    ],
)
def test_what_is_no_answer_is_a_protocol_error(stream, why):
    connection = Connection()
    reads = PageReads(connection, 0, memoryview(bytearray(3 * PAGE)))
    with pytest.raises(ProtocolError, match=why):
        receive(connection, reads, stream)


def test_answers_out_of_order_find_their_pages():
    connection, buffer = Connection(), bytearray(3 * PAGE)
    reads = PageReads(connection, 0, memoryview(buffer))
    receive(connection, reads, answer(2, 1) + answer(1, 0) + answer(3, 2))
    assert buffer == content(0) + content(1) + content(2)


def test_with_the_answers_off_nothing_can_be_read():
    connection = Connection()
    connection.command(messages.control_cmd_response(False, now=True))
    with pytest.raises(ValueError, match="switched off"):
        PageReads(connection, 0, memoryview(bytearray(PAGE)))
