# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host kernels that have introspection, and the one to find faults with."""

from enum import StrEnum
from typing import Self


class Series(StrEnum):
    """The kernels of Debian 12: its own, that of its security updates for newer hardware, and its own with checks."""

    V6_1 = "6.1"
    V6_12 = "6.12"
    DEBUG = "debug"
    """6.1 that checks itself as it runs (``kernel/debug.config``). Nobody installs it: the lab builds and boots it."""

    @classmethod
    def packaged(cls) -> list[Self]:
        """Those that Debian has packages of."""
        return [series for series in cls if series is not cls.DEBUG]

    @property
    def patience(self) -> int:
        """How many times longer than with another kernel things may take."""
        return 6 if self is Series.DEBUG else 1

    @property
    def headers_package(self) -> str:
        """The package that brings the newest headers, of the flavour for virtual machines."""
        return "linux-headers-cloud-amd64" if self is Series.V6_1 else f"linux-headers-{self}-cloud-amd64"
