# SPDX-License-Identifier: LGPL-2.1-or-later
"""Peers that mean no good: each ends in an error that says what happened, in bounded memory, and no other session of
the process notices."""

from __future__ import annotations

import gc
import socket
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from kvmi_host.introspect import Session, SessionClosed, SessionTimeout
from kvmi_host.introspect.session import MAX_WAITING_EVENTS
from kvmi_host.protocol import MAX_PAYLOAD, Command, EventId, KvmiError, ProtocolError, frame
from kvmi_host.protocol.connection import MAX_SKIPPED
from kvmi_host.testing.peer import SimulatedKernel, next_reply

MIB = 1 << 20
FEW_MESSAGES = MIB // 2
"""What a session holds of a peer that it has not asked for anything: a chunk of its socket, and parts of messages."""
EVENTS = MAX_WAITING_EVENTS * (MAX_PAYLOAD + 200)
"""What the largest events take, one for each vCPU that there can be: 34 MiB."""
MUCH = bytes(16 * MIB)
"""More than any socket holds."""
BODY = bytes.fromhex("2002 0000 05 000000 08") + bytes(535)


def event(seq: int, size: int = len(BODY)) -> bytes:
    return frame(Command.EVENT, seq, BODY.ljust(size, b"\xee"))


def answer(command: int, seq: int, data: bytes = b"") -> bytes:
    return frame(command, seq, bytes(8) + data)


class Peer:
    """The other end of a session, and what it sends from a thread of its own for as long as anybody reads."""

    def __init__(self) -> None:
        ours, self.sock = socket.socketpair()
        self.session = Session(ours, timeout=0.2)
        self._sender: threading.Thread | None = None

    def floods_with(self, stream: Iterator[bytes]) -> None:
        """Send all of it, unless the session is closed before."""

        def send() -> None:
            with suppress(OSError):
                for data in stream:
                    self.sock.sendall(data)

        self._sender = threading.Thread(target=send, daemon=True)
        self._sender.start()

    def close(self) -> None:
        self.session.close()
        if self._sender:
            self._sender.join(10)
            assert not self._sender.is_alive()
        self.sock.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


@pytest.fixture(autouse=True)
def neighbour() -> Iterator[tuple[SimulatedKernel, Session]]:
    """Another session of this process, with an event that waits all the while. It has to be as it was."""
    ours, kernels = socket.socketpair()
    with kernels, SimulatedKernel(kernels) as kernel, Session(ours, timeout=10.0) as session:
        replies = kernel.fire(EventId.HYPERCALL)
        session.guest_info()
        yield kernel, session
        assert session.waiting == 1
        told = session.next_event()
        assert told is not None
        assert (told.seq, told.event) == (1, EventId.HYPERCALL)
        session.reply(told)
        assert next_reply(replies) is not None
        assert session.guest_info() == 1


@contextmanager
def within(limit: int) -> Iterator[None]:
    """No more than so many bytes are allocated at any moment of the block, beyond those from before."""
    gc.collect()
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= limit, f"{peak} bytes"


# -- that stall


@pytest.mark.parametrize("part", [b"", event(1)[:3], event(1)[:8], event(1)[:100]], ids=len)
def test_a_peer_that_stalls_is_a_timeout_that_names_the_command(peer: Peer, part: bytes) -> None:
    peer.sock.sendall(part)
    with pytest.raises(SessionTimeout, match=r"get-max-gfn: no answer in 0\.2 s"):
        peer.session.max_gfn()


@pytest.mark.parametrize("part", [3, 8, 100])
def test_a_peer_that_goes_on_after_a_stall_has_lost_nothing(peer: Peer, part: int) -> None:
    whole = event(1)
    peer.sock.sendall(whole[:part])
    assert peer.session.next_event(0.01) is None
    peer.sock.sendall(whole[part:])
    told = peer.session.next_event()
    assert told is not None
    assert told.seq == 1


