# SPDX-License-Identifier: LGPL-2.1-or-later
"""The domain of a guest, as libvirt gets it."""

import os
import subprocess
from itertools import product
from pathlib import PurePosixPath
from uuid import UUID
from xml.etree import ElementTree as ET

import pytest

from kvmi_host.provision import Firmware, Guest, Image, Introspection, Method, ProvisionError, Settings, domain_xml
from kvmi_host.provision import find_image as find_image_in
from kvmi_host.provision.domain import NAMESPACE, Made, Storage, Volume, has_nvram, made_by_us

QEMU = "{http://libvirt.org/schemas/domain/qemu/1.0}"
OVERLAY = Volume("default", "web.qcow2", PurePosixPath("/pool/web.qcow2"))
SEED = Volume("default", "web-seed.iso", PurePosixPath("/pool/web-seed.iso"))
STORAGE = Storage(OVERLAY, PurePosixPath("/mine/disk.qcow2"), SEED)
OWN_DISK = Image("disk.qcow2", disk=PurePosixPath("/mine/disk.qcow2"))


def find_image(name: str) -> Image:
    return find_image_in(name, "/images")


LINUX = find_image("linux")


NO_STORAGE = Storage()


def xml(storage: Storage = NO_STORAGE, serial_log: PurePosixPath | None = None, **settings: object) -> str:
    return domain_xml(Guest(**{"name": "web", "image": LINUX, **settings}), storage, serial_log)


def parse(*arguments: object, **settings: object) -> ET.Element:
    return ET.fromstring(xml(*arguments, **settings))


def qemu_arguments(**settings: object) -> list[str]:
    how = Introspection(Method.QEMU_OBJECT, **settings)
    return [argument.get("value") for argument in parse(introspection=how).iterfind(f"{QEMU}commandline/{QEMU}arg")]


def test_a_guest_runs_under_kvm():
    assert parse().get("type") == "kvm"


def test_a_guest_has_the_hosts_cpu_without_what_would_keep_it_from_being_saved():
    cpu = parse().find("cpu")
    assert cpu.get("mode") == "host-passthrough"
    assert cpu.get("migratable", "on") == "on"


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
    os_element = parse(image=find_image("modewalk")).find("os")
    assert os_element.findtext("kernel") == "/images/modewalk.elf"
    assert os_element.find("initrd") is None
    assert os_element.find("cmdline") is None


def test_the_serial_port_is_logged_where_we_are_told():
    log = PurePosixPath("/log/web-serial.log")
    assert parse(Storage(), log).find("devices/serial/log").get("file") == "/log/web-serial.log"
    assert parse().find("devices/serial/log") is None


def test_no_device_is_there_that_nobody_asked_for():
    devices = parse().find("devices")
    assert {(d.tag, d.get("type"), d.get("model")) for d in devices} == {
        ("serial", "pty", None),
        ("controller", "usb", "none"),
        ("memballoon", None, "none"),
    }


# -- firmware, network, disks


def test_uefi_is_asked_for_without_secure_boot():
    os_element = parse(firmware=Firmware.UEFI).find("os")
    assert os_element.get("firmware") == "efi"
    assert os_element.find("firmware/feature").attrib == {"enabled": "no", "name": "secure-boot"}
    assert parse().find("os").get("firmware") is None


@pytest.mark.parametrize("image", ["modewalk", "puppet"])
def test_uefi_is_refused_to_what_it_cannot_load(image):
    with pytest.raises(ProvisionError, match=f"{image}.*--firmware bios"):
        Guest("web", find_image(image), firmware=Firmware.UEFI)


@pytest.mark.parametrize(
    ("network", "kind", "source"),
    [("default", "network", {"network": "default"}), ("bridge=br0", "bridge", {"bridge": "br0"})],
)
def test_a_guest_has_the_network_that_was_asked_for(network, kind, source):
    interface = parse(network=network).find("devices/interface")
    assert interface.get("type") == kind
    assert interface.find("source").attrib == source
    assert interface.find("model").get("type") == "virtio"


def test_a_disk_is_the_overlay_above_an_image_that_stays_its_owners():
    disk = parse(STORAGE, image=OWN_DISK).find("devices/disk")
    assert disk.find("source").get("file") == "/pool/web.qcow2"
    below = disk.find("backingStore/source")
    assert below.get("file") == "/mine/disk.qcow2"
    assert below.find("seclabel").attrib == {"model": "dac", "relabel": "no"}


def test_a_disk_alone_is_booted_from():
    os_element = parse(STORAGE, image=OWN_DISK).find("os")
    assert os_element.find("boot").get("dev") == "hd"
    assert os_element.find("kernel") is None


def test_the_seed_is_a_second_disk_that_is_read_only():
    _, seed = parse(STORAGE, image=OWN_DISK).iterfind("devices/disk")
    assert seed.find("source").get("file") == "/pool/web-seed.iso"
    assert seed.find("readonly") is not None


