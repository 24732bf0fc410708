# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is told to KVM's ioctls."""

from __future__ import annotations

from random import Random

from kvmi_host.protocol.x86 import SREGS_SIZE, unpack_sregs
from kvmi_host.testing.bare_vm import pack_sregs


def test_special_registers_are_packed_as_they_are_unpacked() -> None:
    sregs = unpack_sregs(Random(1).randbytes(SREGS_SIZE))
    packed = pack_sregs(sregs)
    assert len(packed) == SREGS_SIZE
    assert unpack_sregs(packed) == sregs
