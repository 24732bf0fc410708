# SPDX-License-Identifier: LGPL-2.1-or-later
"""What this host can do."""

from kvmi_host.host.errors import HostError
from kvmi_host.host.kvm import introspection_enabled, require_introspection

__all__ = ["HostError", "introspection_enabled", "require_introspection"]
