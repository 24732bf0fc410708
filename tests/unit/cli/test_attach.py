# SPDX-License-Identifier: LGPL-2.1-or-later
"""The built-in agent: what it shows, and how it leaves."""

import json
import os
import signal
from threading import Thread

import pytest
from typer.testing import CliRunner

from kvmi_host.cli import app
from kvmi_host.protocol import Action, EventId
from kvmi_host.testing.peer import next_reply

CR3_WRITE = bytes.fromhex("0300 000000000000 0010000000000000 0020000000000000")


def run(*arguments):
    return CliRunner().invoke(app, ["attach", "webserver", *arguments])


def lines(result):
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_json_is_the_session_then_events_then_the_summary(kernel):
    kernel.fire(EventId.CR, own=CR3_WRITE)
    kernel.fire(EventId.HYPERCALL, vcpu=1, mode=4)
    first, cr, hypercall, last = lines(run("--json", "--count", "2"))
    session = first["session"]
    assert set(session) == {"uuid", "name", "version", "dialect", "vcpus", "commands", "events", "method", "policy"}
    assert (session["name"], session["dialect"], session["vcpus"]) == ("webserver", "v6", 2)
    assert {name: cr[name] for name in ("vm", "vcpu", "seq", "event", "mode", "rip", "cr", "old", "new")} == {
        "vm": "webserver",
        "vcpu": 0,
        "seq": 1,
        "event": "cr",
        "mode": 8,
        "rip": 0,
        "cr": 3,
        "old": 0x1000,
        "new": 0x2000,
    }
    assert cr["time_ns"] <= hypercall["time_ns"]
    summary = last["summary"]
    assert (summary["events"], summary["by_kind"], summary["modes"]) == (2, {"cr": 1, "hypercall": 1}, {"4": 1, "8": 1})
    assert (summary["seq_gaps"], summary["seq_repeated"], summary["ended"]) == (0, 0, "count")
    assert summary["round_trip"]["samples"] >= 16
    assert summary["round_trip"]["median_us"] <= summary["round_trip"]["p99_us"]


OWN_FIELDS = [
    (
        EventId.MSR,
        "820000c0 00000000 0100000000000000 0200000000000000",
        {"msr": 0xC0000082, "old": 1, "new": 2},
        "lstar 0x1 -> 0x2",
    ),
    (
        EventId.BREAKPOINT,
        "3412000000000000 01 00000000000000",
        {"gpa": 0x1234, "insn_len": 1},
        "gpa=0x1234 insn_len=0x1",
    ),
    (
        EventId.PF,
        "0100000000000000 0200000000000000 04 00 0000 00000000",
        {"gva": 1, "gpa": 2, "access": 4, "view": 0},
        "gva=0x1 gpa=0x2 access=0x4 view=0x0",
    ),
    (
        EventId.TRAP,
        "0e000000 03000000 02000000 00000000 ef00000000000000",
        {"vector": 14, "type": 3, "error_code": 2, "cr2": 0xEF},
        "vector=0xe type=0x3 error_code=0x2 cr2=0xef",
    ),
    (EventId.DESCRIPTOR, "02 01 000000000000", {"descriptor": 2, "write": 1}, "gdtr write"),
    (EventId.DESCRIPTOR, "03 00 000000000000", {"descriptor": 3, "write": 0}, "ldtr read"),
]


@pytest.mark.parametrize(("event", "own", "fields", "detail"), OWN_FIELDS)
def test_an_events_own_fields_are_in_its_object(kernel, event, own, fields, detail):
    kernel.fire(event, own=bytes.fromhex(own))
    shown = lines(run("--json", "--count", "1"))[1]
    assert {name: shown[name] for name in fields} == fields


@pytest.mark.parametrize(("event", "own", "fields", "detail"), OWN_FIELDS)
def test_an_events_own_fields_are_its_detail(kernel, event, own, fields, detail):
    kernel.fire(event, own=bytes.fromhex(own))
    (line,) = [line for line in run("--count", "1").stdout.splitlines() if line.startswith("         1 ")]
    assert line.endswith(f" {detail}")


