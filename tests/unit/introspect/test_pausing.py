# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pausing a VM holds each of its vCPUs; a step lets one of them make one instruction."""

import pytest

from kvmi_host.introspect import Pause
from kvmi_host.protocol import CommandError, ErrorCode, EventId
from kvmi_host.testing.peer import next_reply


def take(session, pause):
    """The next event: whether it was kept. It is answered if it was not."""
    event = session.next_event()
    kept = pause.keep(event)
    if not kept:
        session.reply(event)
    return event, kept


@pytest.fixture
def paused(pair):
    kernel, session = pair(vcpus=2)
    pause = Pause(session)
    pause.pause()
    assert [take(session, pause)[1] for _ in range(2)] == [True, True]
    return kernel, session, pause


def test_pause_holds_every_vcpu(paused):
    _, session, pause = paused
    assert pause.on
    assert {vcpu: event.event for vcpu, event in pause.held.items()} == dict.fromkeys((0, 1), EventId.PAUSE_VCPU)
    assert session.next_event(0) is None


def test_resume_lets_them_go(paused):
    kernel, session, pause = paused
    pause.resume()
    assert (pause.on, pause.held) == (False, {})
    session.get_version()  # the replies were taken before this is answered
    assert [vcpu.waiting for vcpu in kernel._vcpus] == [None, None]


def test_other_events_are_answered_while_it_is_paused(pair):
    kernel, session = pair()
    pause = Pause(session)
    replies = kernel.fire(EventId.HYPERCALL)
    pause.pause()
    event, kept = take(session, pause)
    assert (event.event, kept) == (EventId.HYPERCALL, False)
    assert next_reply(replies) is not None
    event, kept = take(session, pause)
    assert (event.event, kept) == (EventId.PAUSE_VCPU, True)


def test_a_vcpu_is_asked_once_however_often_pause_is_said(paused):
    _, session, pause = paused
    pause.pause()
    session.get_version()
    assert session.waiting == 0


def test_a_pause_that_comes_after_resume_is_answered(pair):
    _, session = pair()
    pause = Pause(session)
    pause.pause()
    pause.resume()
    assert take(session, pause)[1] is False


def test_paused_again_before_the_first_pause_came_it_is_held_by_that(pair):
    _, session = pair()
    pause = Pause(session)
    pause.pause()
    pause.resume()
    pause.pause()
    assert take(session, pause)[1] is True
    assert session.next_event(0) is None


def test_a_vcpu_that_was_not_started_is_left_alone(pair):
    _, session = pair(vcpus=2, not_started={1})
    pause = Pause(session)
    pause.pause()
    take(session, pause)
    assert list(pause.held) == [0]


def test_a_session_that_may_not_pause_is_told_and_holds_nothing(pair):
    _, session = pair(events=[EventId.CR])
    pause = Pause(session)
    with pytest.raises(CommandError) as refused:
        pause.pause()
    assert refused.value.code == ErrorCode.EPERM
    assert not pause.on


def test_a_step_lets_one_vcpu_make_one_instruction(paused):
    kernel, session, pause = paused
    pause.step(1)
    assert list(pause.held) == [0]
    assert kernel.enabled(EventId.SINGLESTEP, 1)
    assert not kernel.enabled(EventId.SINGLESTEP, 0)
    session.get_version()
    replies = kernel.fire(EventId.SINGLESTEP, vcpu=1)
    event, kept = take(session, pause)
    assert (event.event, kept, list(pause.held)) == (EventId.SINGLESTEP, True, [0, 1])
    assert not kernel.enabled(EventId.SINGLESTEP, 1)
    assert replies.empty()


def test_what_the_instruction_does_is_answered_and_the_step_goes_on(paused):
    kernel, session, pause = paused
    pause.step(0)
    session.get_version()
    replies = kernel.fire(EventId.HYPERCALL)
    assert take(session, pause)[1] is False
    next_reply(replies)
    kernel.fire(EventId.SINGLESTEP)
    assert take(session, pause)[1] is True


def test_a_step_that_has_not_ended_is_called_off_by_resume(paused):
    kernel, session, pause = paused
    pause.step(0)
    pause.resume()
    assert not kernel.enabled(EventId.SINGLESTEP)
    kernel.fire(EventId.SINGLESTEP)  # was on its way
    assert take(session, pause)[1] is False


def test_steps_that_are_watched_anyway_stay_on(pair):
    kernel, session = pair()
    pause = Pause(session, steps_are_watched=True)
    pause.pause()
    take(session, pause)
    pause.step(0)
    session.get_version()
    kernel.fire(EventId.SINGLESTEP)
    assert take(session, pause)[1] is True
    assert kernel.enabled(EventId.SINGLESTEP)


def test_a_vcpu_that_runs_cannot_be_stepped(pair):
    _, session = pair()
    with pytest.raises(ValueError, match="vCPU 0 is not held"):
        Pause(session).step(0)


def test_a_step_that_is_not_allowed_leaves_the_vcpu_held(pair):
    _, session = pair(events=[EventId.PAUSE_VCPU])
    pause = Pause(session)
    pause.pause()
    take(session, pause)
    with pytest.raises(CommandError):
        pause.step(0)
    assert list(pause.held) == [0]
