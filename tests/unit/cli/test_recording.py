# SPDX-License-Identifier: LGPL-2.1-or-later
"""``attach --record``, and what ``replay`` makes of it."""

import errno
import json
import os

import pytest
from typer.testing import CliRunner

import kvmi_host
from kvmi_host.cli import app
from kvmi_host.cli.recorded import recorded_lines
from kvmi_host.introspect.session import MAX_WAITING_EVENTS
from kvmi_host.protocol import Action, Command, EventId, frame
from kvmi_host.recording import DISSECTOR, Message, Note, Recorder, read_recording
from kvmi_host.testing.peer import next_reply

CR3_WRITE = bytes.fromhex("0300 000000000000 0010000000000000 0020000000000000")


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def items(path):
    with path.open("rb") as file:
        return list(read_recording(file))


def truncated_to(path, wanted):
    """Cut a recording behind so many items."""
    data = path.read_bytes()
    ends = [0]
    while ends[-1] < len(data):
        ends.append(ends[-1] + int.from_bytes(data[ends[-1] + 4 : ends[-1] + 8], "little"))
    path.write_bytes(data[: ends[wanted + 2]])  # behind the two blocks of the file's head
    return data[ends[wanted + 2] :]


@pytest.fixture
def once_attached(kernel, monkeypatch):
    """What the kernel does when a session has begun: it is called then."""
    attach = kvmi_host.attach

    def when_attached(happens):
        def attach_and_go_on(vm, **settings):
            attached = attach(vm, **settings)
            assert attached.facts  # what the kernel says first
            happens()
            return attached

        monkeypatch.setattr(kvmi_host, "attach", attach_and_go_on)

    return when_attached


@pytest.fixture
def recorded(kernel, once_attached, tmp_path):
    """A session of three events: its file, and what attach --json printed."""

    def happen():
        kernel.fire(EventId.CR, own=CR3_WRITE)
        kernel.fire(EventId.HYPERCALL, vcpu=1, mode=4)
        kernel._seq += 1
        kernel.fire(EventId.UNHOOK)

    once_attached(happen)
    path = tmp_path / "session.pcapng"
    result = run("attach", "webserver", "--json", "--record", path)
    assert result.exit_code == 0, result.output
    return path, result.stdout


def events_of(output):
    return [line for line in map(json.loads, output.splitlines()) if "event" in line]


def last_summary(output):
    return json.loads(output.splitlines()[-1])["summary"]


def test_replay_prints_what_attach_printed_to_the_byte(recorded):
    path, printed = recorded
    result = run("replay", path, "--json")
    assert (result.exit_code, result.stdout) == (0, printed)


def test_events_that_attach_did_not_look_at_any_more_are_recorded_and_not_shown(kernel, once_attached, tmp_path):
    once_attached(lambda: [kernel.fire(EventId.HYPERCALL, vcpu) for vcpu in (0, 1)])
    path = tmp_path / "r"
    printed = run("attach", "webserver", "--json", "--count", "1", "--record", path).stdout
    received = [m for m in items(path) if isinstance(m, Message) and not m.sent and m.data[:2] == b"\1\0"]
    assert (len(received), len(events_of(printed))) == (2, 1)
    assert run("replay", path, "--json").stdout == printed


@pytest.mark.parametrize("note", [{"leaving": 1}, {"leaving": {}}, {"session": {"name": 1}}, {"summary": {}}, {}])
def test_a_note_that_attach_does_not_make_is_told(tmp_path, note):
    with Recorder(tmp_path / "r", "web") as recorder:
        recorder.note(note)
    result = run("replay", tmp_path / "r")
    assert result.exit_code == 1
    assert "a note " in result.stderr


def test_events_that_nobody_answers_do_not_pile_up(tmp_path):
    event = frame(Command.EVENT, 1, (544).to_bytes(2, "little") + bytes(2) + b"\5" + bytes(539))
    with Recorder(tmp_path / "r", "web") as recorder:
        for _ in range(2 * MAX_WAITING_EVENTS):
            recorder.tap(False, event)
    with (tmp_path / "r").open("rb") as file:
        next(recorded_lines(file))
        assert file.tell() < (tmp_path / "r").stat().st_size * 0.6


def test_replay_shows_what_attach_showed(recorded, tmp_path):
    path, printed = recorded
    (tmp_path / "printed").write_text(printed)
    shown = run("replay", path).stdout
    assert shown == run("replay", tmp_path / "printed").stdout
    assert "1    0 cr              8 0x0000000000000000 cr3 0x1000 -> 0x2000" in shown


def test_it_begins_with_the_first_byte_that_crosses_the_socket(recorded):
    first, *_ = items(recorded[0])
    assert first.sent
    assert first.data == frame(Command.GET_VERSION, 1)


def test_what_follows_the_session_is_in_it_too(recorded):
    last = items(recorded[0])[-1]
    assert isinstance(last, Note)
    assert last.content["summary"]["ended"] == "unhook"


def test_every_reply_is_in_it(recorded):
    replies = [m for m in items(recorded[0]) if isinstance(m, Message) and m.sent and m.data[:2] == b"\0\0"]
    assert len(replies) == 2


