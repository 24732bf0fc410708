# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a session may do. Set once, when it is attached, and enforced by the kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from kvmi_host.protocol import Command, EventId, command_name, event_name
from kvmi_host.protocol.ids import ALWAYS_ALLOWED, CHANGES_THE_GUEST

_EVENT_PREFIX = "event:"


@dataclass(frozen=True, slots=True)
class Policy:
    """``commands`` and ``events`` by id; None: all that the kernel has.

    :ivar observe: the session is hooked with the OBSERVE flag: nothing it says can change the guest, and the commands
        that would are not among "all".
    :ivar name: where it comes from, for people: a profile, a policy file's path, or ``list``.
    """

    observe: bool
    commands: frozenset[int] | None = None
    events: frozenset[int] | None = None
    name: str = field(default="list", compare=False)


OBSERVE = Policy(observe=True, name="observe")
FULL = Policy(observe=False, name="full")
PROFILES = {policy.name: policy for policy in (OBSERVE, FULL)}

Allow = str | Iterable[str | int] | Policy
"""What :func:`policy_for` takes."""

_ALL_COMMANDS = frozenset(int(command) for command in Command if command > Command.EVENT) - ALWAYS_ALLOWED
_ALL_EVENTS = frozenset(int(event) for event in EventId)


def policy_for(allow: Allow) -> Policy:
    """A policy from what people write: a profile (``observe``, ``full``), or a list of names or command ids.

    A list names commands (``get-registers``) and, as ``event:cr``, events; if it names no event, all are allowed. It is
    observing unless it names a command that changes the guest. As one string, commas separate the names.

    :raise ValueError: a name is not known.
    """
    if isinstance(allow, Policy):
        return allow
    if isinstance(allow, str):
        if allow in PROFILES:
            return PROFILES[allow]
        allow = [name.strip() for name in allow.split(",") if name.strip()]
    commands: set[int] = set()
    events: set[int] = set()
    for item in allow:
        if isinstance(item, str) and item.startswith(_EVENT_PREFIX):
            events.add(event_id(item.removeprefix(_EVENT_PREFIX)))
        else:
            commands.add(command_id(item) if isinstance(item, str) else item)
    return Policy(
        observe=not commands & CHANGES_THE_GUEST,
        commands=frozenset(commands - ALWAYS_ALLOWED),
        events=frozenset(events) or None,
    )


def within(asked: Policy, ceiling: Policy) -> Policy:
    """`asked`, if `ceiling` has all of it. A list that names no event asks for those that the ceiling has.

    :raise ValueError: it asks for more; the message is what.
    """
    if asked.events is None and asked.commands is not None:
        asked = replace(asked, events=ceiling.events)
    commands, events = asked.commands, asked.events
    if commands is None:
        commands = _ALL_COMMANDS - CHANGES_THE_GUEST if asked.observe else _ALL_COMMANDS
    if events is None:
        events = _ALL_EVENTS
    changing = commands & CHANGES_THE_GUEST if ceiling.observe else frozenset()
    more_commands = changing if ceiling.commands is None else changing | commands - ceiling.commands
    more_events = frozenset() if ceiling.events is None else events - ceiling.events
    more = [*map(command_name, sorted(more_commands)), *(_EVENT_PREFIX + event_name(e) for e in sorted(more_events))]
    if ceiling.observe and not asked.observe and not changing:
        more.append("replies that change the guest")
    if more:
        raise ValueError(", ".join(more))
    return asked


def command_id(name: str) -> int:
    """The command with this name.

    :raise ValueError: there is none; the message lists those there are.
    """
    return _by_name("command", name, [c for c in Command if c > Command.EVENT], command_name)


def event_id(name: str) -> int:
    """The kind of event with this name.

    :raise ValueError: there is none; the message lists those there are.
    """
    return _by_name("event", name, list(EventId), event_name)


def _by_name(what: str, name: str, ids: Iterable[int], name_of: Callable[[int], str]) -> int:
    known = {name_of(number): int(number) for number in ids}
    try:
        return known[name.lower().replace("_", "-")]
    except KeyError:
        raise ValueError(f"no {what} is called {name!r}; there are {', '.join(known)}") from None
