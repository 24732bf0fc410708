# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which dialect a kernel speaks, and what v7 lays out otherwise, against vectors written by hand from the protocol's
tables."""

import pytest

from kvmi_host.protocol import (
    Connection,
    Event,
    EventId,
    EventV7,
    Features,
    PageFault,
    ProtocolError,
    SingleStep,
    State,
    Trap,
    TrapV7,
    UnsupportedDialect,
    frame,
    messages,
)
from kvmi_host.protocol.dialects import V6, V7, V12
from kvmi_host.protocol.events import encode_reply

V6_VERSION = "01000000 00000000"
V7_VERSION = "01000000 00000000  01 00 01 00 00000000"
V12_VERSION = "01000000 f81f0000"


def body(kind: int, own: str = "", size: str = "2002") -> bytes:
    """An event of vCPU 3 in mode 8 and view 0x102, with nothing in its registers."""
    return bytes.fromhex(f"{size} 0300 {kind:02x} 000000  08 00 0201 00000000") + bytes(528) + bytes.fromhex(own)


@pytest.mark.parametrize(
    ("answer", "meaning"),
    [
        (V6_VERSION, (1, "v6", None)),
        (V6_VERSION + "ffffffff", (1, "v6", None)),
        (V7_VERSION, (1, "v7", Features(spp=1, vmfunc=0, eptp=1, ve=0))),
        (V7_VERSION + "ffffffff", (1, "v7", Features(spp=1, vmfunc=0, eptp=1, ve=0))),
        (V12_VERSION, (1, "v12", None)),
    ],
)
def test_the_shape_of_get_versions_answer_is_the_dialect(answer, meaning):
    assert messages.get_version().decode(bytes.fromhex(answer)) == meaning


@pytest.mark.parametrize(("answer", "field"), [("", "version"), ("010000", "version"), ("01000000 000000", "padding")])
def test_a_short_answer_names_the_field_that_is_missing(answer, field):
    with pytest.raises(ProtocolError, match=field):
        messages.get_version().decode(bytes.fromhex(answer))


def test_another_version_is_refused_by_its_number():
    with pytest.raises(ProtocolError, match="version 2, kvmi-host 1"):
        messages.get_version().decode(bytes.fromhex("02000000 00000000"))


def asked(answer: str, error: str = "00000000") -> Connection:
    """A connection to which GET_VERSION's answer has come."""
    connection = Connection()
    connection.command(messages.get_version())
    connection.receive_data(frame(2, 1, bytes.fromhex(error + "00000000" + answer)))
    return connection


def test_a_connection_takes_the_kernel_to_speak_v6():
    assert Connection().dialect is V6


@pytest.mark.parametrize(("answer", "dialect"), [(V6_VERSION, V6), (V7_VERSION, V7)])
def test_a_connection_learns_the_dialect_from_the_answer(answer, dialect):
    connection = asked(answer)
    connection.next_message()
    assert connection.dialect is dialect


def test_a_refusal_of_get_version_changes_nothing():
    connection = asked("", error="ffffffff")
    connection.next_message()
    assert connection.dialect is V6


def test_v12_is_refused_by_name():
    connection = asked(V12_VERSION)
    with pytest.raises(UnsupportedDialect, match=r"KVMI v12.*kvmi-host speaks v6 and v7"):
        connection.next_message()
    assert connection.state is State.BROKEN


def test_a_connection_cannot_be_told_to_speak_v12():
    with pytest.raises(UnsupportedDialect, match="v12"):
        Connection(V12)


@pytest.mark.parametrize(("dialect", "kind"), [(V6, Event), (V7, EventV7)])
def test_events_are_read_as_the_dialect_lays_them_out(dialect, kind):
    connection = Connection(dialect)
    connection.receive_data(frame(1, 1, body(EventId.HYPERCALL)))
    assert type(connection.next_message()) is kind


def test_v7_has_v6s_commands_and_events_and_more():
    assert V7.commands - V6.commands == {28, *range(30, 45), 60, 63}
    assert V7.events - V6.events == {13}


# -- v7's events


def test_the_view_is_at_offset_2_of_the_arch_part():
    event = EventV7(1, body(EventId.HYPERCALL))
    assert (event.mode, event.view, event.vcpu) == (8, 0x102, 3)


@pytest.mark.parametrize(
    ("kind", "own", "meaning"),
    [
        (EventId.TRAP, "0e 00 0000 02000000 ef00000000000000", TrapV7(14, 2, 0xEF)),
        (EventId.SINGLESTEP, "01 00000000000000", SingleStep(1)),
        (EventId.PF, "0100000000000000 0200000000000000 04 00 0500 00000000", PageFault(1, 2, 4, 5)),
        (EventId.HYPERCALL, "", None),
        (13, "0011223344556677", None),
    ],
)
def test_own_data_is_what_v7_says(kind, own, meaning):
    assert EventV7(1, body(kind, own)).data == meaning
    assert EventV7(1, body(kind, own + "eeee")).data == meaning


@pytest.mark.parametrize(
    ("kind", "own", "field"),
    [
        (EventId.TRAP, "0e 00 0000 02000000", "cr2"),
        (EventId.TRAP, "0e 00 0000 020000", "error_code"),
        (EventId.TRAP, "", "vector"),
        (EventId.SINGLESTEP, "", "failed"),
    ],
)
def test_short_own_data_names_the_field_that_v7_has_there(kind, own, field):
    with pytest.raises(ProtocolError, match=f"before its field '{field}'"):
        EventV7(1, body(kind, own))


def test_a_short_event_names_the_view():
    with pytest.raises(ProtocolError, match="'view'"):
        EventV7(1, body(EventId.HYPERCALL)[:11])


def test_v6_reads_the_same_bytes_its_own_way():
    own = "0e000000 03000000 02000000 00000000 ef00000000000000"
    assert Event(1, body(EventId.TRAP, own)).data == Trap(14, 3, 2, 0xEF)
    assert Event(1, body(EventId.SINGLESTEP)).data is None


def test_the_event_that_v7_adds_has_its_name():
    assert "cpuid" in repr(EventV7(1, body(13)))


def test_a_reply_is_laid_out_as_in_v6():
    event = EventV7(1, body(EventId.TRAP, "0e 00 0000 02000000 ef00000000000000"))
    assert encode_reply(event) == bytes.fromhex("0300 0000 00000000  00 07 0000 00000000")
