# SPDX-License-Identifier: LGPL-2.1-or-later
"""The libvirt domain of a guest: what it is made of, and its XML."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import PurePosixPath
from uuid import UUID
from xml.etree import ElementTree as ET

NAMESPACE = "urn:kvmi-host:guest:1"
"""Of our element in a domain's metadata, by which ``guest list`` knows what we made and how."""

SERIAL_LOGS = PurePosixPath("/var/log/libvirt/qemu")
IMAGE_DIRECTORY = PurePosixPath("/opt/kvmi-host/images")

ET.register_namespace("kvmi", NAMESPACE)


@dataclass(frozen=True, slots=True)
class Image:
    """What a guest boots: a kernel that QEMU loads itself (an ELF with a PVH or multiboot entry, or a bzImage)."""

    name: str
    kernel: PurePosixPath
    initrd: PurePosixPath | None = None
    cmdline: str = ""


@dataclass(frozen=True, slots=True)
class Guest:
    """A guest to be. ``memory`` in MiB."""

    name: str
    image: Image
    vcpus: int = 1
    memory: int = 128
    uuid: UUID | None = None

    @property
    def serial_log(self) -> PurePosixPath:
        """The file, on the VM's host, in which libvirt keeps what the guest writes to its serial port."""
        return SERIAL_LOGS / f"{self.name}-serial.log"


def find_image(name: str, directory: str | None = None) -> Image:
    """An image by its name (``modewalk``, ``puppet``, ``linux``) or by the path of a kernel.

    :param directory: where the named images are; else what the environment variable KVMI_IMAGES says, else
        /opt/kvmi-host/images. It is a path on the VM's host.
    """
    images = PurePosixPath(directory or os.environ.get("KVMI_IMAGES") or IMAGE_DIRECTORY)
    if name in {"modewalk", "puppet"}:
        return Image(name, images / f"{name}.elf")
    if name == "linux":
        cmdline = "console=ttyS0 quiet mitigations=off nokaslr"
        return Image(name, images / "linux.vmlinuz", images / "linux.initrd", cmdline)
    return Image(PurePosixPath(name).name, PurePosixPath(os.path.abspath(name)))


def domain_xml(guest: Guest) -> str:
    """The guest as libvirt's domain XML: KVM, direct boot, one serial port with a log, nothing else."""
    domain = ET.Element("domain", type="kvm")
    _text(domain, "name", guest.name)
    if guest.uuid:
        _text(domain, "uuid", str(guest.uuid))
    settings = ET.SubElement(ET.SubElement(domain, "metadata"), f"{{{NAMESPACE}}}introspection")
    settings.set("method", "vm-fd")
    settings.set("image", guest.image.name)
    _text(domain, "memory", str(guest.memory), unit="MiB")
    _text(domain, "vcpu", str(guest.vcpus))
    os_element = ET.SubElement(domain, "os")
    _text(os_element, "type", "hvm", arch="x86_64", machine="pc")
    _text(os_element, "kernel", str(guest.image.kernel))
    if guest.image.initrd:
        _text(os_element, "initrd", str(guest.image.initrd))
    if guest.image.cmdline:
        _text(os_element, "cmdline", guest.image.cmdline)
    features = ET.SubElement(domain, "features")
    ET.SubElement(features, "acpi")
    ET.SubElement(features, "apic")
    ET.SubElement(domain, "cpu", mode="host-passthrough", check="none", migratable="off")
    _text(domain, "on_crash", "destroy")
    devices = ET.SubElement(domain, "devices")
    serial = ET.SubElement(devices, "serial", type="pty")
    ET.SubElement(serial, "log", file=str(guest.serial_log), append="off")
    ET.SubElement(serial, "target", port="0")
    ET.SubElement(devices, "controller", type="usb", model="none")
    ET.SubElement(devices, "memballoon", model="none")
    return ET.tostring(domain, encoding="unicode")


def image_of(domain_xml: str) -> str | None:
    """The image that a domain of ours boots; None for a domain that we did not make."""
    settings = ET.fromstring(domain_xml).find(f"metadata/{{{NAMESPACE}}}introspection")
    return None if settings is None else settings.get("image")


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> None:
    ET.SubElement(parent, tag, attributes).text = text
