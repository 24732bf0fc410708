# SPDX-License-Identifier: LGPL-2.1-or-later
"""A recording that was cut off or damaged is good up to there, and says so."""

import io
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvmi_host.protocol import Command, frame
from kvmi_host.recording import BadRecording, EndsEarly, Message, Note, Recorder, pcapng, read_recording

NOTE = {"session": {"name": "web"}}
HEAD = pcapng.file_head("kvmi-host 1", "web")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Seven items: messages of every length modulo 4 in both directions, and a note."""
    path: Path = tmp_path_factory.mktemp("r") / "r"
    with Recorder(path, "web") as recorder:
        recorder.note(NOTE)
        for length in range(6):
            recorder.tap(length % 2 == 0, frame(Command.GET_VERSION, length, bytes(length)))
    return path.read_bytes()


def read(data: bytes) -> tuple[list[Message | Note], BadRecording | None]:
    items: list[Message | Note] = []
    try:
        for item in read_recording(io.BytesIO(data)):
            items.append(item)  # noqa: PERF402 - what came before an error counts
    except BadRecording as error:
        return items, error
    return items, None


def block_ends(data: bytes) -> list[int]:
    ends = [0]
    while ends[-1] < len(data):
        ends.append(ends[-1] + int.from_bytes(data[ends[-1] + 4 : ends[-1] + 8], "little"))
    return ends


def test_what_was_recorded_is_read(recorded):
    items, error = read(recorded)
    assert error is None
    assert isinstance(items[0], Note)
    assert items[0].content == NOTE
    assert [(m.sent, m.data, m.whole) for m in items[1:]] == [
        (length % 2 == 0, frame(Command.GET_VERSION, length, bytes(length)), True) for length in range(6)
    ]


def test_cut_off_at_any_byte_all_that_is_whole_is_read_and_the_rest_is_told(recorded):
    whole, _ = read(recorded)
    ends = block_ends(recorded)
    for cut in range(len(recorded)):
        items, error = read(recorded[:cut])
        blocks = max(index for index, end in enumerate(ends) if end <= cut)
        assert items == whole[: max(blocks - 2, 0)]
        assert (error is None) == (cut in ends)
        if error:
            assert isinstance(error, EndsEarly)
            where = "before its first message" if blocks < 2 else "in the middle of a message"
            assert f"ends {where}: {cut - ends[blocks]} bytes" in str(error)


@pytest.mark.parametrize("data", [b"{}\n", b"\n\n", b"\x7fELF", b"\xd4\xc3\xb2\xa1" + bytes(20)])
def test_what_is_no_capture_is_refused(data):
    items, error = read(data)
    assert items == []
    assert "no recording" in str(error)


@pytest.mark.parametrize("length", [0, 8, 13, pcapng.MAX_BLOCK + 4, 0xFFFFFFFC])
def test_a_block_length_that_cannot_be_is_not_believed(recorded, length):
    at = block_ends(recorded)[3]
    items, error = read(recorded[: at + 4] + length.to_bytes(4, "little") + recorded[at + 8 :])
    assert len(items) == 1
    assert f"damaged at byte {at}: a block of {length} bytes" in str(error)


def test_a_block_whose_lengths_differ_is_not_believed(recorded):
    at = block_ends(recorded)[3]
    damaged = bytearray(recorded)
    damaged[at - 4] ^= 4
    items, error = read(bytes(damaged))
    assert items == []
    assert "two lengths differ" in str(error)


def test_a_tail_of_zeros_is_told(recorded):
    items, error = read(recorded + bytes(512))
    assert len(items) == 7
    assert f"damaged at byte {len(recorded)}" in str(error)


def test_blocks_that_other_programs_add_are_skipped(recorded):
    statistics = (5).to_bytes(4, "little") + (24).to_bytes(4, "little") + bytes(12) + (24).to_bytes(4, "little")
    at = block_ends(recorded)[2]
    items, error = read(recorded[:at] + statistics + recorded[at:])
    assert (len(items), error) == (7, None)


def test_a_capture_of_something_else_is_refused():
    ethernet = bytearray(HEAD)
    at = block_ends(HEAD)[1]
    ethernet[at + 8] = 1
    assert "link type 1" in str(read(bytes(ethernet))[1])


def test_a_packet_for_another_dissector_is_refused():
    tags = pcapng.dissected_by("http")
    assert "'http'" in str(read(HEAD + pcapng.packet(1, pcapng.INBOUND, tags, b""))[1])


@pytest.mark.parametrize("content", [b"{", b"[]", b"1", b"[" * 100_000, b"\xff"])
def test_a_note_that_is_no_object_is_told(content):
    packet = pcapng.packet(1, 0, pcapng.dissected_by("json"), content)
    assert "a note that is no JSON" in str(read(HEAD + packet)[1])


@given(st.binary(max_size=300), st.integers(0, 400), st.integers(0, 8))
@example(b"", 0, 8)
@settings(max_examples=300)
def test_whatever_the_file_holds_nothing_worse_than_bad_recording_comes_of_it(recorded, rubbish, at, cut):
    read(recorded[:at] + rubbish + recorded[at + cut :])


def test_a_time_holds_nanoseconds_of_this_century():
    tags = pcapng.dissected_by("kvmi")
    for time in (0, (1 << 32) - 1, 4_102_444_800_123_456_789):
        (packet,) = pcapng.read_packets(io.BytesIO(HEAD + pcapng.packet(time, pcapng.OUTBOUND, tags, b"x")))
        assert packet == (time, pcapng.OUTBOUND, "kvmi", b"x")