def test_settings_for_an_image_that_reads_none_are_refused():
    with pytest.raises(ProvisionError, match="linux has no cloud-init"):
        Guest("web", LINUX, settings=Settings("web"))


# -- introspection


def test_our_settings_are_in_a_namespace_of_ours():
    settings = parse().find(f"metadata/{{{NAMESPACE}}}introspection")
    assert settings.attrib == {"method": "vm-fd", "image": "linux"}


def test_with_the_vm_fd_qemu_is_told_nothing():
    assert parse().find(f"{QEMU}commandline") is None


def test_with_the_object_qemu_connects_to_the_introspector():
    assert qemu_arguments(socket=PurePosixPath("/run/i.sock")) == [
        "-chardev",
        "socket,path=/run/i.sock,id=kvmi,reconnect=10",
        "-object",
        "introspection,id=kvmi-introspection,chardev=kvmi",
    ]


def test_a_cookie_is_named_by_its_file_alone():
    arguments = qemu_arguments(socket=PurePosixPath("/i"), cookie_file=PurePosixPath("/cookie"))
    assert arguments[2:] == [
        "-object",
        "secret,id=kvmi-cookie,file=/cookie",
        "-object",
        "introspection,id=kvmi-introspection,chardev=kvmi,key=kvmi-cookie",
    ]


def test_a_comma_in_a_path_does_not_end_it():
    arguments = qemu_arguments(socket=PurePosixPath("/a,b"), cookie_file=PurePosixPath("/c,d"))
    assert "path=/a,,b," in arguments[1]
    assert arguments[3].endswith("file=/c,,d")


@pytest.mark.parametrize(
    "settings",
    [
        {"method": Method.QEMU_OBJECT},
        {"method": Method.VM_FD, "socket": PurePosixPath("/i")},
        {"cookie_file": PurePosixPath("/c")},
    ],
)
def test_settings_of_the_object_belong_together(settings):
    with pytest.raises(ProvisionError):
        Introspection(**settings)


# -- what the XML tells later


def test_a_domain_of_ours_tells_what_we_made():
    assert made_by_us(xml(STORAGE, image=OWN_DISK)) == Made("disk.qcow2", "vm-fd", (OVERLAY, SEED))


def test_a_domain_of_someone_else_tells_nothing():
    assert made_by_us("<domain type='kvm'><metadata><other/></metadata></domain>") is None
    assert made_by_us("<domain type='kvm'/>") is None


def test_a_clone_does_not_claim_the_disks_of_the_first():
    clone = xml(STORAGE, image=OWN_DISK).replace("file='", 'file="').replace('file="/pool/web', 'file="/pool/clone')
    assert made_by_us(clone).volumes == ()


def test_a_guest_with_uefi_has_variables_that_go_with_it():
    assert has_nvram(xml(firmware=Firmware.UEFI))
    assert has_nvram("<domain><os><nvram>/x</nvram></os></domain>")
    assert not has_nvram(xml())


@pytest.mark.parametrize("name", ["a<b>&'c'", 'quo"te', "snow ☃"])
def test_any_name_survives_the_xml(name):
    assert parse(name=name).findtext("name") == name


CHOICES = {
    "image": (LINUX, find_image("modewalk"), find_image("debian"), OWN_DISK),
    "firmware": tuple(Firmware),
    "network": (None, "default", "bridge=br0"),
    "introspection": (
        Introspection(),
        Introspection(Method.QEMU_OBJECT, PurePosixPath("/i"), PurePosixPath("/cookie")),
    ),
}


def test_libvirts_schema_accepts_every_combination(tmp_path):
    files = []
    for chosen in product(*CHOICES.values()):
        settings = dict(zip(CHOICES, chosen, strict=True))
        if settings["image"].bare_metal and settings["firmware"] is Firmware.UEFI:
            continue
        storage = STORAGE if settings["image"].disk else Storage()
        path = tmp_path / f"{len(files)}.xml"
        path.write_text(xml(storage, PurePosixPath("/log"), uuid=UUID(int=7), emulator=PurePosixPath("/q"), **settings))
        files.append(path)
    schema = "/usr/share/libvirt/schemas/domain.rng"
    run = subprocess.run(["xmllint", "--noout", "--relaxng", schema, *files], capture_output=True, timeout=60)
    assert run.returncode == 0, run.stderr.decode()
    assert len(files) == 42


@pytest.mark.parametrize("image", ["linux", "modewalk"])
def test_virt_xml_validate_accepts_it(tmp_path, image):
    path = tmp_path / "domain.xml"
    path.write_text(xml(image=find_image(image), uuid=UUID(int=7)))
    subprocess.run(["virt-xml-validate", os.fspath(path), "domain"], check=True, capture_output=True, timeout=60)
