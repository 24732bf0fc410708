# SPDX-License-Identifier: LGPL-2.1-or-later
"""The libvirt domain of a guest: what it is made of, its XML, and what that XML tells us later."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath
from uuid import UUID
from xml.etree import ElementTree as ET

from kvmi_host.provision.errors import ProvisionError
from kvmi_host.provision.images import Image
from kvmi_host.provision.seed import Settings

NAMESPACE = "urn:kvmi-host:guest:1"
"""Of our element in a domain's metadata, by which ``guest list`` knows what we made and how."""

_QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
_SETTINGS = f"metadata/{{{NAMESPACE}}}introspection"
_VOLUME = f"{{{NAMESPACE}}}volume"
_OBJECT = "kvmi"  # the id of the chardev and of the object; the secret's is this with -cookie
_RECONNECT = 10  # seconds

ET.register_namespace("kvmi", NAMESPACE)
ET.register_namespace("qemu", _QEMU)


class Firmware(StrEnum):
    """What starts the guest. UEFI is without Secure Boot and without TPM."""

    BIOS = "bios"
    UEFI = "uefi"


class Method(StrEnum):
    """How an introspector gets its connection with KVM."""

    VM_FD = "vm-fd"
    """Our modules: the ioctls on the VM's descriptor, whatever the VMM is."""
    QEMU_OBJECT = "qemu-object"
    """KVM-VMI's kernel and QEMU: QEMU makes the connection."""


@dataclass(frozen=True, slots=True)
class Introspection:
    """How the guest is introspected.

    :ivar socket: with ``qemu-object``, where the introspector listens on the VM's host.
    :ivar cookie_file: with ``qemu-object``, a file of the VM's host with the secret that both ends know.
    """

    method: Method = Method.VM_FD
    socket: PurePosixPath | None = None
    cookie_file: PurePosixPath | None = None

    def __post_init__(self) -> None:
        if (self.method is Method.QEMU_OBJECT) != (self.socket is not None):
            raise ProvisionError("qemu-object needs the socket of an introspector, and vm-fd takes none")
        if self.cookie_file and not self.socket:
            raise ProvisionError("a cookie is for qemu-object alone")


@dataclass(frozen=True, slots=True)
class Guest:
    """A guest to be.

    :ivar memory: in MiB.
    :ivar network: the name of a network of libvirt's, ``bridge=NAME`` for a bridge of the VM's host, or None.
    :ivar settings: for cloud-init; None attaches no seed. Only for images with a disk.
    :ivar emulator: the QEMU to run, a path on the VM's host; None is libvirt's choice.
    """

    name: str
    image: Image
    vcpus: int = 1
    memory: int = 128
    uuid: UUID | None = None
    network: str | None = None
    firmware: Firmware = Firmware.BIOS
    settings: Settings | None = None
    introspection: Introspection = Introspection()
    emulator: PurePosixPath | None = None

    def __post_init__(self) -> None:
        if self.firmware is Firmware.UEFI and self.image.bare_metal:
            raise ProvisionError(f"UEFI cannot load {self.image.name}, a multiboot kernel: take --firmware bios")
        if self.settings and not self.image.disk:
            raise ProvisionError(f"{self.image.name} has no cloud-init to read settings: take an image with a disk")


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume of the VM's host that is the guest's alone, and goes with it."""

    pool: str
    name: str
    path: PurePosixPath


@dataclass(frozen=True, slots=True)
class Storage:
    """What of a guest is in libvirt's storage.

    :ivar overlay: its disk, a qcow2.
    :ivar backing: the qcow2 below, which is nobody's to write.
    :ivar seed: its settings.
    """

    overlay: Volume | None = None
    backing: PurePosixPath | None = None
    seed: Volume | None = None


def domain_xml(guest: Guest, storage: Storage = Storage(), serial_log: PurePosixPath | None = None) -> str:
    """The guest as libvirt's domain XML: KVM, one serial port, what was asked for, nothing else.

    :param storage: where its disks are, if its image has one.
    :param serial_log: a file of the VM's host for what the guest writes to its serial port.
    """
    domain = ET.Element("domain", type="kvm")
    _text(domain, "name", guest.name)
    if guest.uuid:
        _text(domain, "uuid", str(guest.uuid))
    _metadata(domain, guest, storage)
    _text(domain, "memory", str(guest.memory), unit="MiB")
    _text(domain, "vcpu", str(guest.vcpus))
    _boot(domain, guest)
    features = ET.SubElement(domain, "features")
    ET.SubElement(features, "acpi")
    ET.SubElement(features, "apic")
    ET.SubElement(domain, "cpu", mode="host-passthrough", check="none")
    _text(domain, "on_crash", "destroy")
    devices = ET.SubElement(domain, "devices")
    if guest.emulator:
        _text(devices, "emulator", str(guest.emulator))
    _disks(devices, storage)
    ET.SubElement(devices, "controller", type="usb", model="none")
    if guest.network:
        _interface(devices, guest.network)
    serial = ET.SubElement(devices, "serial", type="pty")
    if serial_log:
        ET.SubElement(serial, "log", file=str(serial_log), append="off")
    ET.SubElement(serial, "target", port="0")
    ET.SubElement(devices, "memballoon", model="none")
    if guest.image.disk:
        # What boots from a disk makes keys: without it, it waits for its own noise.
        rng = ET.SubElement(devices, "rng", model="virtio")
        _text(rng, "backend", "/dev/urandom", model="random")
    if guest.introspection.socket:
        _qemu_object(domain, guest.introspection.socket, guest.introspection.cookie_file)
    return ET.tostring(domain, encoding="unicode")


@dataclass(frozen=True, slots=True)
class Made:
    """What a domain's metadata says of a guest that we made. It is there to be read by anyone, and written, too."""

    image: str | None
    method: str | None
    volumes: tuple[Volume, ...]


