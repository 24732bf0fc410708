# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the compiled round trip does itself is what Python does, and it leaves the rest to it."""

import signal
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmi_host.introspect import Session
from kvmi_host.introspect.roundtrip import event_in
from kvmi_host.protocol import Action, Connection, Event, EventId, ProtocolError, frame

OWN = {EventId.CR: 24, EventId.MSR: 24, EventId.BREAKPOINT: 16, EventId.PF: 24, EventId.TRAP: 24, EventId.DESCRIPTOR: 8}


def body(kind: int, own: bytes = b"", vcpu: int = 3, size: int = 544) -> bytes:
    """``kvmi_event`` in 64-bit mode, and own data."""
    return (
        size.to_bytes(2, "little") + vcpu.to_bytes(2, "little") + bytes([kind, 0, 0, 0, 8]).ljust(size - 4, b"\0") + own
    )


def of_kind(kind: int) -> bytes:
    return body(kind, bytes(range(1, OWN.get(kind, 0) + 1)))


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Session]]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(10.0)
    with theirs, Session(ours, timeout=10.0) as session:
        yield theirs, session


@pytest.mark.parametrize("kind", range(14))
def test_every_kind_of_event_is_received_as_it_was_sent(ends, kind):
    peer, session = ends
    peer.sendall(frame(1, 0xFFFFFFFF, of_kind(kind)))
    event = session.next_event()
    assert type(event) is Event
    assert (event.seq, event.vcpu, event.event, event.mode) == (0xFFFFFFFF, 3, kind, 8)
    assert type(event.event) is type(Event(1, of_kind(kind)).event)
    assert event.body == of_kind(kind)


@pytest.mark.parametrize("action", [*Action, 255])
@pytest.mark.parametrize("kind", range(1, 14))
def test_the_reply_has_the_bytes_that_the_protocol_gives_it(ends, kind, action):
    peer, session = ends
    event = Event(0xFFFFFFFF, of_kind(kind))
    session.reply(event, action)
    expected = Connection().reply(event, action)
    assert peer.recv(len(expected), socket.MSG_WAITALL) == expected


def test_the_new_value_is_found_behind_a_longer_common_part(ends):
    peer, session = ends
    peer.sendall(frame(1, 1, body(EventId.CR, bytes(16) + b"new-val!", size=600)))
    session.reply(session.next_event())
    assert peer.recv(32, socket.MSG_WAITALL).endswith(b"new-val!")


@pytest.mark.parametrize("cut", [1, 8, 100, 551])
def test_an_event_may_come_in_pieces(ends, cut):
    peer, session = ends
    message = frame(1, 1, body(EventId.HYPERCALL))
    peer.sendall(message[:cut])
    assert session.next_event(0) is None
    peer.sendall(message[cut:] + frame(1, 2, body(EventId.HYPERCALL)))
    assert [session.next_event().seq, session.next_event().seq] == [1, 2]
    peer.sendall(frame(1, 3, body(EventId.HYPERCALL)))
    assert session.next_event().seq == 3


events = st.builds(
    lambda seq, kind, vcpu, size, own: frame(1, seq, body(kind, own, vcpu, size)),
    st.integers(0, 0xFFFFFFFF),
    st.integers(0, 255),
    st.integers(0, 0xFFFF),
    st.just(544) | st.integers(540, 560),
    st.binary(max_size=40),
)


@given(events | st.binary(max_size=600) | st.builds(bytes.__add__, events, st.binary(max_size=9)))
def test_what_is_taken_for_an_event_is_exactly_what_the_protocol_takes_for_one(data):
    connection = Connection()
    connection.receive_data(data or b"\0")
    try:
        message = connection.next_message()
    except ProtocolError:
        message = None
    alone = isinstance(message, Event) and not connection.pending
    taken = event_in(memoryview(data + b"more"), len(data))
    if taken is not None:
        assert alone
        assert (type(taken), taken) == (Event, message)
    elif alone:
        assert message.body[:2] != b"\x20\x02"  # a longer common part is left to Python


def test_a_wait_is_not_made_longer_by_signals(ends):
    _, session = ends
    seen, over, main = [], threading.Event(), threading.main_thread().ident
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))

    def disturb():
        while not over.wait(0.005):
            signal.pthread_kill(main, signal.SIGUSR1)

    disturber = threading.Thread(target=disturb)
    disturber.start()
    try:
        assert session.next_event(0.2) is None
    finally:
        over.set()
        disturber.join()
        signal.signal(signal.SIGUSR1, before)
    assert seen


def test_a_signal_handler_that_raises_ends_the_wait(ends):
    _, session = ends

    class Stopped(Exception):
        pass

    def stop(number, frame):
        raise Stopped

    before = signal.signal(signal.SIGUSR1, stop)
    killer = threading.Thread(target=signal.pthread_kill, args=(threading.main_thread().ident, signal.SIGUSR1))

    def wait():
        killer.start()
        session.next_event()

    try:
        with pytest.raises(Stopped):
            wait()
    finally:
        killer.join()
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(
    "fields",
    [
        (),
        (1, 0, EventId.CR, 8, b""),
        (1, 0, EventId.CR, 8, b"\xff\xff" + bytes(600)),
        (1, 0, EventId.CR, 8, None),
        (1, 0x10000, EventId.HYPERCALL, 8, bytes(544)),
        (-1, 0, EventId.HYPERCALL, 8, bytes(544)),
    ],
)
def test_an_event_that_was_put_together_wrong_has_no_reply_or_a_short_one(ends, fields):
    peer, session = ends
    with suppress(ValueError, TypeError, IndexError, struct.error):
        session.reply(tuple.__new__(Event, fields))
        assert len(peer.recv(100)) == 24


@pytest.mark.parametrize("wrong", [(1, 2), ("event",), (None, None, None, None)])
def test_wrong_arguments_are_type_errors(ends, wrong):
    _, session = ends
    with pytest.raises(TypeError):
        session.next_event(*wrong)


def test_arguments_may_be_named(ends):
    peer, session = ends
    assert session.next_event(timeout=0) is None
    peer.sendall(frame(1, 1, body(EventId.HYPERCALL)))
    session.reply(event=session.next_event(timeout=5), action=Action.CRASH)
    assert peer.recv(24, socket.MSG_WAITALL)[16] == Action.CRASH


def test_no_wait_is_too_long(ends):
    peer, session = ends
    peer.sendall(frame(1, 1, body(EventId.HYPERCALL)) + frame(1, 2, body(EventId.HYPERCALL)))
    assert session.next_event(float("inf")).seq == 1
    assert session.next_event(1e300).seq == 2


def test_an_event_that_comes_again_is_seen_however_it_is_received(ends):
    peer, session = ends
    for seq in (1, 2, 3):
        peer.sendall(frame(1, seq, body(EventId.HYPERCALL)))
        assert session.next_event(1).seq == seq
    peer.sendall(frame(1, 2, body(EventId.HYPERCALL)))
    with pytest.raises(ProtocolError, match="event 2 for the second time: the last one was 3"):
        session.next_event(1)


def test_numbers_are_counted_on_when_a_command_comes_between(ends):
    peer, session = ends
    for seq in (1, 2):
        peer.sendall(frame(1, seq, body(EventId.HYPERCALL)))
        assert session.next_event(1).seq == seq
    peer.sendall(frame(5, 1, bytes(8 + 16)) + frame(1, 3, body(EventId.HYPERCALL)))
    assert session.guest_info() == 0
    assert session.next_event(1).seq == 3
    peer.sendall(frame(1, 4, body(EventId.HYPERCALL)))
    assert session.next_event(1).seq == 4
