# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which process runs a VM."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from uuid import UUID

import libvirt
import pytest

from kvmi_host.attach import AttachError, NoSuchVm, VmNotRunning, find_target, target
from kvmi_host.provision import LibvirtUnreachable, NoSuchGuest

TEST_DRIVER = "test:///default"  # libvirt's built-in driver: one running guest, which has no process
VM_UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"


@contextmanager
def running(*arguments):
    """A process with these arguments."""
    code = "print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        yield process.pid
        process.communicate(b"\n")


@pytest.fixture
def vmm():
    """A process with QEMU's command line."""
    with running("-name", "guest=web,debug-threads=on", "-uuid", VM_UUID) as pid:
        yield pid


@pytest.fixture
def impostor():
    """A process of someone else's that has the UUID, too."""
    with running("-uuid", VM_UUID) as pid:
        yield pid


@pytest.fixture
def systems_libvirt(monkeypatch, tmp_path):
    """A URI of the system's libvirt, which the test driver answers, and the folder with its processes."""
    monkeypatch.setattr(target, "connect", lambda uri: libvirt.open(TEST_DRIVER))
    monkeypatch.setattr(target, "_LIBVIRT_RUN", tmp_path)
    return "qemu:///system", tmp_path


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


def test_of_several_with_the_uuid_the_one_that_libvirt_has_started_is_the_vm(vmm, impostor, systems_libvirt):
    uri, folder = systems_libvirt
    for pid in (vmm, impostor):
        (folder / "test.pid").write_text(str(pid))
        assert find_target("test", uri).pid == pid


@pytest.mark.parametrize("written", [None, "", "4194304", "1"])
def test_what_libvirt_has_not_written_down_is_looked_for(vmm, systems_libvirt, written):
    uri, folder = systems_libvirt
    if written is not None:
        (folder / "test.pid").write_text(written)
    assert find_target("test", uri).pid == vmm


def test_none_is_guessed_of_several_with_the_uuid(vmm, impostor):
    with pytest.raises(AttachError, match=f"pid:{vmm}.*pid:{impostor}|pid:{impostor}.*pid:{vmm}"):
        find_target("test", TEST_DRIVER)


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
