# SPDX-License-Identifier: LGPL-2.1-or-later
"""Built things, kept under a name that is a hash of what they were built from.

An entry is a folder ``KIND-HASH``. It is made under another name and renamed when it is complete, so an entry that
exists is whole, however the process that made it ended. One process at a time makes entries of a kind; others wait and
find the result.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kvmi_host.lab.errors import LabError
from kvmi_host.lab.paths import cache_root

_IGNORED = {"__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache"}


def files(tree: Path) -> Iterator[Path]:
    """The files of a tree in a fixed order, without what tools leave behind; the path itself if it is a file."""
    if not tree.is_dir():
        yield tree
        return
    for path in sorted(tree.iterdir()):
        if path.name not in _IGNORED:
            yield from files(path)


def digest(*inputs: Path | str) -> str:
    """A hash of texts, files and trees: names, contents and the executable bit, not times and owners.

    :param inputs: a str counts as itself, a path as the file or the tree that it names.
    """
    total = hashlib.sha256()
    for item in inputs:
        if isinstance(item, str):
            total.update(b"text\0%d\0" % len(item.encode()) + item.encode())
            continue
        for file in files(item):
            executable = os.access(file, os.X_OK)
            name = file.relative_to(item) if item.is_dir() else Path(file.name)
            content = hashlib.sha256(file.read_bytes()).digest()
            total.update(b"file\0%s\0%d\0" % (os.fsencode(name), executable) + content)
    return total.hexdigest()[:16]


@contextmanager
def locked(name: str, flags: int = 0) -> Iterator[None]:
    """Hold the lock of that name, which only one process of this cache can hold; wait for it if need be.

    :param flags: of flock(2), beside LOCK_EX.
    """
    with (cache_root() / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | flags)
        yield


@contextmanager
def claimed(name: str) -> Iterator[None]:
    """As :func:`locked`, without waiting.

    :raise LabError: another process holds it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(name, fcntl.LOCK_NB))
        except BlockingIOError:
            raise LabError(f"another process has {name}: end that one first, or wait for it") from None
        yield


def find(kind: str, key: str) -> Path | None:
    """The folder of an entry if there is one. Counts as a use of it."""
    path = cache_root() / f"{kind}-{key}"
    if not path.is_dir():
        return None
    os.utime(path)
    return path


def entry(kind: str, key: str, build: Callable[[Path], None], keep: int = 1) -> Path:
    """The folder of an entry, made first if there is none.

    :param kind: what it is, in one word without digits or dashes.
    :param key: the :func:`digest` of everything that the result depends on.
    :param build: fills the empty folder that it is given. Whatever it raises leaves no entry.
    :param keep: how many entries of this kind may stay; those used longest ago go.
    """
    if found := find(kind, key):
        return found
    with locked(kind):
        if found := find(kind, key):
            return found
        for stale in cache_root().glob(f"{kind}-*.part"):
            shutil.rmtree(stale)
        part = cache_root() / f"{kind}-{key}.part"
        part.mkdir()
        try:
            build(part)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        path = part.rename(cache_root() / f"{kind}-{key}")
        by_use = sorted(cache_root().glob(f"{kind}-*"), key=lambda other: other.stat().st_mtime, reverse=True)
        for old in [other for other in by_use if other != path][keep - 1 :]:
            shutil.rmtree(old, ignore_errors=True)
        return path


def drop(kind: str, key: str) -> None:
    """Forget an entry that turned out to be of no use."""
    with locked(kind):
        shutil.rmtree(cache_root() / f"{kind}-{key}", ignore_errors=True)
