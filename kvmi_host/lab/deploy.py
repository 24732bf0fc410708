# SPDX-License-Identifier: LGPL-2.1-or-later
"""What of this tree goes to a host under test, as one tar stream: the package, with the hardware suite in it, the
command and guest images."""

from __future__ import annotations

import io
import py_compile
import shutil
import tarfile
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from kvmi_host import __version__
from kvmi_host.lab import cache
from kvmi_host.lab.images import guest_images

TOP = PurePosixPath("/opt/kvmi-host")
"""The folder on the host that holds all of it."""

_LAUNCHER = f"""#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
PYTHONPATH={TOP}/lib:{TOP}/deps exec /usr/bin/python3 -m kvmi_host.cli "$@"
"""


def linux(images: PurePosixPath) -> str:
    """What makes the host's own kernel that of the Linux guest; one of Debian's where it is the debug kernel.

    :param images: the folder of guest images there.
    """
    return f"""kernel=/boot/vmlinuz-$(uname -r)
[ -e "$kernel" ] || kernel=$(find /boot -name 'vmlinuz-*' | sort | head -n 1)
ln -sf "$kernel" {images}/linux.vmlinuz"""


SCRIPT = f"""set -e
mkdir -p {TOP}
rm -rf {TOP}/lib {TOP}/tests {TOP}/docs {TOP}/images {TOP}/deployed
tar -xz --no-same-owner -C /
{linux(TOP / "images")}
"""
"""What unpacks the stream there."""


def _contents(root: Path, guests: Mapping[str, Path]) -> Iterator[tuple[PurePosixPath, Path]]:
    """Each file with its path on the host."""
    for file in cache.files(root / "kvmi_host"):
        yield TOP / "lib" / file.relative_to(root).as_posix(), file
    for name, file in guests.items():
        yield TOP / "images" / name, file


def _distribution(root: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """What tells Python which plugins the package has, as pip would leave it there."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    folder = TOP / f"lib/kvmi_host-{__version__}.dist-info"
    yield folder / "METADATA", f"Metadata-Version: 2.1\nName: kvmi-host\nVersion: {__version__}\n".encode()
    lines = []
    for group, points in project.get("entry-points", {}).items():
        lines += [f"[{group}]", *(f"{name} = {place}" for name, place in points.items())]
    yield folder / "entry_points.txt", "\n".join([*lines, ""]).encode()


@contextmanager
def images_here() -> Iterator[Path]:
    """The guest images in a folder of this machine, as long as the block runs, where QEMU's own user can read them."""
    with tempfile.TemporaryDirectory(prefix="kvmi-host-images-") as name:
        place = Path(name)
        place.chmod(0o755)
        for image, file in guest_images().items():
            shutil.copyfile(file, place / image)
        if kernels := sorted(Path("/boot").glob("vmlinuz-*")):
            shutil.copyfile(kernels[-1], place / "linux.vmlinuz")
        yield place


def fingerprint(root: Path, guests: Mapping[str, Path]) -> str:
    """What tells one deployment from another."""
    parts: list[str | Path] = [_LAUNCHER, SCRIPT, root / "pyproject.toml"]
    for place, file in _contents(root, guests):
        parts += [str(place), file]
    return cache.digest(*parts)


def _compiled(file: Path, place: PurePosixPath) -> bytes | None:
    """Bytecode that is used without a look at the source's time: starting Python costs seconds in the box."""
    with tempfile.NamedTemporaryFile(suffix=".pyc") as output:
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        try:
            py_compile.compile(str(file), output.name, str(place), doraise=True, invalidation_mode=mode)
        except py_compile.PyCompileError:
            return None
        return Path(output.name).read_bytes()


def pack(programs: Mapping[PurePosixPath, bytes], files: Iterable[tuple[PurePosixPath, bytes]] = ()) -> bytes:
    """A tar stream, compressed: what the emulated machine must decrypt costs more than the rest.

    :param programs: what is executable, by its full path on the host.
    :param files: what is not.
    """
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=6) as tar:

        def add(place: PurePosixPath, data: bytes, mode: int) -> None:
            member = tarfile.TarInfo(str(place.relative_to("/")))
            member.size, member.mode = len(data), mode
            tar.addfile(member, io.BytesIO(data))

        for place, data in programs.items():
            add(place, data, 0o755)
        for place, data in files:
            add(place, data, 0o644)
    return stream.getvalue()


def archive(
    root: Path, guests: Mapping[str, Path], programs: Mapping[PurePosixPath, bytes] = MappingProxyType({})
) -> bytes:
    """The tar stream for :data:`SCRIPT`.

    :param root: the source tree.
    :param guests: files of guest images by their name on the host.
    :param programs: what else is to be there, executable, by its full path.
    """

    def files() -> Iterator[tuple[PurePosixPath, bytes]]:
        yield from _distribution(root)
        for place, file in _contents(root, guests):
            yield place, file.read_bytes()
            if place.suffix == ".py" and (code := _compiled(file, place)):
                yield place.parent / "__pycache__" / f"{place.stem}.cpython-311.pyc", code

    return pack({PurePosixPath("/usr/local/bin/kvmi-host"): _LAUNCHER.encode(), **programs}, files())
