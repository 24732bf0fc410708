# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ending someone's session: ask first, insist after a while."""

from __future__ import annotations

from time import monotonic, sleep

from kvmi_host.attach.errors import NotHooked
from kvmi_host.attach.methods import choose
from kvmi_host.attach.qemu_object import remove_object
from kvmi_host.attach.target import Target
from kvmi_host.attach.vmfd import VmHandle
from kvmi_host.provision import Method


def detach(target: Target, timeout: float = 5.0, method: str = "auto") -> bool:
    """Send the introspector the UNHOOK event; end the session if it has not done so itself after `timeout` seconds.

    :param method: by which the session was attached, as :func:`kvmi_host.attach.methods.choose` takes it.
    :return: whether the introspector ended it itself.
    :raise NotHooked: nobody introspects this VM.
    :raise AttachError: QEMU's object has the session, which nobody but the introspector can end; or see its branches.
    """
    if choose(target, method) is Method.QEMU_OBJECT:
        remove_object(target, timeout)
        return True
    with VmHandle(target.pid) as vm:
        asked = vm.unhook_request()
        if asked:
            deadline = monotonic() + timeout
            while monotonic() < deadline:
                if not vm.hooked():
                    return True
                sleep(0.02)  # the kernel has no way to tell a third party
        try:
            vm.unhook_force()
        except NotHooked:
            if not asked:
                raise
            return True  # at the last moment
    return False
