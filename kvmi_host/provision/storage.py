# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's disks, through libvirt's storage API: the same for a local libvirt, a remote one, and a session.

An image is never written. A guest's disk is an overlay, a volume of its own. Below it is the image itself where libvirt
is local, and else a copy on the VM's host, uploaded once: its name is a hash of what is in it. Of our own disk images
there is always a copy, for they live in a cache.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO
from uuid import UUID
from xml.etree import ElementTree as ET

from kvmi_host.provision.access import User, qemu_user, require_readable
from kvmi_host.provision.domain import Guest, Storage, Volume
from kvmi_host.provision.errors import NoImage, ProvisionError
from kvmi_host.provision.images import Image, disk_facts
from kvmi_host.provision.libvirtd import is_remote, is_session
from kvmi_host.provision.seed import seed_image

if TYPE_CHECKING:
    import libvirt

POOL = "default"
"""The pool of what we make; other tools use it, too."""

_HEAD = 1 << 16  # bytes
_BLOCK = 1 << 18  # bytes

Tell = Callable[[str], object]


def provide(
    connection: libvirt.virConnect, guest: Guest, uuid: UUID, undo: ExitStack, tell: Tell
) -> tuple[Image, Storage]:
    """See to it that the VM's host has what the guest boots, and make the volumes of a guest with a disk.

    :param uuid: what the guest will have.
    :param undo: gets what takes the guest's own volumes away again. Copies of images stay, for the next guest.
    :param tell: is told what takes its time.
    :return: the image, with paths of the VM's host, and the volumes.
    :raise NoImage: a file is not there, or QEMU cannot read it there.
    :raise ProvisionError: libvirt has no place for it.
    :raise libvirt.libvirtError: libvirt refused.
    """
    image = guest.image
    remote = is_remote(connection.getURI())
    copied = remote or image.copied
    if not copied:
        for path in filter(None, (image.kernel, image.initrd)):
            # Given to QEMU's user while the guest runs.
            require_readable(connection, Path(path), by_owner=True)
        if image.disk:
            require_readable(connection, Path(image.disk))
    if not image.disk:
        return image, Storage()
    pool = _pool(connection)
    size = _size(connection, image.disk, remote)
    if copied:
        on_host = {path: _on_host(connection, pool, path, tell) for path in (image.kernel, image.initrd, image.disk)}
        image = replace(image, kernel=on_host[image.kernel], initrd=on_host[image.initrd], disk=on_host[image.disk])
    overlay = _create(pool, f"{guest.name}.qcow2", "qcow2", size, backing=image.disk)
    undo.callback(overlay.delete)
    storage = Storage(overlay=_volume(overlay), backing=image.disk)
    if guest.settings:
        content = seed_image(uuid, guest.settings)
        seed = _create(pool, f"{guest.name}-seed.iso", "raw", len(content))
        undo.callback(seed.delete)
        _upload(connection, seed, io.BytesIO(content), len(content))
        storage = replace(storage, seed=_volume(seed))
    return image, storage


def remove(connection: libvirt.virConnect, volume: Volume) -> None:
    """Delete a volume, if it is still there and still that file.

    :raise libvirt.libvirtError: libvirt refused.
    """
    import libvirt

    try:
        found = connection.storagePoolLookupByName(volume.pool).storageVolLookupByName(volume.name)
    except libvirt.libvirtError as error:
        if error.get_error_code() in {libvirt.VIR_ERR_NO_STORAGE_POOL, libvirt.VIR_ERR_NO_STORAGE_VOL}:
            return
        raise
    if found.path() == str(volume.path):
        found.delete()


def _volume(made: libvirt.virStorageVol) -> Volume:
    return Volume(POOL, made.name(), PurePosixPath(made.path()))


def _pool(connection: libvirt.virConnect) -> libvirt.virStoragePool:
    """The pool, made where tools look for it if there is none, and started."""
    import libvirt

    try:
        pool = connection.storagePoolLookupByName(POOL)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_POOL:
            raise
        description = ET.Element("pool", type="dir")
        ET.SubElement(description, "name").text = POOL
        ET.SubElement(ET.SubElement(description, "target"), "path").text = str(_pool_path(connection.getURI()))
        pool = connection.storagePoolDefineXML(ET.tostring(description, encoding="unicode"))
        pool.build()
        pool.setAutostart(1)
    if not pool.isActive():
        pool.create()
    return pool