def made_by_us(domain_xml: str) -> Made | None:
    """What we know of a domain; None when we did not make it.

    Volumes are those alone that are disks of this domain: metadata that was copied to another names the first one's.
    """
    domain = ET.fromstring(domain_xml)
    settings = domain.find(_SETTINGS)
    if settings is None:
        return None
    disks = {source.get("file") for source in domain.iterfind("devices/disk/source")}
    volumes = tuple(
        Volume(volume.get("pool", ""), volume.get("name", ""), PurePosixPath(volume.get("path", "")))
        for volume in settings.iterfind(_VOLUME)
        if volume.get("path") in disks
    )
    return Made(settings.get("image"), settings.get("method"), volumes)


def has_nvram(domain_xml: str) -> bool:
    """Whether the domain's firmware keeps variables in a file of its own."""
    os_element = ET.fromstring(domain_xml).find("os")
    return os_element is not None and (os_element.get("firmware") == "efi" or os_element.find("nvram") is not None)


def _metadata(domain: ET.Element, guest: Guest, storage: Storage) -> None:
    """One element, as libvirt wants it for a namespace."""
    how = guest.introspection
    settings = ET.SubElement(ET.SubElement(domain, "metadata"), f"{{{NAMESPACE}}}introspection")
    settings.set("method", how.method)
    settings.set("image", guest.image.name)
    if how.socket:
        settings.set("socket", str(how.socket))
    for volume in filter(None, (storage.overlay, storage.seed)):
        ET.SubElement(settings, _VOLUME, pool=volume.pool, name=volume.name, path=str(volume.path))


def _boot(domain: ET.Element, guest: Guest) -> None:
    image = guest.image
    os_element = ET.SubElement(domain, "os")
    _text(os_element, "type", "hvm", arch="x86_64", machine="pc")
    if guest.firmware is Firmware.UEFI:
        os_element.set("firmware", "efi")
        ET.SubElement(ET.SubElement(os_element, "firmware"), "feature", enabled="no", name="secure-boot")
    if image.kernel:
        _text(os_element, "kernel", str(image.kernel))
        if image.initrd:
            _text(os_element, "initrd", str(image.initrd))
        if image.cmdline:
            _text(os_element, "cmdline", image.cmdline)
    else:
        ET.SubElement(os_element, "boot", dev="hd")


def _disks(devices: ET.Element, storage: Storage) -> None:
    if storage.overlay:
        disk = _disk(devices, storage.overlay, "qcow2", "vda")
        if storage.backing:
            backing = ET.SubElement(disk, "backingStore", type="file")
            ET.SubElement(backing, "format", type="qcow2")
            source = ET.SubElement(backing, "source", file=str(storage.backing))
            # Else libvirt gives the user's own file to QEMU's user while the guest runs.
            ET.SubElement(source, "seclabel", model="dac", relabel="no")
    if storage.seed:
        # A virtio disk, not a CD-ROM: any cloud image finds this one, for its own disk is such.
        ET.SubElement(_disk(devices, storage.seed, "raw", "vdb"), "readonly")


def _disk(devices: ET.Element, volume: Volume, driver: str, target: str) -> ET.Element:
    # type="volume" would be shorter, but libvirt's AppArmor driver does not look up what such disks are.
    disk = ET.SubElement(devices, "disk", type="file", device="disk")
    ET.SubElement(disk, "driver", name="qemu", type=driver)
    ET.SubElement(disk, "source", file=str(volume.path))
    ET.SubElement(disk, "target", dev=target, bus="virtio")
    return disk


def _interface(devices: ET.Element, network: str) -> None:
    kind, _, name = network.rpartition("=")
    interface = ET.SubElement(devices, "interface", type=kind or "network")
    ET.SubElement(interface, "source", {kind or "network": name})
    ET.SubElement(interface, "model", type="virtio")


def _qemu_object(domain: ET.Element, socket: PurePosixPath, cookie_file: PurePosixPath | None) -> None:
    """The KVM-VMI project's QEMU connects by itself (kvmi-abi.md, section 6). libvirt passes this on unread.

    The cookie is named by its file: a command line is everybody's to read.
    """
    arguments = ["-chardev", f"socket,path={_escaped(socket)},id={_OBJECT},reconnect={_RECONNECT}"]
    introspection = f"introspection,id={_OBJECT}-introspection,chardev={_OBJECT}"
    if cookie_file:
        arguments += ["-object", f"secret,id={_OBJECT}-cookie,file={_escaped(cookie_file)}"]
        introspection += f",key={_OBJECT}-cookie"
    commandline = ET.SubElement(domain, f"{{{_QEMU}}}commandline")
    for argument in (*arguments, "-object", introspection):
        ET.SubElement(commandline, f"{{{_QEMU}}}arg", value=argument)


def _escaped(path: PurePosixPath) -> str:
    """A path as a value of QEMU's, where a comma ends a value unless it is doubled."""
    return str(path).replace(",", ",,")


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> None:
    ET.SubElement(parent, tag, attributes).text = text
