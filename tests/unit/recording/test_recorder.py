# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a session says is in its recording, all of it, and no later than the next message."""

import errno
import io
import os
import stat
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmi_host.protocol import Command, EventId, MsrWrite, frame
from kvmi_host.recording import Message, Note, Recorder, RecordingFailed, read_recording
from kvmi_host.testing.peer import SimulatedKernel, next_reply

MESSAGES = [frame(Command.GET_VERSION, 1), frame(Command.GET_GUEST_INFO, 2, bytes(24)), frame(1, 3, b"x" * 8184)]
MSR_WRITE = bytes.fromhex("820000c0 00000000 0100000000000000 0200000000000000")


def read(path: Path) -> list[Message | Note]:
    with path.open("rb") as file:
        return list(read_recording(file))


def data_of(items: list[Message | Note], *, sent: bool) -> list[bytes]:
    return [item.data for item in items if isinstance(item, Message) and item.sent == sent]


def test_a_sessions_messages_are_in_it_in_order_with_their_direction(pair, tmp_path):
    path = tmp_path / "r"
    with Recorder(path, "web") as recorder:
        kernel, session = pair(tap=recorder.tap)
        session.get_version()
        kernel.fire(EventId.MSR, own=MSR_WRITE)
        event = session.next_event()
        session.reply(event)
        session.close()
    ids = [(m.sent, int.from_bytes(m.data[:2], "little")) for m in read(path)]
    assert ids == [(True, Command.GET_VERSION), (False, Command.GET_VERSION), (False, Command.EVENT), (True, 0)]
    assert read(path)[2].data[8 + 544 :] == MSR_WRITE
    assert event.data == MsrWrite(0xC0000082, 1, 2)


def test_nothing_crosses_the_socket_unrecorded(pair, tmp_path, monkeypatch):
    sent, received = [], []
    send, take = SimulatedKernel._send, SimulatedKernel._message
    monkeypatch.setattr(SimulatedKernel, "_send", lambda self, data: (sent.append(data), send(self, data)))
    monkeypatch.setattr(
        SimulatedKernel, "_message", lambda self, *message: (received.append(message), take(self, *message))
    )
    with Recorder(tmp_path / "r", "web") as recorder:
        kernel, session = pair(tap=recorder.tap)
        for gpa in range(0, 4 * 4096, 4096):
            session.write_physical(gpa, bytes(4096))
            session.read_physical(gpa, 4096)
        for kind, own in ((EventId.MSR, MSR_WRITE), (EventId.HYPERCALL, b"")):
            for new_val in (None, 7) if kind == EventId.MSR else (None,):
                replies = kernel.fire(kind, own=own)
                session.reply(session.next_event(), new_val=new_val)
                next_reply(replies)
        kernel.fire(EventId.HYPERCALL)
        session.get_version()  # an event is received while its answer is awaited
        session.control_cmd_response(False)
        session.control_cmd_response(True)
    recorded = read(tmp_path / "r")
    assert data_of(recorded, sent=False) == sent
    assert data_of(recorded, sent=True) == [frame(*message) for message in received]


def test_its_times_do_not_run_backwards(pair, tmp_path):
    with Recorder(tmp_path / "r", "web") as recorder:
        _, session = pair(tap=recorder.tap)
        for _ in range(10):
            session.get_version()
    times = [m.time_ns for m in read(tmp_path / "r")]
    assert len(times) == 20
    assert times == sorted(times)


@given(cuts=st.lists(st.integers(0, sum(map(len, MESSAGES))), max_size=8), sent=st.booleans())
def test_messages_are_found_whatever_pieces_they_come_in(tmp_path_factory, cuts, sent):
    stream = b"".join(MESSAGES)
    path = tmp_path_factory.mktemp("r") / "r"
    edges = [0, *sorted(cuts), len(stream)]
    with Recorder(path, "web") as recorder:
        for start, end in pairwise(edges):
            recorder.tap(sent, stream[start:end])
    assert data_of(read(path), sent=sent) == MESSAGES


