# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host kernels that have introspection."""

from enum import StrEnum


class Series(StrEnum):
    """The kernels of Debian 12: its own, and that of its security updates for newer hardware."""

    V6_1 = "6.1"
    V6_12 = "6.12"

    @property
    def headers_package(self) -> str:
        """The package that brings the newest headers, of the flavour for virtual machines."""
        return "linux-headers-cloud-amd64" if self is Series.V6_1 else f"linux-headers-{self}-cloud-amd64"
