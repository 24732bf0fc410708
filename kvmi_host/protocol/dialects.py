# SPDX-License-Identifier: LGPL-2.1-or-later
"""The dialects of the protocol, as one table: what each changes against v6, and how GET_VERSION's answer tells it.

v6 is the base: :mod:`kvmi_host.protocol.ids`, :mod:`~kvmi_host.protocol.messages` and
:mod:`~kvmi_host.protocol.events` are written for it. Another dialect is a row of :data:`DIALECTS`, and a kind of
:class:`~kvmi_host.protocol.events.Event` if it lays out events otherwise::

    dialect   GET_VERSION answers                    events
    v6        u32 version = 1; u32 0                 as in events.py
    v7        ... and 8 bytes of features            `view` at 10; other data of TRAP; SINGLESTEP has data
    v12       u32 version; u32 largest message       not spoken: its messages are numbered otherwise
"""

from __future__ import annotations

from collections.abc import Mapping
from struct import Struct
from typing import ClassVar, NamedTuple

from kvmi_host.protocol.errors import ProtocolError, UnsupportedDialect
from kvmi_host.protocol.events import COMMON_FIELDS, OWN, Event, Layout, SingleStep, TrapV7, own_sizes
from kvmi_host.protocol.ids import KVMI_VERSION, Command, EventId

_VERSION = Struct("<II")
_FEATURES_AT = 8
_FEATURES = Struct("<4B4x")
_VIEW = Struct("<10xH")


class EventV7(Event):
    """An event of dialect v7."""

    __slots__ = ()
    layouts: ClassVar[Mapping[int, Layout]] = {
        **OWN,
        EventId.TRAP: Layout(Struct("<B3xIQ"), TrapV7, (1, 8, 16)),
        EventId.SINGLESTEP: Layout(Struct("<B"), SingleStep, (1,)),
    }
    own_sizes: ClassVar[tuple[int, ...]] = own_sizes(layouts)
    common: ClassVar[tuple[tuple[int, str], ...]] = (*COMMON_FIELDS[:4], (12, "view"), *COMMON_FIELDS[4:])

    @property
    def view(self) -> int:
        """The view of memory that the vCPU runs in."""
        view: int = _VIEW.unpack_from(self.body)[0]
        return view


class Features(NamedTuple):
    """What a v7 kernel says of its host's CPU; each is 0 or 1."""

    spp: int
    vmfunc: int
    eptp: int
    ve: int


class Version(NamedTuple):
    """Answer of GET_VERSION. ``dialect``: ``v6``, ``v7`` or ``v12``. ``features``: v7's alone."""

    version: int
    dialect: str
    features: Features | None = None


class Dialect(NamedTuple):
    """What a dialect changes.

    :ivar event: how its events are read; None: it is known, and not spoken.
    :ivar commands: the ids of its commands.
    :ivar events: the ids of its events.
    """

    name: str
    event: type[Event] | None
    commands: frozenset[int]
    events: frozenset[int]


_V6_COMMANDS = frozenset(map(int, Command)) - {Command.EVENT_REPLY, Command.EVENT}
_V6_EVENTS = frozenset(map(int, EventId))

V6 = Dialect("v6", Event, _V6_COMMANDS, _V6_EVENTS)
"""What our kernel part speaks."""
V7 = Dialect("v7", EventV7, _V6_COMMANDS | {*range(28, 45), 60, 63}, _V6_EVENTS | {13})
"""KVM-VMI's kernel 5.4.24."""
V12 = Dialect("v12", None, frozenset(), frozenset())
"""The last posting to the kernel's list, for 5.15-rc."""

DIALECTS = {dialect.name: dialect for dialect in (V6, V7, V12)}


def read_version(answer: bytes) -> Version:
    """The answer of GET_VERSION, without its error code. Its shape is the dialect.

    :raise ProtocolError: it ends before its version, or has one that no known dialect has.
    """
    if len(answer) < _VERSION.size:
        missing = "version" if len(answer) < 4 else "padding"
        raise ProtocolError(f"get-version: the answer's {len(answer)} bytes end before {missing!r}")
    version, second = _VERSION.unpack_from(answer)
    if second:
        return Version(version, V12.name)
    if version != KVMI_VERSION:
        raise ProtocolError(f"get-version: the kernel speaks version {version}, kvmi-host {KVMI_VERSION}: update it")
    if len(answer) < _FEATURES_AT + _FEATURES.size:
        return Version(version, V6.name)
    return Version(version, V7.name, Features._make(_FEATURES.unpack_from(answer, _FEATURES_AT)))


def event_type(dialect: Dialect) -> type[Event]:
    """How a dialect's events are read.

    :raise UnsupportedDialect: the dialect is not spoken.
    """
    if dialect.event is None:
        ours = " and ".join(known.name for known in DIALECTS.values() if known.event)
        raise UnsupportedDialect(
            f"the kernel speaks KVMI {dialect.name}, which numbers its messages otherwise; kvmi-host speaks {ours}: "
            "load its own modules on this host, or use a KVM-VMI kernel that speaks v7"
        )
    return dialect.event