def test_what_is_no_message_is_recorded_as_it_came(tmp_path):
    rubbish = b"\x02\0\xff\xff\0\0\0\0 and more"
    with Recorder(tmp_path / "r", "web") as recorder:
        recorder.tap(False, MESSAGES[0] + rubbish)
    assert data_of(read(tmp_path / "r"), sent=False) == [MESSAGES[0], rubbish]
    assert [m.whole for m in read(tmp_path / "r")] == [True, False]


def test_half_a_message_at_the_end_is_recorded(tmp_path):
    with Recorder(tmp_path / "r", "web") as recorder:
        recorder.tap(False, MESSAGES[1][:20])
        assert read(tmp_path / "r") == []
    assert data_of(read(tmp_path / "r"), sent=False) == [MESSAGES[1][:20]]


def test_each_message_is_in_the_file_at_once_and_by_one_write(tmp_path, monkeypatch):
    writes = []
    write = os.write

    def count(fd, data):
        writes.append(len(data))
        return write(fd, data)

    with Recorder(tmp_path / "r", "web") as recorder:
        monkeypatch.setattr(os, "write", count)
        for number in (1, 2, 3):
            recorder.tap(True, MESSAGES[0])
            assert (len(writes), len(read(tmp_path / "r"))) == (number, number)


def test_notes_are_between_the_messages(tmp_path):
    with Recorder(tmp_path / "r", "web") as recorder:
        recorder.tap(True, MESSAGES[0])
        recorder.note({"session": {"name": "grün"}})
        recorder.tap(True, MESSAGES[0])
    kinds = [type(item) for item in read(tmp_path / "r")]
    assert kinds == [Message, Note, Message]
    assert read(tmp_path / "r")[1].content == {"session": {"name": "grün"}}


def test_the_time_of_an_event_is_the_recorded_one(pair, tmp_path):
    with Recorder(tmp_path / "r", "web") as recorder:
        kernel, session = pair(tap=recorder.tap)
        kernel.fire(EventId.HYPERCALL)
        event = session.next_event()
        time = recorder.time_of(event)
        session.reply(event)
    assert read(tmp_path / "r")[0].time_ns == time


def test_times_of_events_that_nobody_replies_to_do_not_pile_up(tmp_path):
    with Recorder(tmp_path / "r", "web") as recorder:
        for seq in range(20_000):
            recorder.tap(False, frame(Command.EVENT, seq))
        assert len(recorder._times) <= 8192


def test_nobody_else_can_read_it(tmp_path):
    with Recorder(tmp_path / "r", "web"):
        assert stat.S_IMODE((tmp_path / "r").stat().st_mode) == 0o600


def test_what_is_there_already_is_not_overwritten(tmp_path):
    path = tmp_path / "r"
    path.write_text("precious")
    with pytest.raises(RecordingFailed, match="is there already"):
        Recorder(path, "web")
    assert path.read_text() == "precious"


def test_no_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecordingFailed):
        Recorder(tmp_path / "link", "web")
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(RecordingFailed, match="No such file or directory"):
        Recorder(tmp_path / "nowhere" / "r", "web")


def test_a_recording_of_nothing_leaves_no_file(tmp_path):
    Recorder(tmp_path / "r", "web").close()
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_that_someone_reads_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with Recorder(tmp_path / "pipe", "web") as recorder:
        recorder.tap(True, MESSAGES[0])
    received = os.read(reading, 65536)
    os.close(reading)
    assert data_of(list(read_recording(io.BytesIO(received))), sent=True) == [MESSAGES[0]]
    assert (tmp_path / "pipe").is_fifo()


def test_a_full_disk_ends_it_with_all_before_whole(tmp_path, monkeypatch):
    with Recorder(tmp_path / "r", "web") as recorder:
        recorder.tap(True, MESSAGES[0])
        with monkeypatch.context() as full:
            full.setattr(os, "write", lambda fd, data: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
            with pytest.raises(RecordingFailed, match="No space left"):
                recorder.tap(True, MESSAGES[1])
        recorder.tap(True, MESSAGES[1])  # says it once
        recorder.note({})
    assert data_of(read(tmp_path / "r"), sent=True) == [MESSAGES[0]]
