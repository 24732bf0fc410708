# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a guest boots: one of our images, a kernel of the user's, or a qcow2 of the user's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from struct import Struct

from kvmi_host.provision.errors import NoImage

IMAGE_DIRECTORY = PurePosixPath("/opt/kvmi-host/images")

_SERIAL_CONSOLE = "console=ttyS0 quiet mitigations=off nokaslr"

# The head of a qcow2 file: magic, version, backing file's offset and size, cluster bits, virtual size (big-endian; from
# QEMU's docs/interop/qcow2.txt).
_QCOW2 = Struct(">4sIQIIQ")
_QCOW2_MAGIC = b"QFI\xfb"


@dataclass(frozen=True, slots=True)
class Image:
    """What a guest boots: a kernel that is loaded directly (an ELF with a PVH or multiboot entry, or a bzImage), a
    disk, or both.

    :ivar kernel: its path, and that of the initramfs. With a disk they go where the disk goes; else they are on the
        VM's host.
    :ivar disk: a qcow2, which is never written: the guest gets an overlay.
    :ivar copied: its guests stand on a copy of the disk, even on this machine: what was built here may be built anew.
    """

    name: str
    kernel: PurePosixPath | None = None
    initrd: PurePosixPath | None = None
    cmdline: str = ""
    disk: PurePosixPath | None = None
    copied: bool = False

    @property
    def bare_metal(self) -> bool:
        """Whether it is one of ours that is its own kernel, started by multiboot or PVH: firmware cannot load it."""
        return self.kernel is not None and self.kernel.suffix == ".elf"


def find_image(name: str, directory: str | None = None) -> Image:
    """An image by its name (``modewalk``, ``puppet``, ``linux``, ``debian``), or by the path of a kernel or a qcow2.

    A path is that of a qcow2 if such a file is there, or if it ends so.

    :param directory: where the named images are; else what the environment variable KVMI_IMAGES says, else
        /opt/kvmi-host/images. For ``debian`` it is a folder of this machine, else one of the VM's host.
    """
    images = PurePosixPath(directory or os.environ.get("KVMI_IMAGES") or IMAGE_DIRECTORY)
    if name in {"modewalk", "puppet"}:
        return Image(name, images / f"{name}.elf")
    if name == "linux":
        return Image(name, images / "linux.vmlinuz", images / "linux.initrd", _SERIAL_CONSOLE)
    if name == "debian":
        cmdline = f"root=LABEL=debian ro {_SERIAL_CONSOLE}"
        kernel, initrd, disk = (images / f"debian.{part}" for part in ("vmlinuz", "initrd", "qcow2"))
        return Image(name, kernel, initrd, cmdline, disk, copied=True)
    path = PurePosixPath(os.path.abspath(name))
    if _is_qcow2(Path(path)):
        return Image(path.name, disk=path)
    return Image(path.name, path)


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """What the head of a qcow2 says. ``size`` is what a guest sees, in bytes."""

    size: int
    has_backing: bool


def disk_facts(path: Path) -> DiskFacts:
    """What the qcow2 file says of itself.

    :raise NoImage: it cannot be read, or it is none.
    """
    head = _head(path)
    if len(head) < _QCOW2.size or not head.startswith(_QCOW2_MAGIC):
        raise NoImage(f"{path} is no qcow2 image: convert it with qemu-img convert -O qcow2")
    _, _, backing, _, _, size = _QCOW2.unpack(head)
    return DiskFacts(size, backing != 0)


def _is_qcow2(path: Path) -> bool:
    return path.suffix == ".qcow2" or (path.is_file() and _head(path).startswith(_QCOW2_MAGIC))


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_QCOW2.size)
    except OSError as error:
        raise NoImage(f"the image cannot be read: {error}") from error
