# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can go wrong with the host in a box.

::

    KvmiError
    +-- LabError            it did not work this time: the message has the log's tail, try again or look there
        +-- LabHostError    (a HostError too) this machine cannot run it until someone changes the machine
"""

from __future__ import annotations

from kvmi_host.host import HostError
from kvmi_host.protocol import KvmiError


class LabError(KvmiError):
    """The host in a box did not do what was asked."""


class LabHostError(LabError, HostError):
    """This machine lacks what the host in a box needs: the source tree, root, or a program."""
