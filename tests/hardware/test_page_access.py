# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands that say what the guest may do with its pages."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmi_host.introspect import Session
from kvmi_host.protocol import Access, Command, CommandError, ErrorCode
from kvmi_host.testing.live import LiveGuest
from kvmi_host.testing.puppet import LARGE_PAGE, PAGE, Puppet, address, page

pytestmark = pytest.mark.hardware

SENSIBLE = [Access.NONE, Access.R, Access.R | Access.W, Access.R | Access.X, Access.ALL]
NO_MEMORY = 0x8000000


def has_execute_only() -> bool:
    """Whether pages can be executable and nothing else: with Intel's EPT."""
    return Path("/sys/module/kvm_intel").exists()


def refusal(session: Session, command: Command, payload: bytes) -> int:
    with pytest.raises(CommandError) as refused:
        session.request(command, payload)
    return refused.value.code


def entry(gpa: int, access: int, padding: tuple[int, int, int] = (0, 0, 0)) -> bytes:
    return struct.pack("<QBBHI", gpa, access, *padding)


def head(count: int, view: int = 0, padding: int = 0) -> bytes:
    return struct.pack("<HHI", view, count, padding)


@pytest.mark.rule("3.33")
def test_a_page_begins_with_all_access(puppet: Puppet) -> None:
    assert puppet.session.page_access(page(0), address("large"), 0) == (Access.ALL,) * 3


@pytest.mark.rule("3.33", "3.34")
@pytest.mark.parametrize("access", SENSIBLE)
def test_a_page_has_the_access_that_was_set_last(puppet: Puppet, access: Access) -> None:
    puppet.session.set_page_access({page(0): Access.NONE})
    puppet.session.set_page_access({page(0): access})
    assert puppet.session.page_access(page(0), page(1)) == (access, Access.ALL)


@pytest.mark.rule("3.34")
def test_one_command_sets_many_pages(puppet: Puppet) -> None:
    access = {page(index): SENSIBLE[index % len(SENSIBLE)] for index in range(256)}
    access |= {address("large") + index * PAGE: Access.R for index in range(255)}
    puppet.session.set_page_access(access)
    assert puppet.session.page_access(*access) == tuple(access.values())


@pytest.mark.rule("3.34")
def test_no_pages_are_no_error(puppet: Puppet) -> None:
    puppet.session.set_page_access({})
    assert puppet.session.page_access() == ()


@pytest.mark.rule("3.34")
def test_pages_of_one_large_page_are_told_apart(puppet: Puppet) -> None:
    large = address("large")
    puppet.session.set_page_access({large + 5 * PAGE: Access.R})
    around = puppet.session.page_access(large, large + 4 * PAGE, large + 5 * PAGE, large + 6 * PAGE, large + LARGE_PAGE)
    assert around == (Access.ALL, Access.ALL, Access.R, Access.ALL, Access.ALL)


@pytest.mark.rule("5.19")
def test_a_new_session_finds_all_access(
    puppet_guest: LiveGuest, puppet: Puppet, hooked: Callable[..., Session]
) -> None:
    puppet.session.set_page_access({page(0): Access.NONE})
    puppet.session.close()
    assert hooked(puppet_guest).page_access(page(0)) == (Access.ALL,)


@pytest.mark.rule("3.37")
@pytest.mark.parametrize("access", [Access.W, Access.W | Access.X], ids=["w", "wx"])
def test_a_page_that_can_be_written_can_be_read(puppet: Puppet, access: Access) -> None:
    assert refusal(puppet.session, Command.SET_PAGE_ACCESS, head(1) + entry(page(0), access)) == ErrorCode.EINVAL
    assert puppet.session.page_access(page(0)) == (Access.ALL,)


@pytest.mark.rule("3.38", "3.39", either=True)
def test_execute_only_is_there_where_the_cpu_has_it(puppet: Puppet) -> None:
    try:
        puppet.session.set_page_access({page(0): Access.X})
    except CommandError as refused:
        outcome: int = refused.code
    else:
        outcome = 0
    assert outcome == (0 if has_execute_only() else ErrorCode.EINVAL)


BAD = {
    "set: no such view": (Command.SET_PAGE_ACCESS, lambda: head(1, view=1) + entry(page(0), 1)),
    "set: padding": (Command.SET_PAGE_ACCESS, lambda: head(1, padding=1) + entry(page(0), 1)),
    "set: fewer than counted": (Command.SET_PAGE_ACCESS, lambda: head(2) + entry(page(0), 1)),
    "set: half an entry": (Command.SET_PAGE_ACCESS, lambda: head(1) + entry(page(0), 1)[:8]),
    "set: counted without any": (Command.SET_PAGE_ACCESS, lambda: head(65535)),
    "set: an unknown bit": (Command.SET_PAGE_ACCESS, lambda: head(1) + entry(page(0), 8)),
    "set: all bits": (Command.SET_PAGE_ACCESS, lambda: head(1) + entry(page(0), 255)),
    "set: padding 1 of an entry": (Command.SET_PAGE_ACCESS, lambda: head(1) + entry(page(0), 1, (1, 0, 0))),
    "set: padding 2 of an entry": (Command.SET_PAGE_ACCESS, lambda: head(1) + entry(page(0), 1, (0, 1, 0))),
    "set: padding 3 of an entry": (Command.SET_PAGE_ACCESS, lambda: head(1) + entry(page(0), 1, (0, 0, 1))),
    "set: no memory": (Command.SET_PAGE_ACCESS, lambda: head(1) + entry(NO_MEMORY, 1)),
    "set: no such address": (Command.SET_PAGE_ACCESS, lambda: head(1) + entry(2**64 - PAGE, 1)),
    "get: no such view": (Command.GET_PAGE_ACCESS, lambda: head(1, view=1) + struct.pack("<Q", page(0))),
    "get: padding": (Command.GET_PAGE_ACCESS, lambda: head(1, padding=1) + struct.pack("<Q", page(0))),
    "get: fewer than counted": (Command.GET_PAGE_ACCESS, lambda: head(2) + struct.pack("<Q", page(0))),
    "get: counted without any": (Command.GET_PAGE_ACCESS, lambda: head(65535)),
    "get: no memory": (Command.GET_PAGE_ACCESS, lambda: head(1) + struct.pack("<Q", NO_MEMORY)),
}


@pytest.mark.rule("3.36")
@pytest.mark.parametrize(("command", "payload"), BAD.values(), ids=BAD)
def test_a_bad_field_is_refused(puppet: Puppet, command: Command, payload: Callable[[], bytes]) -> None:
    assert refusal(puppet.session, command, payload()) == ErrorCode.EINVAL
    assert puppet.session.page_access(page(0)) == (Access.ALL,)


@pytest.mark.rule("5.14")
def test_an_observing_session_reads_access_and_sets_none(
    puppet_guest: LiveGuest, hooked: Callable[..., Session]
) -> None:
    session = hooked(puppet_guest, allow="observe")
    assert session.page_access(page(0)) == (Access.ALL,)
    assert refusal(session, Command.SET_PAGE_ACCESS, head(1) + entry(page(0), 1)) == ErrorCode.EPERM