def _pool_path(uri: str) -> PurePosixPath:
    if not is_session(uri):
        return PurePosixPath("/var/lib/libvirt/images")
    if is_remote(uri):
        raise ProvisionError(
            f"{uri} has no pool {POOL!r}, and where its user's home is cannot be told from here: make one there,"
            f" virsh -c qemu:///session pool-create-as {POOL} dir --target ~/.local/share/libvirt/images --build"
        )
    return PurePosixPath(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "libvirt/images"


def _size(connection: libvirt.virConnect, disk: PurePosixPath, remote: bool) -> int:
    """What a guest sees of a disk image of this machine, or of one that only the VM's host has, in bytes."""
    import libvirt

    path = Path(disk)
    if not remote or path.is_file():
        return disk_facts(path).size
    try:
        return int(connection.storageVolLookupByPath(str(disk)).info()[1])
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_VOL:
            raise
        raise NoImage(f"{disk} is neither a file here, to be uploaded, nor in a pool of the VM's host") from None


def _on_host(
    connection: libvirt.virConnect, pool: libvirt.virStoragePool, path: PurePosixPath | None, tell: Tell
) -> PurePosixPath | None:
    """The path on the VM's host of the copy of this file, uploaded if it is not there yet."""
    from hashlib import file_digest  # here: it loads OpenSSL, and those who attach need none

    import libvirt

    if path is None or not Path(path).is_file():
        return path
    if path.suffix == ".qcow2" and disk_facts(Path(path)).has_backing:
        raise NoImage(f"{path} is an overlay, which is nothing without the file below: qemu-img convert makes it whole")
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        name = f"kvmi-{file_digest(file, 'sha256').hexdigest()[:16]}{path.suffix}"
        file.seek(0)
        try:
            volume = pool.storageVolLookupByName(name)
            if _head(connection, volume, size) == file.read(_HEAD):
                return PurePosixPath(volume.path())
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_STORAGE_VOL:
                raise
            volume = _create(pool, name, "raw", size, owner=qemu_user(connection))
        tell(f"uploading {path} ({size >> 20} MiB)")
        _upload(connection, volume, file, size)
    return PurePosixPath(volume.path())


def _create(
    pool: libvirt.virStoragePool,
    name: str,
    kind: str,
    size: int,
    *,
    backing: PurePosixPath | None = None,
    owner: User | None = None,
) -> libvirt.virStorageVol:
    """Make a volume.

    :param owner: who alone may read it, and nobody write.
    """
    description = ET.Element("volume")
    ET.SubElement(description, "name").text = name
    ET.SubElement(description, "capacity", unit="bytes").text = str(size)
    ET.SubElement(description, "allocation").text = "0"
    target = ET.SubElement(description, "target")
    ET.SubElement(target, "format", type=kind)
    if owner:
        permissions = ET.SubElement(target, "permissions")
        for what, value in (("mode", "0400"), ("owner", str(owner.uid)), ("group", str(owner.gid))):
            ET.SubElement(permissions, what).text = value
    if backing:
        below = ET.SubElement(description, "backingStore")
        ET.SubElement(below, "path").text = str(backing)
        ET.SubElement(below, "format", type="qcow2")
    return pool.createXML(ET.tostring(description, encoding="unicode"))


def _upload(connection: libvirt.virConnect, volume: libvirt.virStorageVol, file: BinaryIO, size: int) -> None:
    """Fill a volume. Its first bytes come last: a volume that begins as its file does is whole."""
    for start, end in ((min(_HEAD, size), size), (0, min(_HEAD, size))):
        if start == end:
            continue
        file.seek(start)
        left = end - start

        def read(_stream: libvirt.virStream, wanted: int, _opaque: None) -> bytes:
            nonlocal left
            block = file.read(min(wanted, left, _BLOCK))
            left -= len(block)
            return block

        stream = connection.newStream()
        try:
            volume.upload(stream, start, end - start)
            stream.sendAll(read, None)
            stream.finish()
        except BaseException:
            stream.abort()
            raise


def _head(connection: libvirt.virConnect, volume: libvirt.virStorageVol, size: int) -> bytes:
    head = bytearray()
    stream = connection.newStream()
    volume.download(stream, 0, min(_HEAD, size))
    stream.recvAll(lambda _stream, block, _opaque: head.extend(block), None)
    stream.finish()
    return bytes(head)
