# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which way is taken to a VM."""

import errno
import os
import subprocess
import sys

import pytest

from kvmi_host.attach import AttachRefused, Method, NoVmDescriptor, find_target, methods
from kvmi_host.attach.methods import choose
from kvmi_host.cli.options import Methods


@pytest.fixture
def target():
    return find_target(f"pid:{os.getpid()}")


@pytest.fixture
def asked(monkeypatch):
    """The VMs whose QEMU was asked for the object; it has it."""
    asked = []
    monkeypatch.setattr(methods, "require_object", asked.append)
    return asked


def test_the_vms_descriptor_is_taken_where_the_kernel_serves_us(simulated_vm, target, asked):
    assert choose(target) is Method.VM_FD
    assert asked == []


@pytest.mark.parametrize("code", [errno.ENOTTY, errno.EIO, errno.EPERM])
def test_qemus_object_is_taken_where_the_kernel_serves_the_vmm_alone(simulated_vm, target, asked, code):
    simulated_vm.refuse["allow_command"] = code
    assert choose(target) is Method.QEMU_OBJECT
    assert asked == [target]


def test_without_either_the_message_says_what_each_lacks(simulated_vm, target):
    simulated_vm.refuse["allow_command"] = errno.ENOTTY
    with pytest.raises(AttachRefused, match=r"vm-fd: .*load the kvmi modules.* qemu-object: .*no QMP socket"):
        choose(target)


def test_a_vm_without_kvm_has_no_way(target, asked):
    with pytest.raises(NoVmDescriptor):
        choose(target)
    assert asked == []


@pytest.mark.parametrize("method", Method)
def test_a_method_that_is_named_is_taken_unseen(target, method):
    assert choose(target, method) is method


def test_a_method_that_there_is_not_is_a_value_error(target):
    with pytest.raises(ValueError, match="telepathy"):
        choose(target, "telepathy")


def test_the_command_offers_every_method():
    assert {*Methods} - {"auto"} == {*Method}


def test_who_needs_no_monitor_does_not_load_what_it_takes():
    code = "import sys, kvmi_host.attach; print(*sorted({'asyncio', 'qemu', 'libvirt', 'hashlib'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert loaded.stdout.strip() == ""
