# SPDX-License-Identifier: LGPL-2.1-or-later
"""What takes several messages, without I/O.

A plan is a generator. It yields what is to be done next, a :data:`Step`, and is sent what came of it, or has the error
thrown in; what it returns is its result. :func:`run` carries a plan out on a blocking session, :func:`run_async` on an
asyncio one: what the two have in common is written once, as plans.

========================  ==========================================  ================================
a step                    means                                       is sent
========================  ==========================================  ================================
a tuple of requests       send the commands in one go                 their results, in a list
... and replies           answer events in between                    None in their places
a reply                   answer an event                             None
:class:`Listen`           wait for the next event                     it, or None: none came in time
========================  ==========================================  ================================
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from kvmi_host.protocol import CommandError, Event, KvmiError, Reply, Request, messages

if TYPE_CHECKING:
    from kvmi_host.introspect.async_session import AsyncSession
    from kvmi_host.introspect.session import Session

T = TypeVar("T")


class Listen(NamedTuple):
    """Wait for an event for so many seconds; None: as long as the session waits for an answer."""

    timeout: float | None = None


Step = tuple[Request[Any] | Reply, ...] | Reply | Listen
Plan = Generator[Step, Any, T]


def ask(request: Request[T]) -> Plan[T]:
    """The result of one command."""
    (result,) = yield (request,)
    return result  # type: ignore[no-any-return]


def ask_all(requests: Sequence[Request[T]]) -> Plan[list[T]]:
    """The results of commands that do not depend on each other, sent in one go."""
    return (yield tuple(requests))  # type: ignore[no-any-return]


def quietly(*messages_: Request[None] | Reply) -> Plan[None]:
    """Commands and replies in one write, without answers to the commands: nobody waits for them in between.

    :raise CommandError: a command is not allowed, or not there. Other refusals are not heard of.
    """
    yield (messages.control_cmd_response(False, now=True), *messages_, messages.control_cmd_response(True, now=True))


def allowed(check: Request[None]) -> Plan[bool]:
    """Whether the kernel says yes to a CHECK_COMMAND or CHECK_EVENT."""
    try:
        yield (check,)
    except CommandError:
        return False
    return True


def listen(timeout: float | None = None) -> Plan[Event | None]:
    """The next event, or None."""
    return (yield Listen(timeout))  # type: ignore[no-any-return]


def run(session: Session, plan: Plan[T], heard: Callable[[Event], None] | None = None) -> T:
    """Carry a plan out.

    :param heard: is told of each event that the plan listens to.
    :raise KvmiError: what the plan does not take care of.
    """
    outcome: Any = None
    error: KvmiError | None = None
    try:
        while True:
            step = plan.send(outcome) if error is None else plan.throw(error)
            outcome, error = None, None
            try:
                outcome = _take(session, step)
                if heard and isinstance(outcome, Event):
                    heard(outcome)
            except KvmiError as failure:
                error = failure
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


async def run_async(session: AsyncSession, plan: Plan[T]) -> T:
    """Carry a plan out.

    :raise KvmiError: what the plan does not take care of.
    """
    outcome: Any = None
    error: KvmiError | None = None
    try:
        while True:
            step = plan.send(outcome) if error is None else plan.throw(error)
            outcome, error = None, None
            try:
                outcome = _take(session, step)
                if isawaitable(outcome):
                    outcome = await outcome
            except KvmiError as failure:
                error = failure
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


def _take(session: Session | AsyncSession, step: Step) -> Any:
    """Take a step: what came of it, or on an asyncio session what there is to await."""
    if isinstance(step, Listen):
        return session.next_event(step.timeout)
    if isinstance(step, Reply):
        return session.reply(step.event, step.action, new_val=step.new_val, page_fault=step.page_fault)
    return session.ask_all(step)