def test_a_peer_that_sends_byte_by_byte_is_heard(peer: Peer) -> None:
    peer.session.timeout = 10.0
    peer.floods_with(bytes([byte]) for byte in event(1) + answer(Command.GET_MAX_GFN, 1, bytes(8)))
    with within(FEW_MESSAGES):
        assert peer.session.max_gfn() == 0
    assert peer.session.waiting == 1


def test_a_peer_that_never_answers_is_a_timeout_each_time(peer: Peer) -> None:
    peer.session.timeout = 0.0
    with within(FEW_MESSAGES):
        for _ in range(1000):
            with pytest.raises(SessionTimeout):
                peer.session.max_gfn()


# -- that lie about sizes


def test_a_size_that_no_message_has_is_refused_before_its_bytes_come(peer: Peer) -> None:
    peer.floods_with(iter([bytes.fromhex("0100 ffff 01000000"), *[bytes(65536)] * 100]))
    with within(FEW_MESSAGES), pytest.raises(ProtocolError, match="announces 65535 bytes, more than the 8184 allowed"):
        peer.session.next_event()


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (frame(1, 1, BODY[:100]), "100 bytes of kvmi_event, too few for its field 'regs'"),
        (frame(1, 1, b"\xff\xff" + BODY[2:]), "ends before its field 'size'"),
        (frame(1, 1, b"\x00\x00" + BODY[2:]), "too few for its field 'size'"),
        (frame(1, 1, BODY[:4] + b"\x01" + BODY[5:]), "ends before its field 'cr'"),
        (frame(1, 1, b""), "too few for its field 'size'"),
    ],
)
def test_an_event_that_lies_about_its_size_names_what_is_missing(peer: Peer, said: bytes, why: str) -> None:
    peer.sock.sendall(said)
    with pytest.raises(ProtocolError, match=why):
        peer.session.next_event()


def test_a_list_that_is_not_there_is_not_made_room_for(peer: Peer) -> None:
    # GET_REGISTERS answers with 0xffffffff MSRs.
    peer.sock.sendall(answer(Command.GET_REGISTERS, 1, bytes(464) + b"\xff" * 8))
    with within(FEW_MESSAGES), pytest.raises(ProtocolError, match=r"end before 'msrs.entries\[4294967295\]'"):
        peer.session.get_registers(0)


# -- that lie about numbers


def test_an_event_that_comes_again_is_refused(peer: Peer) -> None:
    peer.sock.sendall(event(1) + event(2) + event(1))
    assert [peer.session.next_event().seq for _ in range(2)] == [1, 2]  # type: ignore[union-attr]
    with pytest.raises(ProtocolError, match="event 1 for the second time: the last one was 2"):
        peer.session.next_event()


def test_event_numbers_with_gaps_are_refused_when_no_vcpu_can_be_late_with_them(peer: Peer) -> None:
    peer.floods_with(event(seq) for seq in range(1, 1 << 30, 2))
    with within(2 * FEW_MESSAGES):
        for _ in range(MAX_SKIPPED + 1):
            assert peer.session.next_event(5.0)
        with pytest.raises(ProtocolError, match="more than 4096 skipped in all: events are lost"):
            peer.session.next_event(5.0)


def test_an_answer_that_comes_again_is_refused(peer: Peer) -> None:
    peer.sock.sendall(answer(Command.GET_MAX_GFN, 1, bytes(8)) * 2)
    assert peer.session.max_gfn() == 0
    with pytest.raises(ProtocolError, match="an answer of get-max-gfn with seq 1 that nobody asked for"):
        peer.session.next_event()


# -- that answer what was never asked


