# SPDX-License-Identifier: LGPL-2.1-or-later
"""MSRs by name and by number."""

import pytest

from kvmi_host.protocol import msr_index, msr_name
from kvmi_host.protocol.msrs import NAMES


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("lstar", 0xC0000082),
        ("LSTAR", 0xC0000082),
        ("kernel_gs_base", 0xC0000102),
        ("sysenter-eip", 0x176),
        ("0xc0001fff", 0xC0001FFF),
        ("0x1fff", 0x1FFF),
        ("16", 16),
    ],
)
def test_a_name_or_a_number_is_an_msr(name, index):
    assert msr_index(name) == index


@pytest.mark.parametrize("name", ["0x2000", "0xbfffffff", "0xc0002000", "-1"])
def test_an_msr_that_cannot_be_watched_is_refused(name):
    with pytest.raises(ValueError, match="cannot be watched"):
        msr_index(name)


def test_a_name_that_is_no_msr_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"no MSR is called 'lstarr'; there are .*lstar"):
        msr_index("lstarr")


def test_names_can_be_watched_and_read_back():
    assert {msr_name(msr_index(name)) for name in NAMES} == set(NAMES)
    assert msr_name(0x1234) == "0x1234"
