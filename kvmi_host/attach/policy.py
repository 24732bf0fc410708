# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a session may do. Set once, when it is attached, and enforced by the kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvmi_host.protocol import Command, EventId, command_name, event_name
from kvmi_host.protocol.ids import ALWAYS_ALLOWED, CHANGES_THE_GUEST

_EVENT_PREFIX = "event:"


@dataclass(frozen=True, slots=True)
class Policy:
    """``commands`` and ``events`` by id; None: all that the kernel has.

    :ivar observe: the session is hooked with the OBSERVE flag: nothing it says can change the guest, and the commands
        that would are not among "all".
    """

    observe: bool
    commands: frozenset[int] | None = None
    events: frozenset[int] | None = None


OBSERVE = Policy(observe=True)
FULL = Policy(observe=False)
_PROFILES = {"observe": OBSERVE, "full": FULL}


def policy_for(allow: str | Iterable[str | int] | Policy) -> Policy:
    """A policy from what people write: a profile (``observe``, ``full``), or a list of names or command ids.

    A list names commands (``get-registers``) and, as ``event:cr``, events; if it names no event, all are allowed. It is
    observing unless it names a command that changes the guest. As one string, commas separate the names.

    :raise ValueError: a name is not known.
    """
    if isinstance(allow, Policy):
        return allow
    if isinstance(allow, str):
        if allow in _PROFILES:
            return _PROFILES[allow]
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
