# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's first settings, as cloud-init's NoCloud source reads them: a disk with the label ``cidata``."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from kvmi_host.provision.errors import ProvisionError

_KEY_KINDS = ("ssh-", "ecdsa-sha2-", "sk-ssh-", "sk-ecdsa-")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a guest is told when it first boots.

    :ivar hostname: its name; None leaves the image's.
    :ivar ssh_keys: public keys, one a line of ``authorized_keys``, for the image's default user.
    :ivar user_data: what cloud-init calls so, as it is: ``#cloud-config``, a script, whatever it takes.
    """

    hostname: str | None = None
    ssh_keys: tuple[str, ...] = ()
    user_data: bytes | None = None


def public_keys(text: str, source: str) -> tuple[str, ...]:
    """The keys of a ``.pub`` or ``authorized_keys`` file.

    :param source: the file's name, for the error.
    :raise ProvisionError: it holds none, or a private one, which must not leave where it is.
    """
    if "PRIVATE KEY" in text:
        raise ProvisionError(f"{source} is a private key: give the public one, {source}.pub")
    lines = tuple(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    if not lines or not all(any(word.startswith(_KEY_KINDS) for word in line.split()) for line in lines):
        raise ProvisionError(f"{source} holds no public SSH key: ssh-keygen makes one")
    return lines


def seed_image(instance: UUID, settings: Settings) -> bytes:
    """The ISO 9660 image.

    Host name and keys are meta-data, so that user-data is the user's alone and nothing has to be merged. Meta-data is
    YAML, of which JSON is a part.

    :param instance: cloud-init sets a guest up anew when this changes.
    """
    import pycdlib

    meta: dict[str, str | Sequence[str]] = {"instance-id": str(instance)}
    if settings.hostname:
        meta["local-hostname"] = settings.hostname
    if settings.ssh_keys:
        meta["public-keys"] = settings.ssh_keys
    user_data = b"#cloud-config\n{}\n" if settings.user_data is None else settings.user_data
    files = {"meta-data": json.dumps(meta, indent=1).encode() + b"\n", "user-data": user_data}
    iso = pycdlib.PyCdlib()
    iso.new(vol_ident="cidata", joliet=3, rock_ridge="1.09")
    for name, content in files.items():
        short = name.replace("-", "").upper()
        iso.add_fp(io.BytesIO(content), len(content), f"/{short[:8]}.;1", rr_name=name, joliet_path=f"/{name}")
    image = io.BytesIO()
    iso.write_fp(image)
    iso.close()
    return image.getvalue()
