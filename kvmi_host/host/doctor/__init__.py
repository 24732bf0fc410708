# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a host needs before its VMs can be introspected: each thing by itself, whether it is there, and what to do.

    for finding in examine(this_machine()):
        print(finding.state, finding.subject, finding.evidence, finding.remedy)

A machine is looked at once, by a script (:mod:`.machine`); the checks are functions of what it saw.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvmi_host.host.doctor import agent, kernel, libvirtd, qemu
from kvmi_host.host.doctor.finding import Finding, State
from kvmi_host.host.doctor.machine import Machine, machine_behind, this_machine

__all__ = ["CHECKS", "Finding", "Machine", "State", "examine", "machine_behind", "this_machine"]

_MOST = 400

CHECKS = (*kernel.CHECKS, *qemu.CHECKS, *libvirtd.CHECKS, *agent.CHECKS)


def examine(machine: Machine) -> Iterator[Finding]:
    """Judge everything, one after the other."""
    for group, subject, look in CHECKS:
        state, evidence, remedy = look(machine)
        yield Finding(group, subject, state, _short(evidence), _short(remedy))


def _short(text: str) -> str:
    """What a line of a report may hold, whatever a program said."""
    return text if len(text) <= _MOST else text[: _MOST - 4] + " ..."
