# SPDX-License-Identifier: LGPL-2.1-or-later
"""Framing holds for any stream: however it is cut, whatever is in it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmi_host.protocol import MAX_PAYLOAD, Connection, Event, Frame, Framer, ProtocolError, State, frame, messages

frames = st.builds(
    Frame,
    id=st.integers(0, 0xFFFF),
    seq=st.integers(0, 0xFFFFFFFF),
    payload=st.binary(max_size=300) | st.just(bytes(MAX_PAYLOAD)),
)


def everything(framer: Framer) -> list[Frame]:
    return list(iter(framer.next_frame, None))


@given(st.lists(frames, max_size=6), st.data())
def test_the_same_messages_come_out_however_the_stream_is_cut(sent, data):
    stream = b"".join(frame(*message) for message in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    framer, received = Framer(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        framer.feed(stream[start:end])
        received += everything(framer)
    assert received == sent
    assert framer.pending == 0


def test_a_message_comes_out_with_its_last_byte_and_not_before():
    framer, message = Framer(), bytes.fromhex("0500 0300 07000000 aabbcc")
    for byte in message[:-1]:
        framer.feed(bytes([byte]))
        assert framer.next_frame() is None
    framer.feed(message[-1:])
    assert framer.next_frame() == Frame(5, 7, b"\xaa\xbb\xcc")


def test_the_largest_size_is_8184():
    framer = Framer()
    framer.feed(bytes.fromhex("0500 f81f 01000000") + bytes(8184))
    assert framer.next_frame() == Frame(5, 1, bytes(8184))


def test_a_larger_size_is_an_error_before_its_bytes_come():
    framer = Framer()
    framer.feed(bytes.fromhex("0500 f91f 01000000"))
    with pytest.raises(ProtocolError, match="8185"):
        framer.next_frame()


def test_a_frame_larger_than_a_message_is_not_made():
    with pytest.raises(ValueError, match="8184"):
        frame(5, 1, bytes(8185))


def drain(connection: Connection) -> None:
    while (message := connection.next_message()) is not None:
        if isinstance(message, Event):
            _ = (message.vcpu, message.event, message.mode, message.rip, message.cr3, message.data, repr(message))
            _ = (message.registers, message.sregs, message.msrs)


garbage = st.lists(st.binary(max_size=700) | st.builds(lambda f: frame(*f), frames), max_size=6)
event_like = st.builds(
    lambda seq, body: frame(1, seq, b"\x20\x02" + body),
    st.integers(0, 0xFFFFFFFF),
    st.binary(min_size=530, max_size=600),
)


@given(garbage | st.lists(event_like, max_size=3))
def test_garbage_raises_nothing_but_protocol_error(pieces):
    connection = Connection()
    connection.command(messages.max_gfn())
    try:
        for piece in pieces:
            if piece:
                connection.receive_data(piece)
                drain(connection)
        connection.receive_data(b"")
        assert connection.state is State.ENDED
    except ProtocolError:
        assert connection.state is State.BROKEN


def test_an_end_between_messages_is_an_end():
    connection = Connection()
    connection.receive_data(b"")
    assert connection.state is State.ENDED
    assert connection.next_message() is None


@given(st.integers(1, 15))
def test_an_end_in_the_middle_of_a_message_is_an_error(length):
    connection = Connection()
    connection.command(messages.max_gfn())
    connection.receive_data(bytes.fromhex("1d00 0800 01000000 00000000 00000000")[:length])
    assert connection.next_message() is None
    with pytest.raises(ProtocolError, match="middle of a message"):
        connection.receive_data(b"")


def test_data_after_the_end_is_a_bug_of_the_caller():
    connection = Connection()
    connection.receive_data(b"")
    with pytest.raises(ValueError, match="after the end"):
        connection.receive_data(b"x")
