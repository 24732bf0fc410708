# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests through libvirt."""

from kvmi_host.provision.domain import Firmware, Guest, Introspection, Method, domain_xml
from kvmi_host.provision.errors import GuestExists, LibvirtUnreachable, NoImage, NoSuchGuest, ProvisionError
from kvmi_host.provision.guests import GuestInfo, define, destroy, list_guests, save, start, stop
from kvmi_host.provision.images import Image, find_image
from kvmi_host.provision.libvirtd import connect, default_uri, find_domain, is_remote, serial_log
from kvmi_host.provision.seed import Settings, public_keys

__all__ = [
    "Firmware",
    "Guest",
    "GuestExists",
    "GuestInfo",
    "Image",
    "Introspection",
    "LibvirtUnreachable",
    "Method",
    "NoImage",
    "NoSuchGuest",
    "ProvisionError",
    "Settings",
    "connect",
    "default_uri",
    "define",
    "destroy",
    "domain_xml",
    "find_domain",
    "find_image",
    "is_remote",
    "list_guests",
    "public_keys",
    "save",
    "serial_log",
    "start",
    "stop",
]
