# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can go wrong with the connection itself. The whole tree is drawn in :mod:`kvmi_host.protocol.errors`."""

from kvmi_host.protocol import KvmiError


class SessionError(KvmiError):
    """The connection failed, not something that was said on it."""


class SessionClosed(SessionError):
    """The peer is gone: the VM ended, introspection was taken away, or this side closed. Attach again."""


class SessionTimeout(SessionError):
    """A deadline passed. The session may go on; a command that was not answered may still take effect."""
