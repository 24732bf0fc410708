# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where things are: the source tree that images are built from, and the cache that keeps what was built."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from kvmi_host.lab.errors import LabError, LabHostError


def project_root() -> Path:
    """The source checkout that this package runs from.

    :raise LabHostError: when the package was installed without its tree: there are no recipes to build from then.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "vm-images" / "lab-host" / "build").is_file():
        raise LabHostError(
            f"the host in a box is built from the source tree, and kvmi_host is installed without it (in {root}): "
            "run it from a checkout, where `make` sets up an editable installation"
        )
    return root


def cache_root() -> Path:
    """The folder for everything downloaded and built, outside the checkout: ``$XDG_CACHE_HOME/kvmi-host``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = Path(base) / "kvmi-host"
    path.mkdir(parents=True, exist_ok=True)
    return path


def run_dir(name: str, kind: str = "") -> Path:
    """The folder of one box's process: sockets, logs, and what must be known to stop it.

    :param kind: tells those of one name apart.
    :raise LabError: when a box cannot have that name.
    """
    if not name.replace("-", "").replace("_", "").isalnum():
        raise LabError(f"a box cannot be called {name!r}: letters, digits, - and _ only")
    path = cache_root() / "run" / f"{name}{kind}"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def program(name: str, package: str) -> str:
    """The full path of a program that a Debian package brings, also where PATH lacks the sbin folders.

    :raise LabHostError: when it is not installed.
    """
    found = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if found is None:
        raise LabHostError(f"{name} is needed and not installed: run ci/setup, or apt-get install {package}")
    return found
