# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a host makes of a parcel: a virtual environment of its own Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path, PurePosixPath

from kvmi_host.lab.deploy import pack
from kvmi_host.lab.parcel import Parcel, Python, unpacking

SITE = f"lib/python{Python.here()}/site-packages"


def parcel(name: str, contents: str) -> Parcel:
    files = {PurePosixPath("/", SITE, "brought.py"): contents.encode(), PurePosixPath("/images/x.elf"): b"ELF"}
    return Parcel(name, SITE, pack({}, files.items()))


def unpack(parcel: Parcel, top: Path) -> Path:
    argv = ["sh", "-c", unpacking(parcel, PurePosixPath(top))]
    subprocess.run(
        argv, input=parcel.archive, check=True, timeout=120, env={"PATH": f"{sys.base_prefix}/bin:/usr/bin:/bin"}
    )
    return top / parcel.name


def test_what_was_brought_is_imported_there(tmp_path: Path) -> None:
    place = unpack(parcel("suite-1", "print('well')"), tmp_path)
    said = subprocess.run([place / "bin/python3", "-c", "import brought"], capture_output=True, text=True, check=True)
    assert said.stdout == "well\n"
    assert (place / "images/x.elf").read_bytes() == b"ELF"


def test_what_is_there_stays_as_it_is(tmp_path: Path) -> None:
    place = unpack(parcel("suite-1", "first"), tmp_path)
    unpack(Parcel("suite-1", SITE, b"never read"), tmp_path)
    assert (place / SITE / "brought.py").read_text() == "first"


def test_what_was_brought_before_goes(tmp_path: Path) -> None:
    old = unpack(parcel("suite-1", "first"), tmp_path)
    (tmp_path / "images").mkdir()
    new = unpack(parcel("suite-2", "second"), tmp_path)
    assert (old.exists(), new.exists(), (tmp_path / "images").exists()) == (False, True, True)


def test_what_is_not_whole_is_made_anew(tmp_path: Path) -> None:
    place = unpack(parcel("suite-1", "first"), tmp_path)
    (place / "complete").unlink()
    unpack(parcel("suite-1", "second"), tmp_path)
    assert (place / SITE / "brought.py").read_text() == "second"
