# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mutants: the kernel part with one thing broken on purpose, each a patch of ``kernel/src`` in ``kernel/mutants``.

The head of such a patch says in a line what is broken, and in another which tests should find it: the file, and what
chooses among its tests as pytest's ``-k`` does::

    Broken: the first padding of a reply may have any value
    Caught-by: test_replies.py: a_short_common_part_is_still_checked and padding1

All of them are built in one tree that stays, so that only what a mutant changes is compiled.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmi_host.host.kernels import Series
from kvmi_host.lab import cache, images
from kvmi_host.lab.errors import LabError, LabHostError
from kvmi_host.lab.paths import program, project_root
from kvmi_host.lab.progress import build

MODULES = ("kvm.ko", "kvm-amd.ko")
"""What a mutant changes, in the order in which they are loaded. The host in a box is an AMD one."""

_HEAD = re.compile(r"Broken: (?P<broken>.+)\nCaught-by: (?P<file>test_\w+\.py): (?P<expected>.+)\n---\n--- a/")
_FILE = re.compile(r"^\+\+\+ b/(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    """One way to break the kernel part.

    :ivar broken: what is broken, in a sentence without a full stop.
    :ivar file: where the tests are that should fail.
    :ivar expected: which ones, as pytest's ``-k``.
    """

    name: str
    broken: str
    file: str
    expected: str
    patch: Path

    def apply(self, source: Path) -> dict[str, bytes]:
        """What becomes of the files that it changes.

        :param source: ``kernel/src``, or a copy.
        :return: contents by path below that folder.
        :raise LabError: it does not apply, or only if something near it is overlooked.
        """
        files = _FILE.findall(self.patch.read_text())
        with tempfile.TemporaryDirectory() as name:
            copy = Path(name)
            for file in files:
                (copy / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / file, copy / file)
            argv = [program("patch", "patch"), "-p1", "-s", "-F0", "--no-backup-if-mismatch", "-d", name]
            done = subprocess.run([*argv, "-i", self.patch], capture_output=True, text=True, check=False)
            if done.returncode:
                raise LabError(f"{self.patch.name} does not apply to {source}: {done.stdout.strip()}: make it anew")
            return {file: (copy / file).read_bytes() for file in files}


def read(patch: Path) -> Mutant:
    """The mutant that a patch makes.

    :raise LabError: it has no such head.
    """
    if (head := _HEAD.match(patch.read_text())) is None:
        raise LabError(f"{patch} has to begin with the lines `Broken: ...`, `Caught-by: FILE: ...` and `---`")
    return Mutant(patch.stem, **head.groupdict(), patch=patch)


def select(names: Sequence[str] = ()) -> list[Mutant]:
    """The mutants whose names have one of these in them, in the order of their names; by default all.

    :raise LabError: there is none for one of the names.
    """
    mutants = [read(patch) for patch in sorted((project_root() / "kernel" / "mutants").glob("*.patch"))]
    for name in names:
        if not any(name in mutant.name for mutant in mutants):
            known = ", ".join(mutant.name for mutant in mutants)
            raise LabError(f"there is no mutant called {name!r}; there are: {known}")
    return [mutant for mutant in mutants if not names or any(name in mutant.name for name in names)]


class Tree:
    """KVM's source, ours included, in which modules are built one after the other.

    :param series: one that Debian has packages of.
    """

    def __init__(self, series: Series) -> None:
        self._headers = Path(f"/usr/src/linux-headers-{images.kernel_release(series)}")
        self._source = project_root() / "kernel" / "src"
        archive = Path(f"/usr/src/linux-source-{series}.tar.xz")
        if not archive.exists():
            raise LabHostError(f"no kernel source at {archive}: run ci/setup, or apt-get install {archive.stem[:-4]}")
        prepare = project_root() / "kernel" / "prepare"
        stat = archive.stat()
        patches = project_root() / "kernel" / "patches" / series
        key = cache.digest(prepare, patches, self._headers.name, f"{stat.st_size} {stat.st_mtime}")

        def make(out: Path) -> None:
            build("unpacking KVM's source", [prepare, "unpack", series, archive, out / "tree"])
            build("patching it", [prepare, "patch", series, out / "tree"])

        self._path = cache.entry("mutants", key, make, keep=len(Series.packaged()))

    def modules(self, mutant: Mutant | None) -> Path:
        """Build the modules, with a mutation or without.

        :return: the folder of :data:`MODULES`, which the next call fills anew.
        :raise LabError: they do not compile.
        """
        self._put(mutant.apply(self._source) if mutant else {})
        kvm = self._path / "tree" / "arch" / "x86" / "kvm"
        argv: list[str | Path] = ["nice", "make", "-C", self._headers, f"M={kvm}", f"-j{os.cpu_count()}", "modules"]
        build(f"building {mutant.name if mutant else 'the modules as they are'}", argv)
        out = self._path / "modules"
        out.mkdir(exist_ok=True)
        for name in MODULES:
            subprocess.run([program("strip", "binutils"), "--strip-debug", "-o", out / name, kvm / name], check=True)
        return out

    def _put(self, mutated: dict[str, bytes]) -> None:
        """Have our files as they are here, but for these. What is right already is left alone, for make's sake."""
        for file, content in self._wanted(mutated):
            place = self._path / "tree" / file
            if not place.exists() or place.read_bytes() != content:
                place.write_bytes(content)

    def _wanted(self, mutated: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
        for path in cache.files(self._source):
            file = path.relative_to(self._source).as_posix()
            yield file, mutated.get(file) or path.read_bytes()