def test_plain_lines_are_aligned_and_end_with_the_summary(kernel):
    kernel.fire(EventId.CR, own=CR3_WRITE)
    result = run("--count", "1")
    assert result.exit_code == 0
    shown = result.stdout.splitlines()
    at = next(number for number, line in enumerate(shown) if "vCPU event" in line)
    head, event = shown[at : at + 2]
    assert head.split() == ["seq", "vCPU", "event", "mode", "rip", "detail"]
    assert event.split() == ["1", "0", "cr", "8", "0x0000000000000000", "cr3", "0x1000", "->", "0x2000"]
    assert head.index("mode") + 3 == event.index(" 8 ") + 1
    assert "seq gaps: 0" in result.stdout
    assert "round trip of get-version: median" in result.stdout


def test_events_that_were_asked_for_are_on_while_it_watches_and_off_afterwards(kernel):
    replies = kernel.fire(EventId.HYPERCALL)
    seen = []
    original = kernel.watched_registers

    def look():
        next_reply(replies)
        seen.append(((kernel.enabled(EventId.CR), kernel.enabled(EventId.UNHOOK)), original()))
        kernel.fire(EventId.HYPERCALL)

    looking = Thread(target=look)
    looking.start()
    run("--events", "cr3,hypercall", "--count", "2")
    looking.join(5)
    assert seen == [((True, True), frozenset({3}))]
    assert not kernel.enabled(EventId.CR)
    assert not kernel.enabled(EventId.UNHOOK)
    assert original() == frozenset()
    assert kernel.wait_ended() == "the introspector closed"


def test_every_event_is_answered_continue(kernel):
    replies = [kernel.fire(EventId.HYPERCALL), kernel.fire(EventId.CR, vcpu=1, own=CR3_WRITE)]
    run("--count", "1")
    assert [next_reply(reply).action for reply in replies] == [Action.CONTINUE] * 2


def test_it_leaves_after_the_duration(kernel):
    assert lines(run("--json", "--duration", "0"))[-1]["summary"]["ended"] == "duration"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_leaves_cleanly_on_a_signal(kernel, number):
    replies = kernel.fire(EventId.HYPERCALL)

    def interrupt():
        next_reply(replies)
        os.kill(os.getpid(), number)

    interrupting = Thread(target=interrupt)
    interrupting.start()
    before = signal.getsignal(number)
    summary = lines(run("--json"))[-1]["summary"]
    interrupting.join(5)
    assert summary["ended"] == number.name
    assert not kernel.enabled(EventId.CR)
    assert signal.getsignal(number) is before


def test_it_leaves_when_the_host_asks_with_unhook(kernel):
    kernel.fire(EventId.UNHOOK)
    summary = lines(run("--json"))[-1]["summary"]
    assert (summary["ended"], summary["by_kind"]) == ("unhook", {"unhook": 1})
    assert (summary["modes"], summary["by_vcpu"]) == ({}, {})
    assert not kernel.enabled(EventId.CR)


def test_a_vm_that_ends_is_told_in_the_summary(kernel):
    replies = kernel.fire(EventId.HYPERCALL)

    def die():
        next_reply(replies)
        kernel.end("the VM died")

    dying = Thread(target=die)
    dying.start()
    summary = lines(run("--json"))[-1]["summary"]
    dying.join(5)
    assert (summary["events"], summary["ended"]) == (1, "the VM or its session ended")


def test_fewer_events_than_asked_for_is_a_failure(kernel):
    assert run("--json", "--count", "5", "--duration", "0").exit_code == 1


def test_events_lost_on_the_way_are_counted(kernel):
    kernel.fire(EventId.HYPERCALL)
    kernel._seq += 2
    kernel.fire(EventId.HYPERCALL, vcpu=1)
    assert lines(run("--json", "--count", "2"))[-1]["summary"]["seq_gaps"] == 2
