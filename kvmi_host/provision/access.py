# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether QEMU's own user can read a file, before libvirt tries: its own error says neither what is in the way nor what
to do.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from kvmi_host.provision.errors import NoImage

if TYPE_CHECKING:
    import libvirt


@dataclass(frozen=True, slots=True)
class User:
    """Whom QEMU runs as, with its groups."""

    uid: int
    gid: int
    groups: frozenset[int] = frozenset()

    @property
    def name(self) -> str:
        """Its name, or the number of one without."""
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return str(self.uid)


def qemu_user(connection: libvirt.virConnect) -> User | None:
    """The user of QEMU on that host, from libvirt's capabilities; None where it is libvirt's own, as in a session."""
    for model in ET.fromstring(connection.getCapabilities()).iterfind("host/secmodel"):
        label = model.findtext("baselabel[@type='kvm']", "")
        if model.findtext("model") == "dac" and label:
            uid, gid = (int(part.removeprefix("+")) for part in label.split(":"))
            return User(uid, gid)
    return None


def require_readable(connection: libvirt.virConnect, path: Path, *, by_owner: bool = False) -> None:
    """See that QEMU will be able to read a file of this machine.

    :param by_owner: libvirt makes QEMU's user the file's owner, so that only the way to it counts.
    :raise NoImage: it will not, or there is no such file.
    """
    if not path.is_file():
        raise NoImage(f"no file {path}: build the guest images, or say where they are with --image-dir")
    user = qemu_user(connection)
    if user is None:
        return
    where = obstacle(path, User(user.uid, user.gid, _groups(user)))
    if where and not (by_owner and where == path.resolve()):
        permission = "x" if where.is_dir() else "r"
        raise NoImage(
            f"QEMU runs as {user.name}, which cannot read {path}: {where} keeps it out."
            f" Move the image to /var/lib/libvirt/images, or chmod o+{permission} {where}"
        )


def _groups(user: User) -> frozenset[int]:
    try:
        return frozenset(os.getgrouplist(pwd.getpwuid(user.uid).pw_name, user.gid))
    except KeyError:
        return frozenset()


def obstacle(path: Path, user: User) -> Path | None:
    """The file, or the folder on the way to it, that keeps this user from reading it; None when nothing does.

    Where an access control list decides, it is left to libvirt to find out.
    """
    real = path.resolve()
    for folder in reversed(real.parents):
        if not _allows(folder, user, stat.S_IXOTH):
            return folder
    return None if _allows(real, user, stat.S_IROTH) else real


def _allows(path: Path, user: User, bit: int) -> bool:
    """Whether a permission is there, as POSIX decides: the owner's bits, or else the group's, or else the others'."""
    facts = path.stat()
    if user.uid == 0 or _has_acl(path):
        return True
    if facts.st_uid == user.uid:
        return bool(facts.st_mode & bit << 6)
    if facts.st_gid in user.groups | {user.gid}:
        return bool(facts.st_mode & bit << 3)
    return bool(facts.st_mode & bit)


def _has_acl(path: Path) -> bool:
    try:
        os.getxattr(path, "system.posix_acl_access")
    except OSError as error:
        if error.errno not in {errno.ENODATA, errno.ENOTSUP}:
            raise
        return False
    return True
