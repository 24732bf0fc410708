# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a policy allows, the kernel does; what it does not allow, the kernel refuses, whatever the session asks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmi_host.attach import AttachRefused, Policy, VmHandle
from kvmi_host.introspect import Session
from kvmi_host.protocol import Command, CommandError, ErrorCode, EventId, Request, command_name, event_name, messages
from kvmi_host.protocol.ids import ALWAYS_ALLOWED, CHANGES_THE_GUEST, VM_EVENTS
from kvmi_host.testing.live import DEADLINE, LiveGuest, hook

pytestmark = pytest.mark.hardware

ASKS: dict[int, Request[Any]] = {
    # A message of each command that the kernel serves. None of them changes what the guest does.
    Command.GET_GUEST_INFO: messages.guest_info(),
    Command.GET_VCPU_INFO: messages.vcpu_info(0),
    Command.PAUSE_VCPU: messages.pause_vcpu(0),
    Command.CONTROL_VM_EVENTS: messages.control_vm_events(EventId.UNHOOK, True),
    Command.CONTROL_EVENTS: messages.control_events(0, EventId.HYPERCALL, False),
    Command.CONTROL_CR: messages.control_cr(0, 3, False),
    Command.CONTROL_MSR: messages.control_msr(0, 0xC0000082, False),
    Command.GET_REGISTERS: messages.get_registers(0),
    Command.SET_REGISTERS: messages.raw(Command.SET_REGISTERS, bytes(144), 0),  # no event is pending: dropped
    Command.GET_CPUID: messages.cpuid(0, 0),
    Command.GET_XSAVE: messages.xsave(0),
    Command.READ_PHYSICAL: messages.read_physical(0x300000, 8),
    Command.WRITE_PHYSICAL: messages.write_physical(0x300000, b"policy"),
    Command.GET_PAGE_ACCESS: messages.page_access([0x300000]),
    Command.SET_PAGE_ACCESS: messages.set_page_access({0x300000: 7}),  # as every page is
    Command.GET_MTRR_TYPE: messages.mtrr_type(0x300000),
    Command.CONTROL_CMD_RESPONSE: messages.control_cmd_response(True, now=True),
    Command.GET_MAX_GFN: messages.max_gfn(),
    # For this one alone there is no harmless message: its vector is out of range.
    Command.INJECT_EXCEPTION: messages.raw(Command.INJECT_EXCEPTION, b"\xff" + bytes(15), 0),
}
REFUSED = {Command.INJECT_EXCEPTION: ErrorCode.EINVAL}
"""What the kernel answers to the above where that is not success."""

COMMANDS = sorted(ASKS)
EVENTS = sorted(EventId)
SWITCHED = sorted(set(EventId) - {EventId.PAUSE_VCPU})
"""PAUSE_VCPU has no switch: a command asks for each."""


def answer(session: Session, request: Request[Any]) -> int:
    """The error code of a command's answer."""
    try:
        session.ask(request)
    except CommandError as error:
        return error.code
    return 0


def switch(event: EventId, enable: bool) -> Request[None]:
    """What switches an event, on the VM or on vCPU 0."""
    if event in VM_EVENTS:
        return messages.control_vm_events(event, enable)
    return messages.control_events(0, event, enable)


def commands(*ids: int) -> Policy:
    return Policy(observe=not CHANGES_THE_GUEST & set(ids), commands=frozenset(ids))


def events(*ids: int) -> Policy:
    return Policy(observe=True, events=frozenset(ids))


@pytest.mark.rule("3.2")
def test_there_is_a_message_of_every_command_that_can_be_allowed(guest: LiveGuest, session: Session) -> None:
    served = {command for command in Command if session.check_command(command)}
    assert served == set(ASKS) | ALWAYS_ALLOWED


@pytest.mark.rule("3.2", "5.6")
@pytest.mark.parametrize("command", COMMANDS, ids=command_name)
def test_a_command_in_the_list_is_served(guest: LiveGuest, hooked: Callable[..., Session], command: Command) -> None:
    session = hooked(guest, allow=commands(command))
    assert {other for other in Command if session.check_command(other)} == {command} | ALWAYS_ALLOWED
    assert answer(session, ASKS[command]) == REFUSED.get(command, 0)
    if command == Command.PAUSE_VCPU:
        event = session.next_event(DEADLINE)
        assert event is not None
        session.reply(event)


@pytest.mark.rule("2.10", "3.2", "5.6")
@pytest.mark.parametrize("command", COMMANDS, ids=command_name)
def test_a_command_that_is_not_in_the_list_is_eperm(
    guest: LiveGuest, hooked: Callable[..., Session], command: Command
) -> None:
    session = hooked(guest, allow=commands(*set(COMMANDS) - {command}))
    assert not session.check_command(command)
    assert answer(session, ASKS[command]) == ErrorCode.EPERM
    assert session.check_command(COMMANDS[0]) is (command != COMMANDS[0])  # the session goes on


