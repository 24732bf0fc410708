# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a host gets before the suite runs there: a virtual environment with a wheel of this tree and what that needs,
and the guest images. It is put together here, so that the host needs its own Python and python3-libvirt, and no
network, no pip and no compiler.

Every package is pure Python, but for the compiled part of ours where the host's Python is the one that runs here.
"""

from __future__ import annotations

import compileall
import functools
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from py_compile import PycInvalidationMode

from kvmi_host.lab import cache, deploy
from kvmi_host.lab.images import guest_images
from kvmi_host.lab.paths import project_root
from kvmi_host.lab.progress import build

OLDEST = (3, 11)
"""The Python that a host must have at least: pyproject.toml's."""

_PURE = ("--python-version", "{}", "--platform", "any", "--implementation", "py", "--abi", "none")


@dataclass(frozen=True)
class Python:
    """A host's interpreter.

    :ivar version: as in 3.11.
    :ivar machine: as ``uname -m`` says it.
    """

    version: tuple[int, int]
    machine: str

    @classmethod
    def here(cls) -> Python:
        """The one that runs this."""
        return cls(sys.version_info[:2], platform.machine())

    def __str__(self) -> str:
        return ".".join(map(str, self.version))


@dataclass(frozen=True)
class Parcel:
    """What goes to a host.

    :ivar name: of its folder there; another content has another name.
    :ivar site: where in it Python's packages are.
    :ivar archive: a compressed tar stream of what the folder holds.
    """

    name: str
    site: str
    archive: bytes


def unpacking(parcel: Parcel, top: PurePosixPath = deploy.TOP) -> str:
    """The script that makes the folder of a parcel there, of the archive on its standard input, if there is none. Those
    of others go."""
    place = top / parcel.name
    return f"""set -e
[ ! -e {place}/complete ] || exit 0
rm -rf {top}/suite-*
mkdir -p {top}
python3 -m venv --without-pip --system-site-packages {place}
tar -xz --no-same-owner -C {place}
{deploy.linux(place / "images")}
touch {place}/complete
"""


@functools.cache
def make_parcel(python: Python) -> Parcel:
    """Put together what a host with that Python gets; the packages come from PyPI, once.

    :raise LabError: pip did not do it; the message has what it said.
    """
    guests = guest_images()
    packages = _packages(python)
    name = f"suite-{cache.digest(str(python), packages, *guests, *guests.values())}"
    site = f"lib/python{python}/site-packages"

    def files() -> Iterator[tuple[PurePosixPath, bytes]]:
        for file in sorted(packages.rglob("*")):
            if file.is_file():
                yield PurePosixPath("/", site) / file.relative_to(packages).as_posix(), file.read_bytes()
        for guest, file in guests.items():
            yield PurePosixPath("/images") / guest, file.read_bytes()

    launcher = f"#!{deploy.TOP / name}/bin/python3\nfrom kvmi_host.cli import main\n\nmain()\n"
    return Parcel(name, site, deploy.pack({PurePosixPath("/bin/kvmi-host"): launcher.encode()}, files()))


def _packages(python: Python) -> Path:
    """The folder with what goes to the host's site-packages."""
    root = project_root()
    same = python == Python.here()
    wanted, lock = root / "vm-images/lab-host/python-packages", root / "ci/requirements.lock"
    tree = [root / part for part in ("pyproject.toml", "hatch_build.py", "kvmi_host", "tests/hardware", "docs")]
    key = cache.digest(str(python), str(same), sys.version, wanted, lock, *filter(Path.exists, tree))

    def make(out: Path) -> None:
        wheels = out / "wheels"
        make_wheel(wheels, pure=not same)
        target = ("install", "--target", out, "--only-binary", ":all:", "--no-compile")
        pure = [argument.format(python) for argument in _PURE]
        pip(f"fetching packages for Python {python}", *target, *pure, "--constraint", lock, "--requirement", wanted)
        pip("installing the wheel", *target, "--no-deps", "--no-index", *([] if same else pure), *wheels.iterdir())
        for folder in (wheels, out / "bin", out / "share"):  # programs would be those of the Python here
            shutil.rmtree(folder, ignore_errors=True)
        if python.version == sys.version_info[:2]:
            # Used without a look at the source's time. To compile takes an emulated host half a minute.
            mode = PycInvalidationMode.UNCHECKED_HASH
            compileall.compile_dir(out, stripdir=str(out), quiet=2, invalidation_mode=mode)

    return cache.entry("suite", key, make, keep=4)


def make_wheel(out: Path, *, pure: bool) -> None:
    """Leave a wheel of this tree in a folder.

    :param pure: without the compiled part, which is this Python's.
    :raise LabError: pip did not do it; the message has what it said.
    """
    options = ("--no-build-isolation", "--no-deps", "-w", out)
    pip("making a wheel of this tree", "wheel", *options, project_root(), pure=pure)


def pip(what: str, *arguments: str | Path, pure: bool = False) -> None:
    """Have pip do something.

    :param what: as it is shown.
    :param pure: without a compiler.
    :raise LabError: it failed; the message has what it said.
    """
    argv = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    build(what, argv, {"CC": "false"} if pure else None)
