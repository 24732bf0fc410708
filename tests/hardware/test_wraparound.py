# SPDX-License-Identifier: LGPL-2.1-or-later
"""Event numbers at the end of their 32 bits, and which reply belongs to which event when several vCPUs wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmi_host.introspect import Session
from kvmi_host.protocol import Command, Event, EventId, messages
from kvmi_host.protocol.events import encode_reply
from kvmi_host.protocol.framing import frame
from kvmi_host.testing.live import LiveGuest, Walker, Wire, await_end, hook_socket
from kvmi_host.testing.modewalk import Actions, Station

pytestmark = pytest.mark.hardware

FIRST = Path("/sys/module/kvm/parameters/introspection_first_seq")
LAST = 2**32 - 1


@pytest.fixture
def first(request: pytest.FixtureRequest) -> Iterator[Callable[[int], None]]:
    """Sets the number of the first event of the sessions to come."""
    before = FIRST.read_text()

    def set_it(number: int) -> None:
        FIRST.write_text(str(number))

    yield set_it
    FIRST.write_text(before)


def reply(event: Event, *, seq: int | None = None, vcpu: int | None = None) -> bytes:
    """A reply with another number, or for another vCPU."""
    payload = encode_reply(event)
    if vcpu is not None:
        payload = vcpu.to_bytes(2, "little") + payload[2:]
    return frame(Command.EVENT_REPLY, event.seq if seq is None else seq, payload)


def every_vcpu_waits(walker: Walker) -> dict[int, Event]:
    """By vCPU, the events of their hypercalls, which wait for their replies."""
    for vcpu in walker.vcpus:
        walker.hold(vcpu, Station.LONG64, Actions.HYPERCALL)
    walker.enable(EventId.HYPERCALL)
    return {event.vcpu: event for event in (walker.event() for _ in walker.vcpus)}


# -- the end of the count


@pytest.mark.rule("4.42", "4.39")
def test_the_events_of_four_vcpus_are_counted_across_the_end_and_answered(
    guest: LiveGuest, hooked: Callable[..., Session], first: Callable[[int], None]
) -> None:
    before, after = 40, 40
    first(LAST + 1 - before)
    walker = Walker(hooked(guest), guest.vcpus)
    every = every_vcpu_waits(walker)
    for event in every.values():
        walker.session.reply(event)
    events = [*every.values(), *walker.answered(before + after - len(every))]
    assert [event.seq for event in events] == [*range(LAST + 1 - before, LAST + 1), *range(after)]
    assert set(Counter(event.vcpu for event in events[before:])) == set(walker.vcpus)


@pytest.mark.rule("4.42", "4.52")
def test_vcpus_that_wait_on_both_sides_of_the_end_are_answered_in_any_order(
    guest: LiveGuest, hooked: Callable[..., Session], first: Callable[[int], None]
) -> None:
    first(LAST - 1)
    walker = Walker(hooked(guest), guest.vcpus)
    waiting = every_vcpu_waits(walker)
    assert sorted(event.seq for event in waiting.values()) == [0, 1, LAST - 1, LAST]
    for event in sorted(waiting.values(), key=lambda event: event.seq):
        walker.session.reply(event)
        assert walker.event().vcpu == event.vcpu


@pytest.mark.rule("4.42", "4.44")
@pytest.mark.parametrize(
    ("number", "wrong"), [(LAST, 0), (0, LAST), (0, 1), (1, 0)], ids=["soon", "passed", "next", "last"]
)
def test_the_end_of_the_count_excuses_no_other_number(
    guest: LiveGuest, hooked: Callable[..., Session], first: Callable[[int], None], number: int, wrong: int
) -> None:
    first(number)
    session = hooked(guest)
    walker = Walker(session, 1)
    walker.enable(EventId.HYPERCALL, 0)
    event = walker.event()
    assert event.seq == number
    session.send_raw(reply(event, seq=wrong))
    await_end(session)
    guest.goes_on()


@pytest.mark.rule("4.40")
def test_a_session_goes_on_counting_where_it_began(
    guest: LiveGuest, hooked: Callable[..., Session], first: Callable[[int], None]
) -> None:
    walker = Walker(hooked(guest), guest.vcpus)
    first(LAST)
    walker.enable(EventId.HYPERCALL, 0)
    assert [event.seq for event in walker.answered(3)] == [1, 2, 3]


# -- whose reply it is


@pytest.mark.rule("4.43", "4.52")
@pytest.mark.parametrize("order", ["as they came", "the other way round"])
def test_each_waiting_vcpu_takes_its_own_reply(walker: Walker, order: str) -> None:
    waiting = every_vcpu_waits(walker)
    events = sorted(waiting.values(), key=lambda event: event.seq, reverse=order != "as they came")
    for event in events:
        walker.session.reply(event)
        assert walker.event().vcpu == event.vcpu


@pytest.mark.rule("4.46", "2.21")
def test_a_reply_with_the_number_of_another_vcpus_event_ends_the_session(walker: Walker, guest: LiveGuest) -> None:
    waiting = every_vcpu_waits(walker)
    walker.session.send_raw(reply(waiting[0], seq=waiting[1].seq))
    await_end(walker.session)
    guest.goes_on()


@pytest.mark.rule("4.46", "2.21")
def test_a_reply_for_another_vcpu_that_waits_ends_the_session(walker: Walker, guest: LiveGuest) -> None:
    waiting = every_vcpu_waits(walker)
    walker.session.send_raw(reply(waiting[0], vcpu=1))
    await_end(walker.session)
    guest.goes_on()


@pytest.mark.rule("4.44", "4.45")
def test_a_reply_that_was_taken_is_none_for_the_vcpus_next_event(walker: Walker, guest: LiveGuest) -> None:
    walker.hold(0, Station.LONG64, Actions.HYPERCALL)
    walker.enable(EventId.HYPERCALL, 0)
    old = walker.event()
    walker.session.reply(old)
    walker.event()
    walker.session.send_raw(reply(old))
    await_end(walker.session)
    guest.goes_on()


@pytest.mark.rule("4.44", "4.40")
def test_a_reply_to_an_event_of_the_last_session_is_none_in_this_one(
    guest: LiveGuest, hooked: Callable[..., Session]
) -> None:
    last = Walker(hooked(guest), guest.vcpus)
    last.hold(0, Station.LONG64, Actions.HYPERCALL)
    last.enable(EventId.HYPERCALL, 0)
    *_, old = (event for event in last.answered(5))
    last.session.close()
    session = hooked(guest)
    walker = Walker(session, guest.vcpus)
    walker.enable(EventId.HYPERCALL, 0)
    walker.event()
    session.send_raw(reply(old))
    await_end(session)
    guest.goes_on()


@pytest.mark.rule("4.43", "2.1")
def test_a_command_with_an_events_number_is_no_reply_to_it(guest: LiveGuest, walker: Walker) -> None:
    walker.session.close()
    with hook_socket(guest) as sock:
        wire = Wire(sock)
        enable = messages.control_events(0, EventId.HYPERCALL, True)
        wire.send(enable.command, enable.payload, 7)
        assert wire.receive().seq == 7
        event = wire.receive()
        assert (event.id, event.seq) == (Command.EVENT, 1)
        asked = messages.vcpu_info(0)
        for _ in range(3):
            wire.send(asked.command, asked.payload, event.seq)
            answer = wire.receive()
            assert (answer.id, answer.seq) == (asked.command, event.seq)
        wire.send_raw(reply(Event(event.seq, event.payload)))
        assert wire.receive().seq == 2
