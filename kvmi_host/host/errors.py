# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host cannot do it. The whole tree is drawn in :mod:`kvmi_host.protocol.errors`."""

from kvmi_host.protocol import KvmiError


class HostError(KvmiError):
    """What this host lacks, and who can change that: a module to load, a parameter to set, a privilege."""
