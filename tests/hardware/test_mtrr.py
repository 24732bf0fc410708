# SPDX-License-Identifier: LGPL-2.1-or-later
"""GET_MTRR_TYPE: the memory type that the guest's MTRRs give an address."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvmi_host.protocol import MemoryType
from kvmi_host.testing.puppet import PAGE, Puppet, address, page

pytestmark = pytest.mark.hardware

PHYSBASE_7, PHYSMASK_7 = 0x20E, 0x20F
VALID = 1 << 11
ONE_PAGE = (1 << 40) - PAGE


@pytest.fixture
def own_range(puppet: Puppet) -> Iterator[Puppet]:
    """The guest's last variable MTRR is free for the test."""
    yield puppet
    write(puppet, PHYSMASK_7, 0)
    write(puppet, PHYSBASE_7, 0)


def write(puppet: Puppet, msr: int, value: int) -> None:
    assert puppet.run(0, "wrmsr", rcx=msr, rax=value & 0xFFFFFFFF, rdx=value >> 32).exceptions == 0


@pytest.mark.rule("3.41")
def test_memory_can_be_cached_and_the_screen_cannot(puppet: Puppet) -> None:
    # As the firmware has set them up.
    assert puppet.session.mtrr_type(page(0)) is MemoryType.WRITE_BACK
    assert puppet.session.mtrr_type(0xA0000) is MemoryType.UNCACHEABLE


@pytest.mark.rule("3.41")
@pytest.mark.parametrize(
    "kind", [MemoryType.UNCACHEABLE, MemoryType.WRITE_COMBINING, MemoryType.WRITE_THROUGH, MemoryType.WRITE_PROTECTED]
)
def test_it_follows_what_the_guest_writes(own_range: Puppet, kind: MemoryType) -> None:
    large = address("large")
    write(own_range, PHYSBASE_7, large | kind)
    write(own_range, PHYSMASK_7, ONE_PAGE | VALID)
    around = [own_range.session.mtrr_type(large + offset) for offset in (-1, 0, PAGE - 1, PAGE)]
    assert around == [MemoryType.WRITE_BACK, kind, kind, MemoryType.WRITE_BACK]
