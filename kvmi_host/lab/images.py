# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the host in a box is started from, built by the recipes in ``vm-images/`` and ``kernel/`` and cached."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvmi_host.host.kernels import Series
from kvmi_host.lab import cache
from kvmi_host.lab.errors import LabError, LabHostError
from kvmi_host.lab.paths import program, project_root
from kvmi_host.lab.progress import build, started

STOCK = "stock"
"""In place of a folder of modules: Debian's own KVM, which knows no introspection."""

_DEBIAN = "debian"
"""The guest image that takes a minute to build, and more room than the others together: only for who asks for it."""

_MODULES = ("kvm.ko", "kvm-amd.ko", "kvm-intel.ko")


@dataclass(frozen=True)
class HostKernel:
    """One of the kernels of the host in a box: a folder that the recipe of its disk wrote."""

    path: Path

    @property
    def image(self) -> Path:
        """The kernel, as QEMU starts it."""
        return self.path / "vmlinuz"

    @property
    def release(self) -> str:
        """The kernel's release, as ``uname -r`` says it."""
        return (self.path / "release").read_text().strip()

    @property
    def boot_modules(self) -> Path:
        """The modules that find the disk, and their order."""
        return self.path / "boot-modules"

    @property
    def kvm_modules(self) -> Path:
        """The stock ``kvm.ko``, ``kvm-amd.ko`` and ``kvm-intel.ko``."""
        return self.path / "kvm-modules"


@dataclass(frozen=True)
class HostImage:
    """The disk of the host in a box with its kernels and the keys that open it: the folder that its recipe wrote.

    The debug kernel is no part of it: it needs no modules there.
    """

    path: Path

    @property
    def disk(self) -> Path:
        """The root file system, never written. It holds the modules of every kernel."""
        return self.path / "root.img"

    def kernel(self, series: Series) -> HostKernel:
        """The kernel that it is booted with."""
        return _debug_kernel() if series is Series.DEBUG else HostKernel(self.path / "kernels" / series)

    @property
    def key(self) -> Path:
        """The private SSH key of its root user."""
        return self.path / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        """Its own public SSH key, under the name ``kvmi-lab``."""
        return self.path / "known_hosts"


def _version_key(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path.name)]


def kernel_release(series: Series, sources: Path = Path("/usr/src")) -> str:
    """The kernel that modules can be built for here: the newest cloud kernel of the series whose headers are installed.

    :param sources: where Debian installs headers.
    :raise LabHostError: without any.
    """
    headers = sorted(sources.glob(f"linux-headers-{series}.*-cloud-amd64"), key=_version_key)
    if not headers:
        package = series.headers_package
        raise LabHostError(f"no headers of kernel {series} in {sources}: run ci/setup, which installs {package}")
    return headers[-1].name.removeprefix("linux-headers-")


def _package_version(package: str) -> str:
    shown = subprocess.run(["dpkg-query", "-W", "-f", "${Version}", package], capture_output=True, text=True)
    return shown.stdout


def _require_root(what: str) -> None:
    if os.geteuid() != 0:
        raise LabHostError(f"{what} with mmdebstrap as root: run this as root, or with sudo")
    program("mmdebstrap", "mmdebstrap")


def _apt_sources() -> Path:
    """What finds where Debian's packages come from: a part of the recipes that install them."""
    return project_root() / "vm-images" / "apt-sources"


def host_image() -> HostImage:
    """The host's disk, built if its recipe or a kernel changed since (about a minute, from the network)."""
    releases = [kernel_release(series) for series in Series.packaged()]
    recipe = project_root() / "vm-images" / "lab-host"
    lock = project_root() / "ci" / "requirements.lock"
    names = ("build", "packages", "site.yml", "enter", "python-packages", "masked-units", "root")
    roles = ("ansible/roles/kvmi_base", "ansible/roles/kvmi_host", "kvmi_host/services")
    parts = [*(recipe / name for name in names), *(project_root() / name for name in roles), _apt_sources()]
    kernels = [f"{release} {_package_version(f'linux-headers-{release}')}" for release in releases]
    key = cache.digest(*parts, lock, *kernels)

    def make(out: Path) -> None:
        _require_root("the host in a box is built")
        env = {"KVMI_PYTHON": sys.executable}
        build("building the disk of the host in a box", [recipe / "build", out, *releases], env)

    # Another checkout's box may be up from its own.
    return HostImage(cache.entry("host", key, make, keep=2))


def _debug_kernel() -> HostKernel:
    """The kernel that checks itself, built if what it is made of changed since."""
    recipe = project_root() / "kernel"
    parts = [recipe / name for name in ("debug-kernel", "debug.config")]
    key = cache.digest(*parts, _package_version("linux-source-6.1"), _package_version("gcc"))

    def make(out: Path) -> None:
        build("building the debug kernel", [recipe / "debug-kernel", out])

    return HostKernel(cache.entry("debug_kernel", key, make))


