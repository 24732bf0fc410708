# SPDX-License-Identifier: LGPL-2.1-or-later
"""What one can be interested in: by name, and as values."""

from __future__ import annotations

import struct

import pytest

from kvmi_host.introspect import (
    BREAKPOINTS,
    CR0,
    CR3,
    CR4,
    CREATE_VCPU,
    HYPERCALL,
    PAUSE,
    Breakpoint,
    Kind,
    Msr,
    PageWatch,
)
from kvmi_host.introspect.interests import parse
from kvmi_host.protocol import Access, Event, EventId

LSTAR = 0xC0000082


def event(kind: int, own: bytes = b"", *, rip: int = 0, cr3: int = 0) -> Event:
    body = bytearray(struct.pack("<HHB3x", 544, 0, kind) + bytes(536))
    struct.pack_into("<Q", body, 16 + 16 * 8, rip)
    struct.pack_into("<Q", body, 160 + 224 + 2 * 8, cr3)
    return Event(1, bytes(body) + own)


@pytest.mark.parametrize(
    ("name", "interests"),
    [
        ("cr3", [CR3]),
        ("CR", [CR0, CR3, CR4]),
        ("hypercall", [HYPERCALL]),
        ("create_vcpu", [CREATE_VCPU]),
        ("pause", [PAUSE]),
        ("pause-vcpu", [PAUSE]),
        ("msr:lstar", [Msr(LSTAR)]),
        ("msr:0xc0000082", [Msr("lstar")]),
        ("breakpoint", [BREAKPOINTS]),
        ("breakpoint:0xffffffff81000000", [Breakpoint(0xFFFFFFFF81000000)]),
        ("page:0x1000", [PageWatch(0x1000, Access.W)]),
        ("page:4096:rx", [PageWatch(0x1000, Access.R | Access.X)]),
    ],
)
def test_a_name_says_what_to_watch(name, interests):
    assert list(parse(name)) == interests


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("cr8", "no event is called 'cr8'; there are cr0, cr3"),
        ("msr", "which MSR"),
        ("msr:lstar2", "no MSR is called 'lstar2'"),
        ("breakpoint:main", "'main' is no address"),
        ("page:x", "'x' is no address"),
        ("page:0x1000:y", "'y' is no access: one or more of r, w and x"),
        ("cr3:1", "no event is called 'cr3:1'"),
    ],
)
def test_a_name_that_says_nothing_is_refused(name, why):
    with pytest.raises(ValueError, match=why):
        parse(name)


def test_an_msr_is_the_same_by_name_and_by_number():
    assert Msr("lstar") == Msr(LSTAR)
    assert hash(Msr("lstar")) == hash(Msr(LSTAR))


def test_an_msr_that_cannot_be_watched_is_refused():
    with pytest.raises(ValueError, match="MSR 0x4b564d00 cannot be watched"):
        Msr(0x4B564D00)


@pytest.mark.parametrize(
    ("watched", "allowed"),
    [
        (Access.W, Access.R | Access.X),
        (Access.X, Access.R | Access.W),
        (Access.W | Access.X, Access.R),
        (Access.R, Access.NONE),
    ],
)
def test_what_is_not_watched_is_allowed_as_far_as_cpus_can(watched, allowed):
    assert PageWatch(0x1000, watched).allowed == allowed


@pytest.mark.parametrize(
    ("interest", "mine", "others"),
    [
        (CR3, event(EventId.CR, struct.pack("<H6xQQ", 3, 0, 1)), event(EventId.CR, struct.pack("<H6xQQ", 4, 0, 1))),
        (
            Msr("lstar"),
            event(EventId.MSR, struct.pack("<I4xQQ", LSTAR, 0, 1)),
            event(EventId.MSR, struct.pack("<I4xQQ", 0x174, 0, 1)),
        ),
        (
            Breakpoint(0x1000),
            event(EventId.BREAKPOINT, struct.pack("<QB7x", 5, 1), rip=0x1000),
            event(EventId.BREAKPOINT, struct.pack("<QB7x", 0x1000, 1), rip=0x2000),
        ),
        (
            Breakpoint(0x1000, physical=True),
            event(EventId.BREAKPOINT, struct.pack("<QB7x", 0x1000, 1), rip=5),
            event(EventId.BREAKPOINT, struct.pack("<QB7x", 5, 1), rip=0x1000),
        ),
        (
            Breakpoint(0x1000, cr3=0x5000),
            event(EventId.BREAKPOINT, struct.pack("<QB7x", 5, 1), rip=0x1000, cr3=0x5001),
            event(EventId.BREAKPOINT, struct.pack("<QB7x", 5, 1), rip=0x1000, cr3=0x6001),
        ),
        (
            PageWatch(0x1000, Access.W),
            event(EventId.PF, struct.pack("<QQBxHI", 0, 0x1FFF, Access.W, 0, 0)),
            event(EventId.PF, struct.pack("<QQBxHI", 0, 0x1FFF, Access.X, 0, 0)),
        ),
        (
            PageWatch(0x1000, Access.W),
            event(EventId.PF, struct.pack("<QQBxHI", 0, 0x1000, Access.W, 0, 0)),
            event(EventId.PF, struct.pack("<QQBxHI", 0x1000, 0x2000, Access.W, 0, 0)),
        ),
    ],
)
def test_an_event_is_one_of_these_or_not(interest, mine, others):
    assert interest.event == mine.event == others.event
    assert interest.matches(mine)
    assert not interest.matches(others)


def test_a_kind_is_all_of_its_events():
    assert Kind(EventId.HYPERCALL).matches(event(EventId.HYPERCALL))