@pytest.mark.rule("3.3", "5.6")
@pytest.mark.parametrize("event", EVENTS, ids=event_name)
def test_an_event_in_the_list_can_be_asked_for(
    guest: LiveGuest, hooked: Callable[..., Session], event: EventId
) -> None:
    session = hooked(guest, allow=events(event))
    assert {other for other in EventId if session.check_event(other)} == {event}
    if event == EventId.PAUSE_VCPU:
        assert answer(session, ASKS[Command.PAUSE_VCPU]) == 0
        paused = session.next_event(DEADLINE)
        assert paused is not None
        assert paused.event == event
        session.reply(paused)
    else:
        assert answer(session, switch(event, False)) == 0


@pytest.mark.rule("3.12", "3.3", "5.6")
@pytest.mark.parametrize("event", SWITCHED, ids=event_name)
def test_an_event_that_is_not_in_the_list_is_eperm(
    guest: LiveGuest, hooked: Callable[..., Session], event: EventId
) -> None:
    session = hooked(guest, allow=events(*set(EVENTS) - {event}))
    assert not session.check_event(event)
    assert answer(session, switch(event, True)) == ErrorCode.EPERM


@pytest.mark.rule("3.8")
def test_a_vcpu_cannot_be_paused_where_that_event_is_not_in_the_list(
    guest: LiveGuest, hooked: Callable[..., Session]
) -> None:
    session = hooked(guest, allow=events(*set(EVENTS) - {EventId.PAUSE_VCPU}))
    assert answer(session, ASKS[Command.PAUSE_VCPU]) == ErrorCode.EPERM


@pytest.mark.rule("5.14")
@pytest.mark.parametrize("command", sorted(CHANGES_THE_GUEST), ids=command_name)
def test_observing_a_command_that_changes_the_guest_is_eperm(
    guest: LiveGuest, hooked: Callable[..., Session], command: Command
) -> None:
    session = hooked(guest, allow="observe")
    assert answer(session, ASKS[command]) == ErrorCode.EPERM


@pytest.mark.rule("5.14")
@pytest.mark.parametrize("command", sorted(CHANGES_THE_GUEST), ids=command_name)
def test_a_policy_that_the_kernel_does_not_take_leaves_no_session(guest: LiveGuest, command: Command) -> None:
    with pytest.raises(AttachRefused, match=f"{command_name(command)} cannot be allowed"):
        hook(guest, Policy(observe=True, commands=frozenset({command})))
    hook(guest).close()


@pytest.mark.rule("5.6")
def test_full_has_every_command_and_event(guest: LiveGuest, hooked: Callable[..., Session]) -> None:
    session = hooked(guest, allow="full")
    assert all(map(session.check_command, COMMANDS))
    assert all(map(session.check_event, EVENTS))


# -- a VM's policy file, through the command line


@pytest.fixture
def attach_command(guest: LiveGuest, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``kvmi-host attach`` for the guest, whose policy file has this text."""
    # The guest has no name but its process's.
    (tmp_path / f"{guest.name}.toml").write_text(
        'allow = "full"\n'
        'commands = ["get-guest-info", "pause-vcpu", "control-vm-events", "control-events", "control-cr"]\n'
        'events = ["cr", "create-vcpu"]\n'
    )
    environment = {**os.environ, "KVMI_POLICIES": str(tmp_path)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "kvmi_host.cli", "attach", guest.name, *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=DEADLINE,
            check=False,
        )

    return run


def test_the_policy_file_is_what_the_session_says_and_has(
    guest: LiveGuest, tmp_path: Path, attach_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    result = attach_command("--events", "cr3", "--json", "--count", "5")
    assert result.returncode == 0, result.stderr
    first, *seen, _ = map(json.loads, result.stdout.splitlines())
    session = first["session"]
    assert session["policy"] == str(tmp_path / f"{guest.name}.toml")
    assert set(session["commands"]) - {command_name(command) for command in ALWAYS_ALLOWED} == {
        *("get-guest-info", "pause-vcpu", "control-vm-events", "control-events", "control-cr")
    }
    assert session["events"] == ["cr", "create-vcpu"]
    assert {event["event"] for event in seen} == {"cr"}


def test_what_the_file_does_not_have_is_not_attached_with(
    guest: LiveGuest, attach_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    result = attach_command("--allow", "get-guest-info,read-physical")
    assert result.returncode == 1
    assert "it does not allow read-physical: ask for less" in result.stderr
    with VmHandle(guest.pid) as handle:
        assert not handle.hooked()


def test_the_kernel_refuses_what_the_built_in_agent_asks_for(
    attach_command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    result = attach_command("--events", "hypercall")
    assert result.returncode == 1
    assert "control-events: -EPERM: not allowed for this session" in result.stderr


READS_MEMORY = """
import socket
from kvmi_host.introspect import Session
with Session(socket.socket(fileno=3)) as session:
    print(session.guest_info())
    session.read_physical(0, 8)
"""


def test_a_program_that_is_given_the_session_is_held_to_the_file(
    guest: LiveGuest, attach_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    result = attach_command("--exec", "--", sys.executable, "-c", READS_MEMORY)
    assert result.returncode == 1
    assert result.stdout == f"{guest.vcpus}\n"
    assert "read-physical: -EPERM" in result.stderr
