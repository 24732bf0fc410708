# SPDX-License-Identifier: LGPL-2.1-or-later
"""GET_CPUID: what the guest's own CPUID instruction gives."""

from __future__ import annotations

import pytest

from kvmi_host.protocol import CommandError, ErrorCode
from kvmi_host.testing.puppet import Puppet

pytestmark = pytest.mark.hardware

FUNCTIONS = [
    (0, 0),
    (1, 0),
    (7, 0),
    (0xD, 0),
    (0xD, 1),
    (0xD, 2),
    (0x40000000, 0),
    (0x40000001, 0),
    (0x80000000, 0),
    (0x80000001, 0),
    (0x80000008, 0),
]


@pytest.mark.rule("3.21")
@pytest.mark.parametrize("vcpu", [0, 1])
@pytest.mark.parametrize(("function", "index"), FUNCTIONS, ids=[f"{f:#x}.{i}" for f, i in FUNCTIONS])
def test_it_agrees_with_the_instruction(puppet: Puppet, vcpu: int, function: int, index: int) -> None:
    registers = puppet.run(vcpu, "cpuid", rax=function, rcx=index).registers
    assert puppet.session.cpuid(vcpu, function, index) == (registers.rax, registers.rbx, registers.rcx, registers.rdx)


@pytest.mark.rule("3.21")
def test_it_is_the_vcpus_own(puppet: Puppet) -> None:
    assert [puppet.session.cpuid(vcpu, 1).ebx >> 24 for vcpu in (0, 1)] == [0, 1]


@pytest.mark.rule("3.22")
@pytest.mark.parametrize(("function", "index"), [(0x50000000, 0), (0xD, 0x1000), (0xFFFFFFFF, 0)])
def test_a_function_that_there_is_not_is_refused(puppet: Puppet, function: int, index: int) -> None:
    with pytest.raises(CommandError) as refused:
        puppet.session.cpuid(0, function, index)
    assert refused.value.code == ErrorCode.ENOENT
