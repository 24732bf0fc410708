# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keeping account of event numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmi_host.introspect import SeqLedger
from kvmi_host.introspect.ledger import REMEMBERED


@given(st.permutations(range(1, 30)))
def test_numbers_in_any_order_have_no_gap_once_all_came(order):
    ledger = SeqLedger()
    for seq in order:
        ledger.enter(seq)
    assert (ledger.seen, ledger.missing, ledger.repeated) == (29, 0, 0)


@given(st.sets(st.integers(1, 60)))
def test_what_is_missing_is_what_has_not_come_below_the_highest(numbers):
    ledger = SeqLedger()
    for seq in numbers:
        ledger.enter(seq)
    assert ledger.missing == max(numbers, default=0) - len(numbers)


@pytest.mark.parametrize("again", [1, 3])
def test_a_number_that_comes_again_is_counted(again):
    ledger = SeqLedger()
    for seq in (1, 3, again):
        ledger.enter(seq)
    assert (ledger.seen, ledger.missing, ledger.repeated) == (2, 1, 1)


def test_a_ledger_does_not_grow_with_the_gaps():
    ledger = SeqLedger()
    for seq in (1, *range(3, 30001, 2), 1 << 30):
        ledger.enter(seq)
    assert (ledger.seen, ledger.missing) == (15001, (1 << 30) - 15001)
    assert len(ledger._gaps) == REMEMBERED


def test_numbers_wrap_at_32_bits():
    ledger = SeqLedger()
    ledger._expected = 0xFFFFFFFE
    for seq in (0xFFFFFFFE, 0xFFFFFFFF, 1, 0):
        ledger.enter(seq)
    assert (ledger.seen, ledger.missing, ledger.repeated) == (4, 0, 0)
