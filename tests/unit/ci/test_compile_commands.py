# SPDX-License-Identifier: LGPL-2.1-or-later
"""How editors learn to compile the kernel part: what make leaves of each object, as both kernels' builds write it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

COMMANDS = Path(__file__).parents[3] / "kernel/commands"
BUILT = "/build.x/tree"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """KVM with a file of ours, which the checkout has as well."""
    for name in ("tree/virt/kvm/kvmi.c", "tree/virt/kvm/vfio.c", "src/virt/kvm/kvmi.c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def commands(tree: Path) -> subprocess.CompletedProcess[str]:
    argv = [COMMANDS, tree / "tree", BUILT, tree / "src", "/headers"]
    return subprocess.run(list(map(str, argv)), capture_output=True, text=True)


def left(tree: Path, name: str, line: str) -> None:
    """What make leaves of an object."""
    (tree / f"tree/virt/kvm/.{name}.o.cmd").write_text(f"{line}\nsource_x := y\n")


@pytest.mark.parametrize(
    "line",
    [
        f"cmd_{BUILT}/virt/kvm/kvmi.o := gcc-12 -DA='$(pound)' -c -o {BUILT}/virt/kvm/kvmi.o {BUILT}/virt/kvm/kvmi.c",
        f"cmd_x/kvmi.o :=  gcc-12 -c -o x/kvmi.o {BUILT}/x86/../virt/kvm/kvmi.c   ; ./tools/objtool/objtool x/kvmi.o",
        f"savedcmd_x/kvmi.o :=  x86_64-linux-gnu-gcc-12 -c -o x/kvmi.o {BUILT}/virt/kvm/kvmi.c  ",
    ],
)
def test_our_files_are_the_checkouts(tree: Path, line: str) -> None:
    (tree / "tree/x86").mkdir()
    left(tree, "kvmi", line)
    (entry,) = json.loads(commands(tree).stdout)
    ours = f"{tree}/src/virt/kvm/kvmi.c"
    assert entry["file"] == ours
    assert entry["directory"] == "/headers"
    assert entry["command"].endswith(f"-iquote {tree}/tree/virt/kvm {ours}")
    assert BUILT not in entry["command"]


def test_kvms_files_and_those_of_the_headers_are_where_they_are(tree: Path) -> None:
    left(tree, "vfio", f"cmd_x := gcc -c -o x {BUILT}/virt/kvm/vfio.c")
    left(tree, "common", "savedcmd_x :=  gcc -c -o x /usr/lib/linux-kbuild/scripts/module-common.c")
    files = [entry["file"] for entry in json.loads(commands(tree).stdout)]
    assert files == ["/usr/lib/linux-kbuild/scripts/module-common.c", f"{tree}/tree/virt/kvm/vfio.c"]


def test_a_build_that_tells_nothing_is_an_error(tree: Path) -> None:
    left(tree, "kvm", "cmd_x := ld -r -o x y")
    done = commands(tree)
    assert done.returncode == 1
    assert "nothing in" in done.stderr
