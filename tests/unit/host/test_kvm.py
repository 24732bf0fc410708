# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host interface: ioctl numbers and structs, and what a host that cannot is told."""

from uuid import UUID

import pytest

from kvmi_host.host import HostError, introspection_enabled, kvm, require_introspection


def test_the_ioctls_have_the_numbers_of_the_protocol():
    # _IOC(direction, 0xAE, number, size) of <asm-generic/ioctl.h>
    assert kvm.KVM_INTROSPECTION_HOOK == 0x4018AEFF
    assert kvm.KVM_INTROSPECTION_UNHOOK == 0xAEFE
    assert kvm.KVM_INTROSPECTION_COMMAND == 0x4008AEFD
    assert kvm.KVM_INTROSPECTION_EVENT == 0x4008AEFC
    assert kvm.KVM_INTROSPECTION_UNHOOK_FORCE == 0xAEFB
    assert kvm.KVM_CHECK_EXTENSION == 0xAE03


@pytest.fixture
def ioctls(monkeypatch):
    made = []
    monkeypatch.setattr(kvm, "ioctl", lambda fd, number, argument=0: made.append((fd, number, argument)) or 0)
    return made


@pytest.mark.parametrize(("observe", "flags"), [(True, "01000000"), (False, "00000000")])
def test_hook_is_descriptor_flags_and_uuid(ioctls, observe, flags):
    kvm.hook(9, 5, UUID("00112233-4455-6677-8899-aabbccddeeff"), observe=observe)
    argument = bytes.fromhex("05000000" + flags + "00112233445566778899aabbccddeeff")
    assert ioctls == [(9, kvm.KVM_INTROSPECTION_HOOK, argument)]


def test_allowing_is_a_flag_and_an_id(ioctls):
    kvm.allow_command(9, 17)
    kvm.allow_event(9)
    kvm.allow_event(9, 1, allow=False)
    assert [argument for _, _, argument in ioctls] == [
        bytes.fromhex("01000000 11000000"),
        bytes.fromhex("01000000 ffffffff"),
        bytes.fromhex("00000000 01000000"),
    ]


@pytest.fixture
def device(tmp_path):
    path = tmp_path / "kvm"
    path.touch()
    return path


@pytest.fixture
def parameter(tmp_path):
    path = tmp_path / "introspection"
    path.write_text("Y\n")
    return path


@pytest.mark.parametrize("capability", [180, 999])
def test_a_host_with_introspection_says_which_version(device, parameter, monkeypatch, capability):
    monkeypatch.setattr(kvm, "ioctl", lambda fd, number, argument: int(argument == capability))
    assert require_introspection(device, parameter) == 1


def test_a_host_without_kvm_is_told_so(tmp_path):
    with pytest.raises(HostError, match="load kvm_amd or kvm_intel"):
        require_introspection(tmp_path / "kvm")


def test_a_device_that_is_not_kvm_is_told_so(device, parameter):
    with pytest.raises(HostError, match="does not answer as KVM"):
        require_introspection(device, parameter)


def test_stock_modules_are_told_so(device, tmp_path, ioctls):
    with pytest.raises(HostError, match="install and load the kvmi modules"):
        require_introspection(device, tmp_path / "no such parameter")


def test_introspection_that_is_switched_off_is_told_so(device, parameter, ioctls):
    parameter.write_text("N\n")
    with pytest.raises(HostError, match="introspection=1"):
        require_introspection(device, parameter)


@pytest.mark.parametrize(("text", "enabled"), [("Y\n", True), ("1\n", True), ("N\n", False)])
def test_the_module_parameter_is_read(parameter, text, enabled):
    parameter.write_text(text)
    assert introspection_enabled(parameter) is enabled


def test_modules_without_the_parameter_are_neither(tmp_path):
    assert introspection_enabled(tmp_path / "none") is None
