# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests through libvirt."""

from kvmi_host.provision.domain import Guest, Image, domain_xml, find_image
from kvmi_host.provision.errors import GuestExists, LibvirtUnreachable, NoImage, NoSuchGuest, ProvisionError
from kvmi_host.provision.guests import GuestInfo, define, destroy, list_guests, start, stop
from kvmi_host.provision.libvirtd import connect, default_uri, find_domain, is_remote

__all__ = [
    "Guest",
    "GuestExists",
    "GuestInfo",
    "Image",
    "LibvirtUnreachable",
    "NoImage",
    "NoSuchGuest",
    "ProvisionError",
    "connect",
    "default_uri",
    "define",
    "destroy",
    "domain_xml",
    "find_domain",
    "find_image",
    "is_remote",
    "list_guests",
    "start",
    "stop",
]
