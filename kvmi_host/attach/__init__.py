# SPDX-License-Identifier: LGPL-2.1-or-later
"""Giving a running VM's introspection session to an introspector: ourselves, one that listens, or a child process."""

from kvmi_host.attach.errors import (
    AlreadyHooked,
    AttachError,
    AttachRefused,
    MonitorRefused,
    MonitorUnreachable,
    NoSuchVm,
    NotHooked,
    NoVmDescriptor,
    PolicyRefused,
    VmNotRunning,
)
from kvmi_host.attach.handover import hand_over, run_with_session
from kvmi_host.attach.policy import FULL, OBSERVE, Policy, command_id, event_id, policy_for
from kvmi_host.attach.policy_file import policy_of, read_policy
from kvmi_host.attach.release import detach
from kvmi_host.attach.session import attach
from kvmi_host.attach.target import Target, find_target
from kvmi_host.attach.vmfd import VmHandle
from kvmi_host.provision import Method

__all__ = [
    "FULL",
    "OBSERVE",
    "AlreadyHooked",
    "AttachError",
    "AttachRefused",
    "Method",
    "MonitorRefused",
    "MonitorUnreachable",
    "NoSuchVm",
    "NoVmDescriptor",
    "NotHooked",
    "Policy",
    "PolicyRefused",
    "Target",
    "VmHandle",
    "VmNotRunning",
    "attach",
    "command_id",
    "detach",
    "event_id",
    "find_target",
    "hand_over",
    "policy_for",
    "policy_of",
    "read_policy",
    "run_with_session",
]
