# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an introspector may get wrong. Errors have names; what leaves the stream in doubt ends the session; the guest
goes on in any case."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import pytest

from kvmi_host.attach.vmfd import VmHandle
from kvmi_host.introspect import Session, SessionTimeout
from kvmi_host.protocol import Command, CommandError, ErrorCode, EventId
from kvmi_host.testing.live import LiveGuest, Wire, await_end

pytestmark = pytest.mark.hardware

VCPU_COMMANDS = {
    Command.GET_VCPU_INFO: 0,
    Command.PAUSE_VCPU: 8,
    Command.CONTROL_EVENTS: 8,
    Command.CONTROL_CR: 8,
    Command.CONTROL_MSR: 8,
    Command.GET_REGISTERS: 8,
    Command.SET_REGISTERS: 144,
    Command.GET_CPUID: 8,
    Command.GET_XSAVE: 0,
    Command.INJECT_EXCEPTION: 16,
}
"""With the size of what follows the vCPU header."""


def refusal(session: Session, command: int, payload: bytes, vcpu: int | None = None) -> int:
    with pytest.raises(CommandError) as refused:
        session.request(command, payload, vcpu)
    return refused.value.code


NOT_SERVED = {12: "3.15", 22: "3.40", **dict.fromkeys((24, 25, 26), "3.42")}
"""With its rule: that of commands which the dialect has, and we have not."""


@pytest.mark.parametrize(
    "number",
    [
        *(pytest.param(number, marks=pytest.mark.rule(rule)) for number, rule in NOT_SERVED.items()),
        *(pytest.param(number, marks=pytest.mark.rule("2.9", "2.5")) for number in (30, 255, 65535)),
        *(pytest.param(number, marks=pytest.mark.rule("7.6")) for number in (28, 63)),
    ],
)
@pytest.mark.parametrize("size", [0, 5, 8184])
def test_an_unknown_command_is_refused_and_its_payload_passed_over(session: Session, number: int, size: int) -> None:
    assert refusal(session, number, bytes(size)) == ErrorCode.EOPNOTSUPP
    assert session.get_version().version == 1
    assert session.get_version().version == 1


@pytest.mark.rule("2.10")
def test_a_command_that_the_host_has_not_allowed_is_refused(guest: LiveGuest, hooked: Callable[..., Session]) -> None:
    session = hooked(guest, allow="get-guest-info")
    assert session.guest_info() == guest.vcpus
    assert refusal(session, Command.GET_MAX_GFN, b"") == ErrorCode.EPERM
    assert refusal(session, Command.GET_VCPU_INFO, b"", 0) == ErrorCode.EPERM
    assert session.get_version().version == 1
    assert session.get_version().version == 1


@pytest.mark.rule("2.13")
@pytest.mark.parametrize("command", VCPU_COMMANDS)
@pytest.mark.parametrize("vcpu", [4, 1024, 65535])
def test_a_vcpu_index_out_of_range_is_refused(session: Session, command: Command, vcpu: int) -> None:
    assert refusal(session, command, bytes(VCPU_COMMANDS[command]), vcpu) == ErrorCode.EINVAL