def test_without_its_summary_replay_counts_the_same(recorded):
    path, printed = recorded
    truncated_to(path, len(items(path)) - 1)
    result = run("replay", path, "--json")
    assert result.exit_code == 1
    assert "the recording has no end" in result.stderr
    assert result.stdout.splitlines()[:-1] == printed.splitlines()[:-1]
    counted, told = last_summary(result.stdout), last_summary(printed)
    same = ("events", "by_kind", "modes", "by_vcpu", "seq_gaps", "seq_repeated")
    assert {name: counted[name] for name in same} == {name: told[name] for name in same}
    assert counted["seq_gaps"] == 1
    assert "has no end" in counted["ended"]


def test_cut_off_in_a_message_replay_shows_what_is_there_and_says_so(recorded):
    path, printed = recorded
    messages = [item.data if isinstance(item, Message) else b"" for item in items(path)]
    second = [at for at, data in enumerate(messages) if data[:1] == bytes([Command.EVENT])][1]
    rest = truncated_to(path, second)
    path.write_bytes(path.read_bytes() + rest[:100])
    result = run("replay", path, "--json")
    assert result.exit_code == 1
    assert events_of(result.stdout) == events_of(printed)[:1]
    assert "the recording ends in the middle of a message: 100 bytes of 608 are there" in result.stderr


def test_a_recording_comes_through_a_pipe_too(recorded):
    path, printed = recorded
    result = CliRunner().invoke(app, ["replay", "-", "--json"], input=path.read_bytes())
    assert (result.exit_code, result.stdout) == (0, printed)


def test_a_vm_that_breaks_the_protocol_is_recorded_as_it_did(kernel, once_attached, tmp_path):
    rubbish = b"\1\0\xff\xff\2\0\0\0rubbish"
    once_attached(lambda: kernel.send_raw(rubbish))
    path = tmp_path / "r"
    attached = run("attach", "webserver", "--json", "--record", path)
    assert attached.exit_code == 1
    assert any(item.data.startswith(rubbish) for item in items(path) if isinstance(item, Message))
    replayed = run("replay", path, "--json")
    assert replayed.exit_code == 1
    assert "announces 65535 bytes" in replayed.stderr
    assert replayed.stdout == attached.stdout


def test_a_file_that_is_there_is_left_alone_and_the_vm_too(kernel, tmp_path):
    (tmp_path / "r").write_text("precious")
    result = run("attach", "webserver", "--record", tmp_path / "r")
    assert result.exit_code == 1
    assert "is there already" in result.stderr
    assert kernel.why is None


def test_a_vm_that_cannot_be_attached_to_leaves_no_file(tmp_path):
    assert run("attach", "pid:4194304", "--record", tmp_path / "r").exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_ends_the_session_with_a_word(kernel, once_attached, tmp_path, monkeypatch):
    def no_space(fd, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    once_attached(lambda: monkeypatch.setattr(os, "write", no_space))
    result = run("attach", "webserver", "--record", tmp_path / "r")
    assert result.exit_code == 1
    assert "the recording ends here: No space left on device" in result.stderr
    assert kernel.wait_ended()


@pytest.mark.parametrize("other", [["--to", "/x"], ["--exec", "--", "program"]])
def test_only_the_built_in_agent_records(tmp_path, other):
    assert run("attach", "webserver", "--record", tmp_path / "r", *other).exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_recording_is_told_and_nothing_shown(tmp_path):
    (tmp_path / "r").write_bytes(b"\n\n")
    result = run("replay", tmp_path / "r")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no recording" in result.stderr


def test_an_endless_line_is_not_read_whole(tmp_path):
    with (tmp_path / "r").open("wb") as file:
        file.truncate(1 << 30)
    result = run("replay", tmp_path / "r")
    assert result.exit_code == 1
    assert "line 1 of" in result.stderr


def test_speed_1_takes_as_long_as_it_took(tmp_path, monkeypatch):
    from kvmi_host.cli import replay as verb

    now, slept = [0.0], []
    monkeypatch.setattr(verb, "monotonic", lambda: now[0])
    monkeypatch.setattr(verb, "sleep", lambda seconds: (slept.append(seconds), now.__setitem__(0, now[0] + seconds)))
    event = {"vm": "web", "vcpu": 1, "seq": 7, "event": "hypercall", "mode": 8, "rip": 0}
    times = (0, 50_000_000, 1_050_000_000)
    (tmp_path / "r").write_text("".join(json.dumps(event | {"time_ns": time}) + "\n" for time in times))
    assert run("replay", tmp_path / "r", "--speed", "1").exit_code == 0
    assert sum(slept) == pytest.approx(1.05)
    slept.clear()
    assert run("replay", tmp_path / "r", "--speed", "10").exit_code == 0
    assert sum(slept) == pytest.approx(0.105)


def test_replay_says_where_the_dissector_is():
    result = run("replay", "--dissector")
    assert (result.exit_code, result.stdout) == (0, f"{DISSECTOR}\n")
    assert DISSECTOR.is_file()


def test_a_reply_that_is_kept_is_recorded_when_it_is_sent(pair, tmp_path):
    with Recorder(tmp_path / "r", "web") as recorder:
        kernel, session = pair(tap=recorder.tap)
        replies = kernel.fire(EventId.HYPERCALL)
        event = session.next_event()
        session.get_version()
        session.reply(event, Action.CONTINUE)
        next_reply(replies)
    ids = [(m.sent, m.data[0]) for m in items(tmp_path / "r")]
    assert ids == [(False, Command.EVENT), (True, 2), (False, 2), (True, Command.EVENT_REPLY)]
