# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose CPUs have virtualization that KVM uses."""

from enum import StrEnum


class Vendor(StrEnum):
    """Whose CPU a host has."""

    AMD = "amd"
    INTEL = "intel"
