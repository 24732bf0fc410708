# SPDX-License-Identifier: LGPL-2.1-or-later
"""tshark opens a recording, and shows every kind of message with the values that were sent."""

import json
import os
import random
import socket
import subprocess
from pathlib import Path

import pytest

from kvmi_host.introspect import Session
from kvmi_host.protocol import Action, Command, CommandError, Event, EventId, PageFaultReply, frame
from kvmi_host.recording import DISSECTOR, Recorder
from kvmi_host.testing.peer import SimulatedKernel, next_reply

pytestmark = pytest.mark.integration

OWN_DATA = {
    EventId.CR: ("0300 000000000000 0010000000000000 0020000000000000", {"cr": "3", "old": 0x1000, "new": 0x2000}),
    EventId.MSR: ("820000c0 00000000 0100000000000000 0200000000000000", {"msr": 0xC0000082, "old": 1, "new": 2}),
    EventId.BREAKPOINT: ("3412000000000000 01 00000000000000", {"gpa": 0x1234, "insn_len": "1"}),
    EventId.PF: (
        "0100000000000000 0020000000000000 04 00 0000 00000000",
        {"gva": 1, "gpa": 0x2000, "access": "4", "view": "0"},
    ),
    EventId.TRAP: (
        "0e000000 03000000 02000000 00000000 ef00000000000000",
        {"vector": "14", "type": "3", "error_code": 2, "cr2": 0xEF},
    ),
    EventId.DESCRIPTOR: ("02 01 000000000000", {"descriptor": "2", "write": "1"}),
}
LEFT_TO_OTHERS = (
    Command.CONTROL_VE,
    Command.GET_MAP_TOKEN,
    Command.CONTROL_SPP,
    Command.GET_PAGE_WRITE_BITMAP,
    Command.SET_PAGE_WRITE_BITMAP,
)


