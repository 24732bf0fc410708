# SPDX-License-Identifier: LGPL-2.1-or-later
"""The VM's descriptor: found, duplicated, and every refusal of the kernel explained."""

import errno
import os
import socket
from uuid import UUID

import pytest

from kvmi_host.attach import AlreadyHooked, AttachRefused, NoSuchVm, NotHooked, NoVmDescriptor, VmHandle, vmfd
from kvmi_host.host import HostError

NO_PROCESS = 1 << 22  # larger than pid_max can be


def test_the_descriptor_is_duplicated_from_the_process_and_closed_again(vm_process):
    before = len(os.listdir("/proc/self/fd"))
    handle = VmHandle(vm_process.pid)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    handle.close()
    handle.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_process_without_a_vm_is_told_apart():
    with pytest.raises(NoVmDescriptor, match="TCG"):
        VmHandle(os.getpid())


def test_a_process_that_is_not_there_is_told_apart():
    with pytest.raises(NoSuchVm, match="no process"):
        VmHandle(NO_PROCESS)


def test_stock_modules_refuse_and_the_message_says_what_to_load(vm_process):
    # An eventfd answers ENOTTY to every ioctl, as KVM's stock modules do to ours.
    ours, theirs = socket.socketpair()
    with ours, theirs, VmHandle(vm_process.pid) as vm, pytest.raises(AttachRefused, match="load the kvmi modules"):
        vm.hook(theirs, UUID(int=7), observe=True)


@pytest.fixture
def hook(simulated_vm, vm_process):
    def refused(code):
        simulated_vm.refuse["hook"] = code
        ours, theirs = socket.socketpair()
        with ours, theirs, VmHandle(vm_process.pid) as vm:
            vm.hook(theirs, UUID(int=7), observe=True)

    return refused


def test_hooking_a_hooked_vm_says_to_detach(hook):
    with pytest.raises(AlreadyHooked, match="detach first"):
        hook(errno.EEXIST)


@pytest.mark.parametrize("code", [errno.ENOTTY, errno.EINVAL, errno.EIO])
def test_what_stock_modules_answer_says_to_load_ours(hook, code):
    with pytest.raises(AttachRefused, match="load the kvmi modules"):
        hook(code)


def test_switched_off_names_the_parameter(hook, monkeypatch):
    monkeypatch.setattr(vmfd, "introspection_enabled", lambda: False)
    with pytest.raises(AttachRefused, match="/sys/module/kvm/parameters/introspection"):
        hook(errno.EPERM)


@pytest.mark.parametrize("parameter", [True, None])
def test_not_privileged_says_to_be_root(hook, monkeypatch, parameter):
    monkeypatch.setattr(vmfd, "introspection_enabled", lambda: parameter)
    with pytest.raises(AttachRefused, match="run as root"):
        hook(errno.EPERM)


def test_a_refusal_of_the_kernel_means_that_the_host_cannot():
    assert issubclass(AttachRefused, HostError)


@pytest.mark.parametrize("call", [VmHandle.unhook_request, VmHandle.unhook_force, VmHandle.allow_commands])
def test_a_vm_that_is_not_hooked_is_told_apart(simulated_vm, vm_process, call):
    simulated_vm.refuse = dict.fromkeys(("unhook", "unhook_force", "allow_command"), errno.EFAULT)
    with VmHandle(vm_process.pid) as vm, pytest.raises(NotHooked):
        call(vm)


def test_an_unhook_event_that_nobody_asked_for_is_told_apart(simulated_vm, vm_process):
    simulated_vm.refuse["unhook"] = errno.ENOENT
    with VmHandle(vm_process.pid) as vm:
        assert vm.unhook_request() is False


def test_a_command_that_an_observing_session_cannot_have_is_explained(simulated_vm, vm_process):
    simulated_vm.refuse["allow_command"] = errno.EPERM
    with VmHandle(vm_process.pid) as vm, pytest.raises(AttachRefused, match=r"write-physical.*session only observes"):
        vm.allow_commands([18])
