# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can go wrong with the lab's hosts.

::

    KvmiError
    +-- LabError            it did not work this time: the message has the log's tail, try again or look there
        +-- LabHostError    (a HostError too) this machine cannot run it until someone changes the machine
        +-- InventoryError  the list of hosts cannot be used
        +-- NightError      what is said of a night cannot be used
"""

from __future__ import annotations

from kvmi_host.host import HostError
from kvmi_host.protocol import KvmiError


class LabError(KvmiError):
    """A host of the lab did not do what was asked."""


class LabHostError(LabError, HostError):
    """This machine lacks what the host in a box needs: the source tree, root, or a program."""


class InventoryError(LabError):
    """The list of hosts cannot be read, or something in it means nothing."""


class NightError(LabError):
    """``night.json`` cannot be read, or it is none."""