def tshark(path: Path, *arguments: str) -> str:
    # -2: read twice, as Wireshark does, for what a frame says of a later one
    command = ["tshark", "-2", "-X", f"lua_script:{DISSECTOR}", "-r", str(path), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "Lua" not in result.stderr, result.stderr
    return result.stdout


def frames(path: Path) -> list[dict[str, object]]:
    """What tshark tells of each message: its fields, without the dots of those they are in."""
    decoded = []
    for packet in json.loads(tshark(path, "-T", "json", "--no-duplicate-keys", "-Y", "kvmi")):
        fields: dict[str, object] = {"frame": packet["_source"]["layers"]["frame"]["frame.number"]}
        _flatten(packet["_source"]["layers"]["kvmi"], fields)
        decoded.append(fields)
    return decoded


def _flatten(tree: dict[str, object], into: dict[str, object]) -> None:
    for name, value in tree.items():
        if isinstance(value, dict):
            _flatten(value, into)
        else:
            into[name.removeprefix("kvmi.")] = value


def same(shown: object, expected: object) -> bool:
    """Numbers are compared as numbers where tshark shows them in base 16."""
    return int(str(shown), 16) == expected if isinstance(expected, int) else shown == expected


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A session with every command and every event in it."""
    path = tmp_path_factory.mktemp("recording") / "session.pcapng"
    ours, kernels = socket.socketpair()
    with (
        Recorder(path, "web") as recorder,
        kernels,
        SimulatedKernel(kernels, vcpus=2) as kernel,
        Session(ours, tap=recorder.tap) as session,
    ):
        recorder.note({"session": {"name": "web"}})
        session.get_version()
        session.check_command(Command.READ_PHYSICAL)
        session.check_event(EventId.XSETBV)
        session.guest_info()
        session.vcpu_info(1)
        session.control_vm_events(EventId.CREATE_VCPU, True)
        session.control_events(1, EventId.CR, True)
        session.control_cr(1, 3, True)
        session.control_msr(1, 0xC0000082, True)
        registers = session.get_registers(1, [0x10, 0xC0000080]).registers
        session.set_registers(1, registers._replace(rip=0x1122334455667788))
        session.cpuid(1, 7, 0x21)
        session.xsave(1)
        session.write_physical(0x1010, b"hello")
        session.read_physical(0x1010, 5)
        session.inject_exception(1, 14, 2, 0xABC)
        session.set_page_access({0x1000: 5, 0x2000: 1})
        session.page_access(0x1000, 0x2000, 0x3000)
        session.mtrr_type(0x3000)
        session.max_gfn()
        for command in LEFT_TO_OTHERS:
            with pytest.raises(CommandError):
                session.request(command, b"\1", 1 if command == Command.CONTROL_VE else None)
        for kind in sorted(set(EventId) - {EventId.PAUSE_VCPU}):
            replies = kernel.fire(kind, vcpu=1, own=bytes.fromhex(OWN_DATA.get(kind, ("",))[0]), mode=4)
            event = session.next_event()
            if kind == EventId.PF:
                session.reply(event, Action.RETRY, page_fault=PageFaultReply(0x5000, b"abc", singlestep=True))
            elif kind != EventId.UNHOOK:
                session.reply(event)
            if kind != EventId.UNHOOK:
                next_reply(replies)
        session.pause_vcpu(0, wait=True)
        session.reply(session.next_event())
        session.control_cmd_response(False)
    return path


@pytest.fixture(scope="module")
def shown(recorded: Path) -> list[dict[str, object]]:
    return frames(recorded)


def commands(shown: list[dict[str, object]], command: Command) -> tuple[dict[str, object], dict[str, object]]:
    request, answer = (fields for fields in shown if fields["command"] == str(int(command)))
    return request, answer


def test_every_message_is_dissected_whole(recorded):
    with recorded.open("rb") as file:
        assert file.read(4) == b"\n\r\r\n"
    assert tshark(recorded, "-Y", "_ws.malformed or _ws.lua.error or kvmi.short or kvmi.long or kvmi.padding") == ""
    assert tshark(recorded, "-Y", "not kvmi and not json") == ""


def test_the_session_holds_every_command_and_event(shown):
    assert {int(str(fields["command"])) for fields in shown} == set(Command)
    assert {int(str(f["event"])) for f in shown if f["command"] == str(int(Command.EVENT))} == set(EventId)


REQUESTS = [
    (Command.GET_VERSION, {}, {"version": "1"}),
    (Command.CHECK_COMMAND, {"checked_command": "17"}, {}),
    (Command.CHECK_EVENT, {"event": "3"}, {}),
    (Command.GET_GUEST_INFO, {}, {"vcpu_count": "2"}),
    (Command.GET_VCPU_INFO, {"vcpu": "1"}, {"tsc_speed": "2000000000"}),
    (Command.PAUSE_VCPU, {"vcpu": "0", "wait": "1"}, {}),
    (Command.CONTROL_VM_EVENTS, {"event": "9", "enable": "1"}, {}),
    (Command.CONTROL_EVENTS, {"vcpu": "1", "event": "1", "enable": "1"}, {}),
    (Command.CONTROL_CR, {"vcpu": "1", "cr": "3", "enable": "1"}, {}),
    (Command.CONTROL_MSR, {"vcpu": "1", "msr": 0xC0000082, "enable": "1"}, {}),
    (Command.CONTROL_VE, {"vcpu": "1", "data": "01"}, {"error": "-95"}),
    (
        Command.GET_REGISTERS,
        {"vcpu": "1", "nmsrs": "2", "msr": ["0x00000010", "0xc0000080"]},
        {"mode": "8", "nmsrs": "2", "value": ["0x0000000000000011", "0x00000000c0000081"]},
    ),
    (Command.SET_REGISTERS, {"vcpu": "1", "regs.rip": 0x1122334455667788}, {}),
    (Command.GET_CPUID, {"vcpu": "1", "function": 7, "index": 0x21}, {"eax": 7, "ebx": 0x21, "ecx": 0, "edx": 0}),
    (Command.GET_XSAVE, {"vcpu": "1"}, {"data": ":".join(["00"] * 4096)}),
    (Command.READ_PHYSICAL, {"gpa": 0x1010, "length": "5"}, {"data": "68:65:6c:6c:6f"}),
    (Command.WRITE_PHYSICAL, {"gpa": 0x1010, "length": "5", "data": "68:65:6c:6c:6f"}, {}),
    (Command.INJECT_EXCEPTION, {"vector": "14", "has_error": "1", "error_code": 2, "address": 0xABC}, {}),
    (Command.GET_PAGE_ACCESS, {"count": "3"}, {"access": ["5", "1", "7"]}),
    (Command.SET_PAGE_ACCESS, {"count": "2", "access": ["5", "1"]}, {}),
    (Command.GET_MTRR_TYPE, {"gpa": 0x3000}, {"memory_type": "6"}),
    (Command.GET_MAX_GFN, {}, {"gfn": 3}),
]


@pytest.mark.parametrize(("command", "asked", "answered"), REQUESTS)
def test_a_command_and_its_answer_are_shown(shown, command, asked, answered):
    request, answer = commands(shown, command)
    assert {name: value for name, value in asked.items() if not same(request.get(name), value)} == {}
    assert {name: value for name, value in answered.items() if not same(answer.get(name), value)} == {}
    assert answer["error"] == answered.get("error", "0")


@pytest.mark.parametrize("command", [command for command, _, _ in REQUESTS])
def test_a_command_and_its_answer_are_joined(shown, command):
    request, answer = commands(shown, command)
    assert (request["answered_in"], answer["answer_to"]) == (answer["frame"], request["frame"])
    assert 0 <= float(str(answer["time"])) < 60


def test_a_command_that_is_not_answered_is_joined_with_nothing(shown):
    (silent,) = (fields for fields in shown if fields["command"] == str(int(Command.CONTROL_CMD_RESPONSE)))
    assert "answered_in" not in silent
    assert (silent["enable"], silent["now"]) == ("0", "1")


def exchange(shown: list[dict[str, object]], kind: EventId) -> list[dict[str, object]]:
    return [f for f in shown if f["command"] in {"0", "1"} and f["event"] == str(int(kind))]


@pytest.mark.parametrize("kind", sorted(set(EventId) - {EventId.UNHOOK, EventId.PAUSE_VCPU}))
def test_an_event_and_its_reply_are_shown_and_joined(shown, kind):
    event, reply = exchange(shown, kind)
    fields = OWN_DATA[kind][1] if kind in OWN_DATA else {}
    assert {name: value for name, value in fields.items() if not same(event.get(name), value)} == {}
    assert (event["vcpu"], event["mode"], reply["vcpu"]) == ("1", "4", "1")
    assert reply["action"] == ("1" if kind == EventId.PF else "0")
    assert (event["answered_in"], reply["answer_to"]) == (reply["frame"], event["frame"])
    if kind in {EventId.CR, EventId.MSR}:
        assert reply["new_val"] == event["new"]
    if kind == EventId.PF:
        assert same(reply["ctx_addr"], 0x5000)
        assert (reply["ctx_size"], reply["singlestep"], reply["rep_complete"]) == ("3", "1", "0")


def test_unhook_has_no_reply(shown):
    (event,) = exchange(shown, EventId.UNHOOK)
    assert "answered_in" not in event


def test_every_register_of_an_event_is_shown_as_the_protocol_decodes_it(tmp_path):
    random.seed(1)
    body = bytearray(random.randbytes(544))
    body[:16] = (544).to_bytes(2, "little") + b"\1\0\5\0\0\0\x08" + bytes(7)
    event = Event(1, bytes(body))
    with Recorder(tmp_path / "r", "web") as recorder:
        recorder.tap(False, frame(Command.EVENT, 1, bytes(body)))
    (fields,) = frames(tmp_path / "r")
    expected = {f"regs.{name}": value for name, value in event.registers._asdict().items()}
    expected |= {f"msrs.{name}": value for name, value in event.msrs._asdict().items()}
    for name, value in event.sregs._asdict().items():
        if name != "interrupt_bitmap":
            part = value._asdict() if isinstance(value, tuple) else None
            expected |= {f"sregs.{name}.{n}": v for n, v in part.items()} if part else {f"sregs.{name}": value}
    assert {name: value for name, value in expected.items() if not same(fields[name], value)} == {}


def test_one_line_tells_what_happened(recorded):
    lines = tshark(recorded)
    assert "event 2: cr vCPU 1 mode 4 rip 0x0 cr3 0x1000 -> 0x2000" in lines
    assert "event-reply 2: cr vCPU 1 continue new_val 0x2000" in lines
    assert "answer of read-physical 15: ok" in lines
    assert "answer of control-ve 21: -EOPNOTSUPP" in lines


@pytest.mark.parametrize(
    "message",
    [
        b"\x0d\0",
        frame(Command.EVENT, 1, bytes(20)),
        frame(Command.EVENT, 1, (544).to_bytes(2, "little") + bytes(2) + b"\1" + bytes(539)),
        frame(Command.GET_REGISTERS, 1, bytes(100)),
        frame(Command.GET_VERSION, 1, b"\xff" * 3),
        frame(Command.GET_GUEST_INFO, 1, bytes(8))[:-3],
        b"\2\0\xff\xff\0\0\0\0",
    ],
)
def test_a_message_that_is_too_short_is_marked_not_misread(tmp_path, message):
    with Recorder(tmp_path / "r", "web") as recorder:
        recorder.tap(False, message)
    assert tshark(tmp_path / "r", "-Y", "kvmi.short and not _ws.lua.error").count("\n") == 1


@pytest.mark.parametrize(
    ("sent", "message"),
    [(True, frame(Command.EVENT, 1, bytes(544))), (False, frame(Command.EVENT_REPLY, 1, bytes(16)))],
)
def test_a_message_from_the_wrong_side_is_marked(tmp_path, sent, message):
    with Recorder(tmp_path / "r", "web") as recorder:
        recorder.tap(sent, message)
    assert tshark(tmp_path / "r", "-Y", "kvmi.astray").count("\n") == 1


def test_a_reply_of_an_older_tool_is_not_marked(tmp_path):
    with Recorder(tmp_path / "r", "web") as recorder:
        recorder.tap(True, frame(Command.EVENT_REPLY, 1, bytes(8) + b"\0\1"))
    assert tshark(tmp_path / "r", "-Y", "kvmi.short") == ""


def test_padding_that_is_not_zero_is_marked(tmp_path):
    with Recorder(tmp_path / "r", "web") as recorder:
        recorder.tap(True, frame(Command.GET_XSAVE, 1, b"\0\0\0\1\0\0\0\0"))
    assert tshark(tmp_path / "r", "-Y", "kvmi.padding").count("\n") == 1


def test_an_event_of_a_newer_kernel_is_read_behind_what_it_has_more(tmp_path):
    own = bytes.fromhex(OWN_DATA[EventId.CR][0])
    body = (552).to_bytes(2, "little") + b"\0\0\1" + bytes(539) + b"newstate" + own
    with Recorder(tmp_path / "r", "web") as recorder:
        recorder.tap(False, frame(Command.EVENT, 1, body))
    (fields,) = frames(tmp_path / "r")
    assert same(fields["new"], 0x2000)
    assert fields["more"] == b"newstate".hex(":")


def test_a_session_can_be_looked_at_while_it_runs(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    keeps_it_open = os.open(pipe, os.O_RDWR)
    watch = ["tshark", "-X", f"lua_script:{DISSECTOR}", "-i", str(pipe), "-c", "2", "-T", "fields", "-e", "kvmi.seq"]
    with (
        subprocess.Popen(watch, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as watching,
        Recorder(pipe, "web") as recorder,
    ):
        recorder.tap(True, frame(Command.GET_VERSION, 7) + frame(Command.GET_MAX_GFN, 8))
        shown, _ = watching.communicate(timeout=60)
    os.close(keeps_it_open)
    assert shown.split() == ["7", "8"]
