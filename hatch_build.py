# SPDX-License-Identifier: LGPL-2.1-or-later
"""Builds the compiled round trip into the wheel, or into the tree of an editable install. Without a C compiler and
Python's headers the package is pure Python, and does the same slower.

Run as a program, builds it into this tree.
"""

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FOLDER = Path("kvmi_host/introspect")


def build(root: Path) -> Path:
    """Compile it; where it is then, relative to `root`.

    :raise OSError: there is no compiler.
    :raise subprocess.CalledProcessError: it does not compile. The compiler has said why.
    """
    built = _FOLDER / f"_roundtrip{sysconfig.get_config_var('EXT_SUFFIX')}"
    unfinished = built.with_suffix(".tmp")
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    flags = ["-O2", "-fPIC", "-shared", "-Wall", "-Werror", f"-I{sysconfig.get_path('include')}"]
    subprocess.run([*compiler, *flags, _FOLDER / "_roundtrip.c", "-o", unfinished], cwd=root, check=True)
    (root / unfinished).rename(root / built)
    return built


class CustomBuildHook(BuildHookInterface[Any]):
    """What hatchling calls, see pyproject.toml."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Before a wheel is built, or an editable install."""
        try:
            built = build(Path(self.root))
        except (OSError, subprocess.CalledProcessError) as error:
            self.app.display_warning(f"pure Python, for the compiled round trip could not be built: {error}")
            return
        build_data["artifacts"].append(str(built))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True


if __name__ == "__main__":
    try:
        build(Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"the compiled round trip could not be built: {error}; it takes gcc and python3-dev")
