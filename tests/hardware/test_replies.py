# SPDX-License-Identifier: LGPL-2.1-or-later
"""Replies to events: what is accepted, what ends the session, and that the guest goes on either way."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from kvmi_host.introspect import Session
from kvmi_host.protocol import Action, Event, EventId
from kvmi_host.testing.live import LiveGuest, Walker, await_end
from kvmi_host.testing.modewalk import Actions, Station

pytestmark = pytest.mark.hardware

NEW = struct.Struct("<Q")


def reply(
    event: Event,
    own: bytes = b"",
    *,
    seq: int | None = None,
    vcpu: int | None = None,
    vcpu_padding: tuple[int, int] = (0, 0),
    action: int = Action.CONTINUE,
    padding: tuple[int, int] = (0, 0),
    common: int = 8,
) -> bytes:
    """A reply, byte by byte. `common`: how much of kvmi_event_reply to send."""
    body = struct.pack("<HHI", event.vcpu if vcpu is None else vcpu, *vcpu_padding)
    body += struct.pack("<BBHI", action, event.event, *padding)[:common] + own
    return struct.pack("<HHI", 0, len(body), event.seq if seq is None else seq) + body


def held(session: Session, station: Station = Station.PROT32, actions: Actions = Actions.CR3) -> Walker:
    """vCPU 0 held at a station without paging, with its CR3 writes watched."""
    walker = Walker(session, 1)
    walker.hold(0, station, actions)
    if actions & Actions.CR3:
        walker.enable(EventId.CR, 0, cr=3)
    if actions & Actions.HYPERCALL:
        walker.enable(EventId.HYPERCALL, 0)
    return walker


INVALID: dict[str, dict[str, Callable[[Event], bytes]]] = {
    # by rule
    "4.44": {
        "an older seq": lambda e: reply(e, NEW.pack(e.data.new), seq=e.seq - 1),
        "a seq to come": lambda e: reply(e, NEW.pack(e.data.new), seq=e.seq + 1),
        "seq zero": lambda e: reply(e, NEW.pack(e.data.new), seq=0),
    },
    "4.47": {
        "padding1": lambda e: reply(e, NEW.pack(e.data.new), padding=(1, 0)),
        "padding2": lambda e: reply(e, NEW.pack(e.data.new), padding=(0, 1)),
        "padding1 of the vcpu header": lambda e: reply(e, NEW.pack(e.data.new), vcpu_padding=(1, 0)),
        "padding2 of the vcpu header": lambda e: reply(e, NEW.pack(e.data.new), vcpu_padding=(0, 1)),
    },
    "4.48": {
        "one byte too many": lambda e: reply(e, NEW.pack(e.data.new) + b"\0"),
        "own data of another event": lambda e: reply(e, bytes(280)),
    },
    "4.56": {
        "no event field": lambda e: reply(e, common=1),
        "no action": lambda e: reply(e, common=0),
        "nothing": lambda e: struct.pack("<HHI", 0, 0, e.seq),
        "half a vcpu header": lambda e: struct.pack("<HHI", 0, 4, e.seq) + bytes(4),
    },
    "4.46": {
        "another vcpu": lambda e: reply(e, NEW.pack(e.data.new), vcpu=1),
        "no such vcpu": lambda e: reply(e, NEW.pack(e.data.new), vcpu=4),
    },
    "4.45": {
        "twice": lambda e: 2 * reply(e, NEW.pack(e.data.new)),
    },
}


@pytest.mark.parametrize(
    "invalid",
    [
        pytest.param(invalid, id=name, marks=pytest.mark.rule("4.49", rule))
        for rule, replies in INVALID.items()
        for name, invalid in replies.items()
    ],
)
def test_an_invalid_reply_ends_the_session_and_the_guest_goes_on(
    invalid: Callable[[Event], bytes], guest: LiveGuest, hooked: Callable[..., Session]
) -> None:
    session = hooked(guest)
    walker = held(session)
    event = walker.event()
    session.send_raw(invalid(event))
    await_end(session)
    guest.goes_on()
    # The guest can be hooked again, and the write that was asked about has been done as the guest wanted it.
    again = Walker(hooked(guest), guest.vcpus)
    again.advances(0)
    assert again.record(0).exception == 0


@pytest.mark.rule("4.55")
@pytest.mark.parametrize("size", [2, 3, 4, 6, 7], ids="{} bytes".format)
def test_a_short_common_part_is_accepted_and_its_rest_is_zero(session: Session, size: int) -> None:
    walker = held(session, Station.LONG64, Actions.HYPERCALL)
    for _ in range(3):
        session.send_raw(reply(walker.event(), common=size))
    walker.session.reply(walker.event())


@pytest.mark.rule("4.57")
@pytest.mark.parametrize("padding", [(1, 0), (0, 1)], ids=["padding1", "padding2"])
def test_a_short_common_part_is_still_checked(session: Session, padding: tuple[int, int]) -> None:
    walker = held(session, Station.LONG64, Actions.HYPERCALL)
    session.send_raw(reply(walker.event(), padding=padding, common=5 if padding[1] else 3))
    await_end(session)


@pytest.mark.rule("4.58")
def test_a_short_common_part_admits_no_own_data(session: Session) -> None:
    # Eight bytes of own data after six of the common part are taken for the two that miss, and six more.
    walker = held(session)
    event = walker.event()
    session.send_raw(reply(event, NEW.pack(0xFFFF_FFFF_FFFF_FFFF), common=6))
    await_end(session)


@pytest.mark.rule("4.54")
@pytest.mark.parametrize("size", [0, 1, 4, 7, 8], ids="{} bytes".format)
def test_what_is_missing_of_the_own_data_counts_as_zero(session: Session, size: int) -> None:
    walker = held(session)
    value = 0x0000_0000_1234_5000
    session.send_raw(reply(walker.event(), NEW.pack(value)[:size]))
    after = walker.event()
    assert after.data.old == int.from_bytes(NEW.pack(value)[:size], "little")
    walker.session.reply(after)


@pytest.mark.rule("4.5", "4.3", "4.75")
def test_the_new_value_of_a_reply_is_what_is_written(session: Session) -> None:
    walker = held(session)
    for value in (0x1000, 0x7FFF000, 0x5000):
        event = walker.event()
        assert event.data.new != value
        session.reply(event, new_val=value)
        after = walker.event()
        assert after.data.old == after.cr3 == value
        session.reply(after)


@pytest.mark.rule("4.5", "4.11")
def test_a_new_value_that_changes_nothing_keeps_the_old_one(session: Session) -> None:
    walker = held(session)
    event = walker.event()
    session.reply(event, new_val=event.data.old)
    # The guest's second write now sets what is there already: that is no change, so no event.
    after = walker.event()
    assert (after.data.old, after.data.new) == (event.data.old, event.data.new)
    session.reply(after)


@pytest.mark.rule("4.6")
def test_a_new_value_that_the_register_does_not_take_faults_in_the_guest(
    own_guest: LiveGuest, hooked: Callable[..., Session]
) -> None:
    walker = Walker(hooked(own_guest), 1)
    walker.hold(0, Station.PROT32, Actions.CR4)
    walker.enable(EventId.CR, 0, cr=4)
    walker.session.reply(walker.event(), new_val=1 << 63)
    own_guest.await_line(lambda line: line.startswith("modewalk: vcpu 0 exception 13"), since=0)
    assert walker.record(0).exception == 13


@pytest.mark.rule("4.50")
@pytest.mark.parametrize("action", [Action.RETRY, 3, 255])
def test_an_action_that_the_event_does_not_accept_means_continue(session: Session, action: int) -> None:
    walker = held(session)
    event = walker.event()
    session.send_raw(reply(event, NEW.pack(event.data.new), action=action))
    after = walker.event()
    assert after.data.old == event.data.new
    session.reply(after)


@pytest.mark.rule("4.37")
def test_crash_kills_the_vm_at_once(own_guest: LiveGuest, hooked: Callable[..., Session]) -> None:
    session = hooked(own_guest)
    walker = held(session, Station.LONG64, Actions.HYPERCALL)
    session.reply(walker.event(), Action.CRASH)
    assert own_guest.wait() == -9
    await_end(session)
