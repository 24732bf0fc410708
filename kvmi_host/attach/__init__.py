# SPDX-License-Identifier: LGPL-2.1-or-later
"""Giving a running VM's introspection session to an introspector."""

from kvmi_host.attach.errors import (
    AlreadyHooked,
    AttachError,
    AttachRefused,
    NoSuchVm,
    NotHooked,
    NoVmDescriptor,
    VmNotRunning,
)
from kvmi_host.attach.vmfd import VmHandle

__all__ = [
    "AlreadyHooked",
    "AttachError",
    "AttachRefused",
    "NoSuchVm",
    "NoVmDescriptor",
    "NotHooked",
    "VmHandle",
    "VmNotRunning",
]