BAD_FIELDS = {
    # by rule
    "2.15": [
        (Command.CHECK_COMMAND, struct.pack("<HHI", 2, 1, 0), None),
        (Command.CHECK_COMMAND, struct.pack("<HHI", 2, 0, 1), None),
        (Command.CHECK_EVENT, struct.pack("<HHI", 2, 1, 0), None),
        (Command.PAUSE_VCPU, struct.pack("<BBHI", 2, 0, 0, 0), 0),
        (Command.PAUSE_VCPU, struct.pack("<BBHI", 0, 1, 0, 0), 0),
        (Command.PAUSE_VCPU, struct.pack("<BBHI", 0, 0, 1, 0), 0),
        (Command.PAUSE_VCPU, struct.pack("<BBHI", 0, 0, 0, 1), 0),
        (Command.CONTROL_VM_EVENTS, struct.pack("<HBBI", EventId.UNHOOK, 2, 0, 0), None),
        (Command.CONTROL_VM_EVENTS, struct.pack("<HBBI", EventId.UNHOOK, 1, 1, 0), None),
        (Command.CONTROL_VM_EVENTS, struct.pack("<HBBI", EventId.UNHOOK, 1, 0, 1), None),
        (Command.CONTROL_EVENTS, struct.pack("<HBBI", EventId.CR, 2, 0, 0), 0),
        (Command.CONTROL_EVENTS, struct.pack("<HBBI", EventId.CR, 1, 1, 0), 0),
        (Command.CONTROL_EVENTS, struct.pack("<HBBI", EventId.CR, 1, 0, 1), 0),
        (Command.CONTROL_CR, struct.pack("<BBHI", 2, 0, 0, 3), 0),
        (Command.CONTROL_CR, struct.pack("<BBHI", 1, 1, 0, 3), 0),
        (Command.CONTROL_CR, struct.pack("<BBHI", 1, 0, 1, 3), 0),
        (Command.CONTROL_MSR, struct.pack("<BBHI", 2, 0, 0, 0x174), 0),
        (Command.CONTROL_MSR, struct.pack("<BBHI", 1, 1, 0, 0x174), 0),
        (Command.CONTROL_MSR, struct.pack("<BBHI", 1, 0, 1, 0x174), 0),
        (Command.GET_REGISTERS, struct.pack("<HHI", 0, 1, 0), 0),
        (Command.GET_REGISTERS, struct.pack("<HHI", 0, 0, 1), 0),
        (Command.GET_REGISTERS, struct.pack("<HHI", 2, 0, 0) + bytes(4), 0),
        (Command.CONTROL_CMD_RESPONSE, struct.pack("<BBHI", 2, 0, 0, 0), None),
        (Command.CONTROL_CMD_RESPONSE, struct.pack("<BBHI", 1, 2, 0, 0), None),
        (Command.CONTROL_CMD_RESPONSE, struct.pack("<BBHI", 1, 1, 1, 0), None),
        (Command.CONTROL_CMD_RESPONSE, struct.pack("<BBHI", 1, 1, 0, 1), None),
    ],
    "3.10": [
        (Command.CONTROL_VM_EVENTS, struct.pack("<HBBI", EventId.CR, 1, 0, 0), None),
        (Command.CONTROL_VM_EVENTS, struct.pack("<HBBI", 999, 1, 0, 0), None),
    ],
    "3.11": [
        (Command.CONTROL_EVENTS, struct.pack("<HBBI", EventId.UNHOOK, 1, 0, 0), 0),
        (Command.CONTROL_EVENTS, struct.pack("<HBBI", EventId.CREATE_VCPU, 1, 0, 0), 0),
        (Command.CONTROL_EVENTS, struct.pack("<HBBI", 12, 1, 0, 0), 0),
    ],
    "4.36": [
        (Command.CONTROL_EVENTS, struct.pack("<HBBI", EventId.PAUSE_VCPU, 0, 0, 0), 0),
    ],
    "3.13": [
        (Command.CONTROL_CR, struct.pack("<BBHI", 1, 0, 0, 2), 0),
        (Command.CONTROL_CR, struct.pack("<BBHI", 1, 0, 0, 8), 0),
        (Command.CONTROL_CR, struct.pack("<BBHI", 1, 0, 0, 0xFFFFFFFF), 0),
    ],
    "3.14": [
        (Command.CONTROL_MSR, struct.pack("<BBHI", 1, 0, 0, 0x2000), 0),
        (Command.CONTROL_MSR, struct.pack("<BBHI", 1, 0, 0, 0xBFFFFFFF), 0),
        (Command.CONTROL_MSR, struct.pack("<BBHI", 1, 0, 0, 0xC0002000), 0),
        (Command.CONTROL_MSR, struct.pack("<BBHI", 1, 0, 0, 0xFFFFFFFF), 0),
    ],
}


@pytest.mark.parametrize(
    ("command", "payload", "vcpu"),
    [
        pytest.param(command, payload, vcpu, id=f"{command.name.lower()}-{payload.hex()}", marks=pytest.mark.rule(rule))
        for rule, fields in BAD_FIELDS.items()
        for command, payload, vcpu in fields
    ],
)
def test_a_bad_field_is_refused(session: Session, command: int, payload: bytes, vcpu: int | None) -> None:
    assert refusal(session, command, payload, vcpu) == ErrorCode.EINVAL
    assert session.get_version().version == 1
    assert session.get_version().version == 1


@pytest.mark.rule("2.14")
@pytest.mark.parametrize(
    ("command", "size", "vcpu"),
    [(c, size, 0) for c, size in VCPU_COMMANDS.items() if size]
    + [
        (Command.CHECK_COMMAND, 8, None),
        (Command.CHECK_EVENT, 8, None),
        (Command.CONTROL_VM_EVENTS, 8, None),
        (Command.CONTROL_CMD_RESPONSE, 8, None),
        (Command.READ_PHYSICAL, 16, None),
        (Command.WRITE_PHYSICAL, 16, None),
        (Command.GET_PAGE_ACCESS, 8, None),
        (Command.SET_PAGE_ACCESS, 8, None),
        (Command.GET_MTRR_TYPE, 8, None),
    ],
)
def test_a_payload_that_is_too_short_is_refused(session: Session, command: int, size: int, vcpu: int | None) -> None:
    assert refusal(session, command, bytes(size - 1), vcpu) == ErrorCode.EINVAL
    assert session.get_version().version == 1
    assert session.get_version().version == 1


