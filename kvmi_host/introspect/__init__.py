# SPDX-License-Identifier: LGPL-2.1-or-later
"""The introspector: a session with the kernel over a socket, and the ways to come by one."""

from kvmi_host.introspect.errors import SessionClosed, SessionError, SessionTimeout
from kvmi_host.introspect.ledger import SeqLedger
from kvmi_host.introspect.listener import Listener
from kvmi_host.introspect.pausing import Pause
from kvmi_host.introspect.serving import serve
from kvmi_host.introspect.session import PeerInfo, Session, Tap
from kvmi_host.introspect.watching import Wanted, Watch

__all__ = [
    "Listener",
    "Pause",
    "PeerInfo",
    "SeqLedger",
    "Session",
    "SessionClosed",
    "SessionError",
    "SessionTimeout",
    "Tap",
    "Wanted",
    "Watch",
    "serve",
]
