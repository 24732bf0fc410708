# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watching a whole VM, and keeping account of its events."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmi_host.attach import event_id
from kvmi_host.introspect import SeqLedger, SessionClosed, Wanted, Watch, serve
from kvmi_host.introspect.ledger import REMEMBERED
from kvmi_host.protocol import Action, Command, CommandError, EventId
from kvmi_host.testing.peer import next_reply

CR3 = Wanted(frozenset({EventId.CR, EventId.CREATE_VCPU}), frozenset({3}))


def test_names_say_what_to_watch():
    wanted = Wanted.parse(["cr3", "hypercall", "pause"], event_id)
    assert wanted == Wanted(frozenset({EventId.CR, EventId.HYPERCALL}), frozenset({3}), pause=True)
    assert Wanted.parse(["cr"], event_id).control_registers == {0, 3, 4}
    msrs = Wanted.parse(["msr:lstar", "msr:0x174", "breakpoint"], event_id)
    assert msrs == Wanted(frozenset({EventId.MSR, EventId.BREAKPOINT}), msrs=frozenset({0xC0000082, 0x174}))


def test_a_name_that_is_no_event_is_refused():
    with pytest.raises(ValueError, match="no event is called 'cr8'"):
        Wanted.parse(["cr8"], event_id)


def test_an_msr_has_to_be_named():
    with pytest.raises(ValueError, match="which MSR"):
        Wanted.parse(["msr"], event_id)


def test_msrs_are_watched_on_every_vcpu_and_then_no_more(pair):
    kernel, session = pair(vcpus=2)
    watch = Watch(session, Wanted.parse(["msr:lstar", "msr:efer"], event_id))
    assert [kernel.watched_msrs(vcpu) for vcpu in (0, 1)] == [{0xC0000082, 0xC0000080}] * 2
    watch.stop()
    assert [kernel.watched_msrs(vcpu) for vcpu in (0, 1)] == [frozenset()] * 2


def test_events_are_switched_on_for_every_vcpu_and_off_again(pair):
    kernel, session = pair(vcpus=3)
    watch = Watch(session, CR3)
    assert kernel.enabled(EventId.CREATE_VCPU)
    assert all(kernel.enabled(EventId.CR, vcpu) and kernel.watched_registers(vcpu) == {3} for vcpu in range(3))
    watch.stop()
    assert not kernel.enabled(EventId.CREATE_VCPU)
    assert not any(kernel.enabled(EventId.CR, vcpu) or kernel.watched_registers(vcpu) for vcpu in range(3))


def test_a_vcpu_that_starts_later_is_taken_in_then(pair):
    kernel, session = pair(vcpus=2, not_started=[1])
    watch = Watch(session, CR3)
    watch.retry()
    assert not kernel.enabled(EventId.CR, 1)
    kernel.start_vcpu(1)
    watch._retry_at = 0.0
    watch.retry()
    assert kernel.enabled(EventId.CR, 1)


def test_pausing_is_once_for_every_vcpu(pair):
    _, session = pair(vcpus=2)
    Watch(session, Wanted(frozenset(), pause=True))
    events = [session.next_event(1) for _ in range(2)]
    assert {event.vcpu for event in events} == {0, 1}
    assert {event.event for event in events} == {EventId.PAUSE_VCPU}


def test_an_event_that_is_not_allowed_is_an_error(pair):
    _, session = pair(events=[EventId.HYPERCALL])
    with pytest.raises(CommandError, match="control-events: -EPERM"):
        Watch(session, Wanted(frozenset({EventId.CR})))


def test_stopping_lets_go_of_the_vcpus_that_wait(pair):
    kernel, session = pair()
    watch = Watch(session, CR3)
    replies = kernel.fire(EventId.HYPERCALL)
    watch.stop()
    assert next_reply(replies).action == Action.CONTINUE


def test_stopping_a_session_that_has_ended_is_no_error(pair):
    kernel, session = pair()
    watch = Watch(session, CR3)
    kernel.end("the VM died")
    watch.stop()


# -- the event loop


def test_every_event_is_handled_and_answered_continue(pair):
    kernel, session = pair(vcpus=2)
    replies = [kernel.fire(EventId.HYPERCALL, vcpu=vcpu) for vcpu in (0, 1)]
    handled = []
    assert serve(session, handled.append, lambda: len(handled) == 2) is False
    assert [next_reply(reply).action for reply in replies] == [Action.CONTINUE] * 2


def test_the_guest_goes_on_when_a_handler_raises(pair):
    kernel, session = pair()
    replies = kernel.fire(EventId.HYPERCALL)

    def handler(event):
        raise LookupError("a bug")

    with pytest.raises(LookupError):
        serve(session, handler, lambda: False)
    assert next_reply(replies).action == Action.CONTINUE


def test_unhook_ends_the_loop(pair):
    kernel, session = pair()
    kernel.fire(EventId.UNHOOK)
    assert serve(session, lambda event: None, lambda: False) is True


def test_the_end_of_the_session_ends_the_loop(pair):
    kernel, session = pair()
    kernel.end("the VM died")
    with pytest.raises(SessionClosed):
        serve(session, lambda event: None, lambda: False)


# -- sequence numbers


@given(st.permutations(range(1, 30)))
def test_numbers_in_any_order_have_no_gap_once_all_came(order):
    ledger = SeqLedger()
    for seq in order:
        ledger.enter(seq)
    assert (ledger.seen, ledger.missing, ledger.repeated) == (29, 0, 0)


@given(st.sets(st.integers(1, 60)))
def test_what_is_missing_is_what_has_not_come_below_the_highest(numbers):
    ledger = SeqLedger()
    for seq in numbers:
        ledger.enter(seq)
    assert ledger.missing == max(numbers, default=0) - len(numbers)


@pytest.mark.parametrize("again", [1, 3])
def test_a_number_that_comes_again_is_counted(again):
    ledger = SeqLedger()
    for seq in (1, 3, again):
        ledger.enter(seq)
    assert (ledger.seen, ledger.missing, ledger.repeated) == (2, 1, 1)


def test_a_ledger_does_not_grow_with_the_gaps():
    ledger = SeqLedger()
    for seq in (1, *range(3, 30001, 2), 1 << 30):
        ledger.enter(seq)
    assert (ledger.seen, ledger.missing) == (15001, (1 << 30) - 15001)
    assert len(ledger._gaps) == REMEMBERED


def test_numbers_wrap_at_32_bits():
    ledger = SeqLedger()
    ledger._expected = 0xFFFFFFFE
    for seq in (0xFFFFFFFE, 0xFFFFFFFF, 1, 0):
        ledger.enter(seq)
    assert (ledger.seen, ledger.missing, ledger.repeated) == (4, 0, 0)


def test_command_ids_of_the_simulated_kernel_are_the_protocols(pair):
    _, session = pair()
    absent = {Command.CONTROL_VE, Command.GET_MAP_TOKEN, *range(Command.CONTROL_SPP, Command.SET_PAGE_WRITE_BITMAP + 1)}
    assert {c for c in Command if not session.check_command(c)} == absent | {Command.EVENT_REPLY, Command.EVENT}
