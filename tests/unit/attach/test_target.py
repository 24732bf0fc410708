# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which process runs a VM."""

import os
import subprocess
import sys
import time
from uuid import UUID

import libvirt
import pytest

from kvmi_host.attach import AttachError, NoSuchVm, VmNotRunning, find_target, target
from kvmi_host.provision import LibvirtUnreachable, NoSuchGuest

TEST_DRIVER = "test:///default"  # libvirt's built-in driver: one running guest, which has no process
VM_UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"


@pytest.fixture
def vmm():
    """A process with QEMU's command line."""
    arguments = ["-name", "guest=web,debug-threads=on", "-uuid", VM_UUID]
    code = "print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        yield process.pid
        process.communicate(b"\n")


def test_a_process_id_is_a_vm_with_what_its_command_line_says(vmm):
    target = find_target(f"pid:{vmm}")
    assert (target.pid, target.name, target.uuid) == (vmm, "web", UUID(VM_UUID))
    assert abs(target.start_time - time.time()) < 60


def test_a_vmm_that_was_given_no_name_is_called_by_its_process_id():
    target = find_target(f"pid:{os.getpid()}")
    assert (target.name, target.uuid) == (f"pid:{os.getpid()}", UUID(int=0))


@pytest.mark.parametrize("vm", ["pid:4194304", "pid:", "pid:webserver", "pid:-1"])
def test_a_process_id_that_is_none_is_refused(vm):
    with pytest.raises(NoSuchVm):
        find_target(vm)


@pytest.mark.parametrize("vm", ["test", VM_UUID])
def test_a_libvirt_name_or_uuid_is_the_process_with_that_uuid(vmm, vm):
    target = find_target(vm, TEST_DRIVER)
    assert (target.pid, target.name, target.uuid) == (vmm, "test", UUID(VM_UUID))


def test_a_guest_without_a_process_here_is_not_running():
    with pytest.raises(VmNotRunning, match="no process on this host"):
        find_target("test", TEST_DRIVER)


def test_a_guest_that_comes_to_run_is_waited_for(vmm, monkeypatch):
    monkeypatch.setattr(target, "processes", lambda: iter(()))
    monkeypatch.setattr(target, "sleep", lambda _: monkeypatch.setattr(target, "processes", lambda: iter([vmm])))
    assert find_target("test", TEST_DRIVER, wait=3600).pid == vmm


def test_a_guest_that_is_being_migrated_is_not_running_yet(vmm, monkeypatch):
    connection = libvirt.open(TEST_DRIVER)
    domain = connection.lookupByName("test")
    domain.suspend()
    try:
        assert find_target("test", TEST_DRIVER).pid == vmm  # paused by someone: it is all there
        state = [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION]
        monkeypatch.setattr(libvirt.virDomain, "state", lambda self, flags=0: state)
        with pytest.raises(VmNotRunning, match="is being migrated"):
            find_target("test", TEST_DRIVER)
    finally:
        domain.resume()
        connection.close()


@pytest.mark.parametrize("vm", ["webserver", "00000000-0000-0000-0000-000000000001"])
def test_a_guest_that_libvirt_does_not_know_is_told_apart(vm):
    with pytest.raises(NoSuchGuest, match=vm):
        find_target(vm, TEST_DRIVER)


def test_a_libvirt_that_does_not_answer_is_told_apart(tmp_path):
    with pytest.raises(LibvirtUnreachable, match="is libvirtd running"):
        find_target("webserver", f"qemu+unix:///system?socket={tmp_path}/none")


def test_a_guest_of_another_host_is_attached_to_there():
    with pytest.raises(AttachError, match="on their own host"):
        find_target("webserver", "qemu+ssh://root@lab1/system")
