# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can go wrong with the host in a box.

::

    KvmiError
    +-- LabError            it did not work this time: the message has the log's tail, try again or look there
        +-- LabHostError    this machine cannot run it until someone changes the machine
"""

from __future__ import annotations

from kvmi_host.protocol.errors import KvmiError


class LabError(KvmiError):
    """The host in a box did not do what was asked.

    :cvar exit_status: what a command that ends with this error exits with.
    """

    exit_status = 1


class LabHostError(LabError):
    """This machine lacks what the host in a box needs: the source tree, root, or a program."""

    exit_status = 3
