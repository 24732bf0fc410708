# SPDX-License-Identifier: LGPL-2.1-or-later
"""The domain of a guest, as libvirt gets it."""

import os
import subprocess
from pathlib import PurePosixPath
from uuid import UUID
from xml.etree import ElementTree as ET

import pytest

from kvmi_host.provision import Guest, Image, domain_xml, find_image
from kvmi_host.provision.domain import NAMESPACE, image_of

LINUX = find_image("linux", "/images")


def parse(**settings: object) -> ET.Element:
    return ET.fromstring(domain_xml(Guest(**{"name": "web", "image": LINUX, **settings})))


def test_a_guest_runs_under_kvm():
    assert parse().get("type") == "kvm"


def test_a_guest_has_the_name_cpus_and_memory_that_were_asked_for():
    domain = parse(vcpus=4, memory=256, uuid=UUID(int=7))
    assert domain.findtext("name") == "web"
    assert domain.findtext("uuid") == str(UUID(int=7))
    assert domain.findtext("vcpu") == "4"
    memory = domain.find("memory")
    assert (memory.text, memory.get("unit")) == ("256", "MiB")


def test_linux_boots_directly_with_an_initramfs_and_a_serial_console():
    os_element = parse().find("os")
    assert os_element.findtext("kernel") == "/images/linux.vmlinuz"
    assert os_element.findtext("initrd") == "/images/linux.initrd"
    assert "console=ttyS0" in os_element.findtext("cmdline")


def test_modewalk_boots_directly_and_alone():
    os_element = parse(image=find_image("modewalk", "/images")).find("os")
    assert os_element.findtext("kernel") == "/images/modewalk.elf"
    assert os_element.find("initrd") is None
    assert os_element.find("cmdline") is None


def test_the_serial_port_is_logged_where_libvirt_may_write():
    assert parse().find("devices/serial/log").get("file") == "/var/log/libvirt/qemu/web-serial.log"


def test_no_device_is_there_that_nobody_asked_for():
    devices = parse().find("devices")
    assert {(d.tag, d.get("type"), d.get("model")) for d in devices} == {
        ("serial", "pty", None),
        ("controller", "usb", "none"),
        ("memballoon", None, "none"),
    }


def test_our_settings_are_in_a_namespace_of_ours():
    settings = parse().find(f"metadata/{{{NAMESPACE}}}introspection")
    assert settings.attrib == {"method": "vm-fd", "image": "linux"}
    assert image_of(domain_xml(Guest("web", LINUX))) == "linux"


def test_a_domain_of_someone_else_has_no_image_of_ours():
    assert image_of("<domain type='kvm'><metadata><other/></metadata></domain>") is None
    assert image_of("<domain type='kvm'/>") is None


@pytest.mark.parametrize("name", ["a<b>&'c'", 'quo"te', "snow ☃"])
def test_any_name_survives_the_xml(name):
    assert parse(name=name).findtext("name") == name


@pytest.mark.parametrize("image", ["linux", "modewalk"])
def test_libvirts_schema_accepts_it(tmp_path, image):
    path = tmp_path / "domain.xml"
    path.write_text(domain_xml(Guest("web", find_image(image), uuid=UUID(int=7))))
    subprocess.run(["virt-xml-validate", os.fspath(path), "domain"], check=True, capture_output=True, timeout=60)


def test_images_are_looked_for_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("KVMI_IMAGES", "/from/environment")
    assert find_image("linux").kernel == PurePosixPath("/from/environment/linux.vmlinuz")
    assert find_image("linux", "/from/option").kernel == PurePosixPath("/from/option/linux.vmlinuz")
    monkeypatch.delenv("KVMI_IMAGES")
    assert find_image("modewalk").kernel == PurePosixPath("/opt/kvmi-host/images/modewalk.elf")


def test_an_image_can_be_a_kernel_of_the_users(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert find_image("my/kernel.elf") == Image("kernel.elf", PurePosixPath(tmp_path, "my/kernel.elf"))
