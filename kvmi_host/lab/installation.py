# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a host gets that keeps us: wheels of this tree and of all that it needs, manual pages, completion for shells and
guest images, as one archive.

    python -m kvmi_host.lab.installation       # the last line of output is the archive

It is put together where Ansible runs (``ansible/roles/kvmi_host``): the host needs no network for it. What the suite
alone needs is not in it: :mod:`kvmi_host.lab.parcel`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path

from kvmi_host.lab import cache
from kvmi_host.lab.errors import LabError
from kvmi_host.lab.images import guest_images
from kvmi_host.lab.parcel import make_wheel, pip
from kvmi_host.lab.paths import project_root
from kvmi_host.lab.progress import build

_DEBIANS = ("--python-version", "3.11", "--implementation", "cp")
"""Debian 12's Python, whichever runs here."""

_PLATFORMS = ("manylinux_2_34_x86_64", "manylinux_2_28_x86_64", "manylinux2014_x86_64")
"""What its C library takes."""

_FROM_DEBIAN = {"libvirt-python"}
"""Packages that the host has of Debian: PyPI has their source alone."""

_COMPLETIONS = {
    "bash": "share/bash-completion/completions/kvmi-host",
    "zsh": "share/zsh/site-functions/_kvmi-host",
    "fish": "share/fish/vendor_completions.d/kvmi-host.fish",
}


def requirements(project: str) -> list[str]:
    """What of PyPI's a host needs, as pip takes it.

    :param project: the text of pyproject.toml.
    """
    wanted: list[str] = tomllib.loads(project)["project"]["dependencies"]
    return [one for one in wanted if re.split(r"[<>=!~\[ ]", one)[0] not in _FROM_DEBIAN]


def archive() -> Path:
    """The archive, put together if what it is made of has changed.

    :raise LabError: a part of it could not be had; the message has what was said.
    """
    root, guests = project_root(), guest_images()
    tree = [root / part for part in ("pyproject.toml", "hatch_build.py", "kvmi_host", "docs", "ci/requirements.lock")]
    key = cache.digest(*filter(Path.exists, tree), *guests, *guests.values(), sys.version)

    def make(out: Path) -> None:
        _wheels(root, out / "wheels")
        _manuals(root, out / "share/man")
        for shell, place in _COMPLETIONS.items():
            script = _completion(shell)
            (out / place).parent.mkdir(parents=True)
            (out / place).write_text(script)
        (out / "images").mkdir()
        for name, file in guests.items():
            (out / "images" / name).write_bytes(file.read_bytes())
        with tarfile.open(out / "kvmi-host.tar", "w") as tar:
            for folder in ("images", "share", "wheels"):
                tar.add(out / folder, folder, filter=_anonymous)

    return cache.entry("installation", key, make, keep=2) / "kvmi-host.tar"


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """The same content is the same archive, whoever makes it, and when."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = "root"
    member.mode = 0o755 if member.isdir() else 0o644
    return member


def _wheels(root: Path, out: Path) -> None:
    # Where another Python runs here the compiled part is left out, and the host does the same slower.
    make_wheel(out, pure=sys.version_info[:2] != (3, 11))
    platforms = [argument for platform in _PLATFORMS for argument in ("--platform", platform)]
    lock = ("--constraint", root / "ci/requirements.lock")
    wanted = requirements((root / "pyproject.toml").read_text())
    options: list[str | Path] = ["--only-binary", ":all:", *_DEBIANS, *platforms, *lock, "--dest", out]
    pip("fetching Python packages", "download", *options, *wanted)


def _manuals(root: Path, out: Path) -> None:
    for section in ("man1", "man5"):
        (out / section).mkdir(parents=True)
    build("writing manual pages", [sys.executable, "-m", "kvmi_host.cli.manual", root, out / "man1"])
    for page in (root / "docs/man").glob("*.5"):
        (out / "man5" / page.name).write_bytes(page.read_bytes())


def _completion(shell: str) -> str:
    """The script that a shell reads; the command itself writes it."""
    program = "import sys; sys.argv = ['kvmi-host']; from kvmi_host.cli import main; main()"
    with tempfile.TemporaryDirectory() as nowhere:
        env = {**os.environ, "_KVMI_HOST_COMPLETE": f"source_{shell}", "HOME": nowhere}
        argv = [sys.executable, "-c", program]
        return subprocess.run(argv, env=env, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{archive()}\n")
    except LabError as error:
        sys.exit(f"installation: {error}")
