# SPDX-License-Identifier: LGPL-2.1-or-later
"""Emulators are told apart by what they say of themselves."""

import pytest

from kvmi_host.testing import emulators
from kvmi_host.testing.emulators import Emulator, Fault, identify, unless

BOCHS_TABLE = b"FACP" + bytes(6) + b"BOCHS " + bytes(20)
INTEL_TABLE = b"FACP" + bytes(6) + b"INTEL " + bytes(20)


@pytest.mark.parametrize(
    ("model", "flags", "table", "which"),
    [
        ("QEMU TCG CPU version 2.5+", "fpu hypervisor svm", BOCHS_TABLE, Emulator.QEMU_TCG),
        ("Intel(R) Core(TM) i7-4770 CPU @ 3.40GHz", "fpu vmx", BOCHS_TABLE, Emulator.BOCHS),
        ("AMD EPYC Processor", "fpu hypervisor svm", BOCHS_TABLE, None),
        ("AMD EPYC 7313 16-Core Processor", "fpu svm", INTEL_TABLE, None),
        ("AMD EPYC 7313 16-Core Processor", "fpu svm", b"", None),
    ],
)
def test_a_machine_is_known_by_its_model_and_firmware(model, flags, table, which):
    cpuinfo = f"processor\t: 0\nmodel name\t: {model}\nflags\t\t: {flags}\n\n"
    assert identify(cpuinfo, table) is which


@pytest.mark.parametrize(("which", "found"), [(Emulator.QEMU_TCG, []), (Emulator.BOCHS, [1]), (None, [1])])
def test_a_rule_is_expected_where_its_fault_is_not(monkeypatch, which, found):
    monkeypatch.setattr(emulators, "emulator", lambda: which)
    assert unless(Fault.NO_XSETBV_EXIT, [1]) == found
