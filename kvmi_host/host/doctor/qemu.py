# SPDX-License-Identifier: LGPL-2.1-or-later
"""The QEMU binaries of a host, and whether they have KVM-VMI's object ``introspection``."""

from __future__ import annotations

import re

from kvmi_host.host.doctor.finding import Check, Verdict, missing, note, ok, unknown
from kvmi_host.host.doctor.kernel import ours, theirs
from kvmi_host.host.doctor.machine import Machine


def binaries(machine: Machine) -> Verdict:
    """There are QEMUs, and each of them runs."""
    versions, broken = [], []
    for path, said in machine.said_by("version of ").items():
        if found := re.search(r"version (\d[\w.]*)", said.text):
            versions.append(f"{path} {found[1]}")
        else:
            broken.append(f"{path}: {said.last_line}")
    if broken:
        return missing("; ".join(broken), "mend that QEMU, or name another <emulator> in the guests that use it")
    if not versions:
        return missing("no qemu-system-x86_64, and none that a guest names", "apt-get install qemu-system-x86")
    return ok("; ".join(versions))


def with_object(machine: Machine) -> list[str]:
    """The QEMUs that have the object."""
    said = machine.said_by("objects of ")
    return [path for path, answer in said.items() if re.search(r"^\s*introspection\b", answer.text, re.MULTILINE)]


def introspection_object(machine: Machine) -> Verdict:
    """A kernel that takes introspection from the VMM alone has a QEMU that asks for it."""
    have = with_object(machine)
    if have:
        return ok(f"{', '.join(have)}: attach by qemu-object")
    if ours(machine):
        return ok("no QEMU has it, and none needs it: attach by vm-fd works with stock QEMU")
    if not machine.said_by("objects of "):
        return unknown("there is no QEMU to ask", "see: QEMU")
    if theirs(machine):
        remedy = "install KVM-VMI's QEMU, and name it as <emulator> of the guests; or load our modules"
        return missing("no QEMU has it, and this kernel takes introspection from the VMM alone", remedy)
    return note("no QEMU has it: it is not needed once our modules are loaded", "see: loaded modules")


CHECKS = (Check("QEMU", "QEMU", binaries), Check("QEMU", "introspection object", introspection_object))
