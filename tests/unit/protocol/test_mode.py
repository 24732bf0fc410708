# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mode table of the protocol, one test a row."""

import pytest

from kvmi_host.protocol import SpecialRegisters, operand_size
from kvmi_host.protocol.x86 import SREGS_SIZE, unpack_sregs

LMA, PE = 1 << 10, 1


def sregs(efer: int, cr0: int, l_bit: int, db: int) -> SpecialRegisters:
    zero = unpack_sregs(bytes(SREGS_SIZE))
    return zero._replace(efer=efer, cr0=cr0, cs=zero.cs._replace(l=l_bit, db=db))


@pytest.mark.parametrize("cr0", [0, PE])
@pytest.mark.parametrize("db", [0, 1])
def test_64_bit_code_is_mode_8(cr0, db):
    assert operand_size(sregs(LMA, cr0, 1, db)) == 8


@pytest.mark.parametrize("cr0", [0, PE])
def test_16_bit_code_in_long_mode_is_mode_2(cr0):
    assert operand_size(sregs(LMA, cr0, 0, 0)) == 2


@pytest.mark.parametrize("cr0", [0, PE])
def test_32_bit_code_in_long_mode_is_mode_4(cr0):
    assert operand_size(sregs(LMA, cr0, 0, 1)) == 4


@pytest.mark.parametrize("l_bit", [0, 1])
def test_16_bit_protected_mode_is_mode_2(l_bit):
    assert operand_size(sregs(0, PE, l_bit, 0)) == 2


@pytest.mark.parametrize("l_bit", [0, 1])
def test_32_bit_protected_mode_is_mode_4(l_bit):
    assert operand_size(sregs(0, PE, l_bit, 1)) == 4


@pytest.mark.parametrize("l_bit", [0, 1])
def test_real_mode_is_mode_2(l_bit):
    assert operand_size(sregs(0, 0, l_bit, 0)) == 2


@pytest.mark.parametrize("l_bit", [0, 1])
def test_big_real_mode_is_mode_4(l_bit):
    assert operand_size(sregs(0, 0, l_bit, 1)) == 4
