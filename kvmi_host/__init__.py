# SPDX-License-Identifier: LGPL-2.1-or-later
"""Introspection of KVM guests: the host side of KVMI, in Python.

The folders are the parts: :mod:`kvmi_host.protocol` is the wire, without I/O; :mod:`kvmi_host.introspect` holds a
session over a socket; :mod:`kvmi_host.attach` gives a running VM's session to an introspector;
:mod:`kvmi_host.provision` makes guests through libvirt; :mod:`kvmi_host.cli` is the ``kvmi-host`` command.
"""

__version__ = "0.1.0"