def _headers(series: Series) -> Path:
    if series is Series.DEBUG:
        return _debug_kernel().path / "headers"
    return Path(f"/usr/src/linux-headers-{kernel_release(series)}")


@contextmanager
def kvm_modules(series: Series, source: str | None) -> Iterator[Callable[[], Path | None]]:
    """The modules to load, built while the block does something else.

    :param series: the kernel that they are for.
    :param source: a folder with the three ``.ko`` files, :data:`STOCK`, or None for what ``kernel/build`` makes
        of this tree.
    :return: a function that waits for them and returns their folder; None for the stock ones.
    """
    source = source or os.environ.get("KVMI_LAB_MODULES")
    if source == STOCK:
        yield lambda: None
    elif source is not None:
        yield lambda: _with_modules(Path(source))
    else:
        builder = project_root() / "kernel" / "build"
        with started("building KVM's modules", [builder, "--headers", _headers(series)]) as finish:
            yield lambda: _with_modules(Path(finish().rstrip().rpartition("\n")[2]))


def _with_modules(folder: Path) -> Path:
    for module in _MODULES:
        if not (folder / module).is_file():
            raise LabError(f"no {module} in {folder}: the host in a box cannot load it")
    return folder


def initrd(kernel: HostKernel, modules: Path | None) -> Path:
    """The initramfs that loads these modules (None: the stock ones) in the host."""
    recipe = project_root() / "vm-images" / "lab-host" / "initrd"
    folder = modules or kernel.kvm_modules
    parameters = ["introspection=1"] if modules else []
    busybox = program("busybox", "busybox-static")
    kvm = [folder / module for module in _MODULES]
    key = cache.digest(recipe, kernel.release, kernel.boot_modules, *kvm, busybox, *parameters)

    def make(out: Path) -> None:
        program("cpio", "cpio")
        program("strip", "binutils")
        build("building the initramfs", [recipe / "build", kernel.boot_modules, folder, out / "initrd", *parameters])

    return cache.entry("initrd", key, make, keep=4) / "initrd"


def bochs() -> Path:
    """The folder of Debian 13's Bochs, fetched if its recipe changed since (half a minute, from the network)."""
    recipe = project_root() / "vm-images" / "bochs"

    def make(out: Path) -> None:
        _require_root("Bochs is unpacked")
        build("fetching Bochs", [recipe / "build", out])

    return cache.entry("bochs", cache.digest(recipe), make)


def selftests(series: Series) -> Path:
    """The folder with KVM's own selftests of that kernel, and their names in ``tests``: see ``kernel/selftests``."""
    recipe = project_root() / "kernel" / "selftests"
    packages = [_package_version(package) for package in (f"linux-source-{series}", "gcc", "libc6-dev")]
    key = cache.digest(recipe, recipe.parent / "prepare", series, *packages)

    def make(out: Path) -> None:
        build(f"building KVM's selftests of {series}", [recipe, series, out])

    return cache.entry("selftests", key, make, keep=len(Series.packaged()))


def _guest_sources() -> Path:
    return project_root() / "vm-images" / "guests"


def guest_images() -> dict[str, Path]:
    """The files of the small guest images of this tree, each under the name that it has in the box.

    A file that is not called after its guest gets the guest's name in front: ``linux/initrd`` is ``linux.initrd``.
    """
    found: dict[str, Path] = {}
    sources = _guest_sources()
    for builder in sorted(sources.glob("*/build")):
        guest = builder.parent.name
        if guest == _DEBIAN:
            continue

        def make(out: Path, builder: Path = builder, guest: str = guest) -> None:
            build(f"building the guest image {guest}", [builder, out])

        key = cache.digest(builder.parent, sources / "pc", _package_version("busybox-static"))
        folder = cache.entry(f"guest_{guest}", key, make, keep=2)  # another checkout may be taking its own from there
        for file in cache.files(folder):
            found[file.name if file.name.startswith(guest) else f"{guest}.{file.name}"] = file
    return found


def debian_guest() -> Path:
    """The folder of the Debian guest, built if its recipe changed since (a minute, from the network)."""
    recipe = _guest_sources() / _DEBIAN

    def make(out: Path) -> None:
        _require_root("the Debian guest is built")
        program("qemu-img", "qemu-utils")
        build("building the Debian guest", [recipe / "build", out])

    return cache.entry("debian", cache.digest(recipe, _apt_sources()), make)


def qemu_version(qemu: str) -> str:
    """What ``qemu-system-x86_64 --version`` says: saved state is good for that version only."""
    argv: Sequence[str] = [qemu, "--version"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()[0]