@pytest.mark.parametrize(
    "said",
    [answer(Command.GET_MAX_GFN, 1), answer(Command.GET_VERSION, 77), frame(61, 0), frame(0, 1), frame(0xFFFF, 1)],
    ids=["no command sent", "another number", "no such command", "a reply", "an id that there is not"],
)
def test_an_answer_to_nothing_is_refused(peer: Peer, said: bytes) -> None:
    peer.sock.sendall(said)
    with pytest.raises(ProtocolError, match="that nobody asked for"):
        peer.session.next_event()


def test_an_answer_to_another_command_is_refused(peer: Peer) -> None:
    peer.sock.sendall(answer(Command.GET_VERSION, 1, bytes(8)))
    with pytest.raises(ProtocolError, match="an answer of get-version with seq 1 that nobody asked for"):
        peer.session.max_gfn()


# -- that flood


def test_events_instead_of_an_answer_are_kept_up_to_one_for_each_vcpu_that_there_can_be(peer: Peer) -> None:
    peer.session.timeout = 30.0
    peer.floods_with(event(seq, MAX_PAYLOAD) for seq in range(1, 1 << 30))
    with within(EVENTS + FEW_MESSAGES), pytest.raises(ProtocolError, match="4097 events without waiting for a reply"):
        peer.session.guest_info()
    assert peer.session.closed


def test_events_that_nobody_takes_stay_in_the_socket(peer: Peer) -> None:
    peer.floods_with(event(seq, MAX_PAYLOAD) for seq in range(1, 1 << 30))
    with within(FEW_MESSAGES):
        for seq in range(1, 501):
            told = peer.session.next_event(5.0)
            assert told is not None
            assert told.seq == seq


def test_answers_without_end_are_refused_at_the_first_that_was_not_asked_for(peer: Peer) -> None:
    peer.floods_with(answer(Command.GET_MAX_GFN, seq, bytes(8000)) for seq in range(1, 1 << 30))
    with within(FEW_MESSAGES):
        assert peer.session.max_gfn() == 0
        with pytest.raises(ProtocolError, match="seq 2 that nobody asked for"):
            peer.session.next_event()


def test_a_peer_that_does_not_read_is_a_timeout(peer: Peer) -> None:
    with within(FEW_MESSAGES), pytest.raises(SessionTimeout, match=r"the peer has not read for 0\.2 s"):
        peer.session.send_raw(MUCH)


# -- that break off, and that never spoke


@pytest.mark.parametrize("part", [1, 7, 8, 100])
def test_a_peer_that_closes_in_the_middle_of_a_message_is_told_from_one_that_ends(peer: Peer, part: int) -> None:
    peer.sock.sendall(event(1)[:part])
    peer.sock.close()
    with pytest.raises(ProtocolError, match=f"closed in the middle of a message, after {part} bytes of it"):
        peer.session.next_event()


def test_a_peer_that_closes_between_messages_has_ended_the_session(peer: Peer) -> None:
    peer.sock.sendall(event(1))
    peer.sock.close()
    assert peer.session.next_event() is not None
    with pytest.raises(SessionClosed, match="the session has ended"):
        peer.session.next_event()


@pytest.mark.parametrize(
    "said",
    [b"SSH-2.0-OpenSSH_9.2p1\r\n", b"GET / HTTP/1.1\r\n\r\n", bytes(64), b"\xff" * 64],
    ids=lambda said: said[:4],
)
def test_what_is_no_session_is_refused(peer: Peer, said: bytes) -> None:
    peer.sock.sendall(said)
    with pytest.raises(ProtocolError):
        peer.session.next_event()


@pytest.mark.parametrize("use", [Session.max_gfn, Session.next_event], ids=["a command", "an event"])
def test_after_a_lie_nothing_is_believed(peer: Peer, use: Callable[[Session], object]) -> None:
    peer.sock.sendall(bytes(8))
    for session_use in (Session.next_event, use):
        with pytest.raises(KvmiError):
            session_use(peer.session)
    peer.sock.sendall(event(1))
    with pytest.raises(ProtocolError, match="the session is broken: close it"):
        use(peer.session)
