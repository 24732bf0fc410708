# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host in a box: a KVM host with introspection, on any machine that runs QEMU.

:class:`Box` is all that most users need::

    with Box() as box:
        box.deploy()
        print(box.run(["kvmi-host", "doctor"]).stdout)
"""

from kvmi_host.lab.box import Box, Status
from kvmi_host.lab.errors import LabError, LabHostError

__all__ = ["Box", "LabError", "LabHostError", "Status"]
