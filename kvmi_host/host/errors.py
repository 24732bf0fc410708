# SPDX-License-Identifier: LGPL-2.1-or-later
"""What goes wrong with a host. The whole tree is drawn in :mod:`kvmi_host.protocol.errors`."""

from kvmi_host.protocol import KvmiError


class HostError(KvmiError):
    """What this host lacks, and who can change that: a module to load, a parameter to set, a privilege."""


class RemoteError(KvmiError):
    """No SSH connection to a host, or one that broke: its name, its key, or ours is not right, or it is down."""


class SurveyError(KvmiError):
    """A host could not be looked at: it did not answer in full, or not in time."""
