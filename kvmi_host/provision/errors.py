# SPDX-License-Identifier: LGPL-2.1-or-later
"""Why a guest cannot be provisioned. The root of the tree is drawn in :mod:`kvmi_host.protocol.errors`.

::

    ProvisionError
    +-- LibvirtUnreachable  no connection to libvirt: daemon, SSH host, permissions
    +-- NoSuchGuest         that libvirt has no guest of that name or UUID
    +-- GuestExists         a guest of that name is defined already
    +-- NoImage             the image's files are not there
"""

from kvmi_host.protocol import KvmiError


class ProvisionError(KvmiError):
    """libvirt refused; the message is its own."""


class LibvirtUnreachable(ProvisionError):
    """No connection to libvirt: the daemon is not running, the SSH host is down, or this user may not."""


class NoSuchGuest(ProvisionError):
    """That libvirt has no guest of that name or UUID."""


class GuestExists(ProvisionError):
    """A guest of that name is defined already."""


class NoImage(ProvisionError):
    """A file of the image is not there: build the images, or name their directory."""