def header(number: int, size: int, seq: int = 1) -> bytes:
    return struct.pack("<HHI", number, size, seq)


FATAL = {
    # by rule
    "2.4": {
        "a size over the limit": header(Command.GET_VERSION, 8185) + bytes(8185),
        "the largest size": header(Command.GET_VERSION, 65535),
    },
    "2.12": {
        "padding1 of the vcpu header": header(Command.GET_VCPU_INFO, 8) + struct.pack("<HHI", 0, 1, 0),
        "padding2 of the vcpu header": header(Command.GET_VCPU_INFO, 8) + struct.pack("<HHI", 0, 0, 1),
    },
    "2.11": {
        "no vcpu header": header(Command.GET_VCPU_INFO, 0),
        "half a vcpu header": header(Command.GET_VCPU_INFO, 4) + bytes(4),
    },
    "3.26": {
        "a read that leaves its page": header(Command.READ_PHYSICAL, 16) + struct.pack("<QQ", 0x1FFF, 2),
        "a read of nothing": header(Command.READ_PHYSICAL, 16) + struct.pack("<QQ", 0x1000, 0),
        "a read of more than a page": header(Command.READ_PHYSICAL, 16) + struct.pack("<QQ", 0x1000, 4097),
        "a read whose end wraps": header(Command.READ_PHYSICAL, 16) + struct.pack("<QQ", 0x1001, 2**64 - 1),
    },
    "3.29": {
        "a write that leaves its page": header(Command.WRITE_PHYSICAL, 18) + struct.pack("<QQ", 0x1FFF, 2) + b"xx",
        "a write without its data": header(Command.WRITE_PHYSICAL, 17) + struct.pack("<QQ", 0x1000, 2) + b"x",
    },
    "2.16": {
        "a reply that nobody waits for": header(Command.EVENT_REPLY, 16) + bytes(16),
    },
}


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(data, id=name, marks=pytest.mark.rule("2.8", rule))
        for rule, messages in FATAL.items()
        for name, data in messages.items()
    ],
)
def test_a_message_that_is_none_ends_the_session(session: Session, guest: LiveGuest, data: bytes) -> None:
    session.send_raw(data)
    await_end(session)
    guest.goes_on()


@pytest.mark.rule("2.17")
@pytest.mark.parametrize("seed", range(5))
def test_garbage_leaves_the_guest_alone(guest: LiveGuest, hooked: Callable[..., Session], seed: int) -> None:
    session = hooked(guest, allow="observe")
    session.send_raw(random.Random(seed).randbytes(4096))
    session.close()
    guest.goes_on()


@pytest.mark.rule("2.6")
@pytest.mark.parametrize("sent", [1, 7, 8, 12])
def test_an_introspector_that_dies_within_a_message_ends_its_session(
    guest: LiveGuest, hooked: Callable[..., Session], sent: int
) -> None:
    session = hooked(guest)
    session.send_raw((header(Command.CHECK_COMMAND, 8) + bytes(8))[:sent])
    session.close()
    assert hooked(guest).get_version().version == 1
    guest.goes_on()


@pytest.mark.rule("2.7")
def test_an_introspector_that_stops_within_a_message_does_not_stop_the_guest(wire: Wire, guest: LiveGuest) -> None:
    message = header(Command.CHECK_COMMAND, 8, seq=7) + struct.pack("<HHI", Command.GET_VERSION, 0, 0)
    wire.send_raw(message[:12])
    guest.goes_on()
    wire.send_raw(message[12:])
    assert wire.receive() == (Command.CHECK_COMMAND, 7, bytes(8))


@pytest.mark.rule("2.24")
def test_an_introspector_that_does_not_read_can_be_unhooked_by_force(
    session: Session, guest: LiveGuest, handle: VmHandle
) -> None:
    session.timeout = 2
    request = header(Command.READ_PHYSICAL, 16) + struct.pack("<QQ", 0x7000, 4096)
    with pytest.raises(SessionTimeout):
        session.send_raw(request * 100_000)
    handle.unhook_force()
    guest.goes_on()
