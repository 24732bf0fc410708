# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operator's guide: its shell blocks run as they stand there, in their order and in one shell.

The block after a shell block is what it has to print: ``...`` in a line stands for anything, a line of it for any
lines.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from kvmi_host.testing.live import DEADLINE, SharedGuests

pytestmark = [pytest.mark.hardware, pytest.mark.libvirt, pytest.mark.services]

GUIDE = Path(__file__).with_name("operating.md")
BLOCKS = re.findall(r"^```sh\n(.*?)^```\n(?:```\n(.*?)^```\n)?", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
MARK = "== block"


def script() -> str:
    """All blocks, each with its number said before it."""
    said = [f"echo '{MARK} {number}'\n{block}" for number, (block, _) in enumerate(BLOCKS)]
    return "set -euo pipefail\nexec 2>&1\n" + "".join(said)


def pattern(shown: str) -> str:
    """What the guide shows, as a regular expression. Runs of blanks are alike: columns move with what is in them."""
    lines = []
    for line in shown.splitlines():
        words = [r"\s+".join(map(re.escape, part.split(" "))) for part in re.sub(r" +", " ", line).split("...")]
        lines.append("(?:.*\n)*?" if line == "..." else "[^\n]*".join(words) + r"[^\S\n]*\n")
    return "".join(lines)


@pytest.fixture(scope="module")
def said(in_the_systems_path: None, shared: SharedGuests, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each block has printed."""
    shared.stand_aside()
    folder = tmp_path_factory.mktemp("guide")
    output = folder / "output"
    with output.open("w") as file:  # a pipe would be held open by what a block leaves in the background
        result = subprocess.run(
            ["bash", "-c", script()],
            cwd=folder,
            env={**os.environ, "COLUMNS": "200"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=15 * DEADLINE,
            check=False,
        )
    text = output.read_text()
    assert result.returncode == 0, text
    return re.split(rf"^{MARK} \d+\n", text, flags=re.MULTILINE)[1:]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_of_the_guide_prints_what_the_guide_shows(said: list[str], number: int) -> None:
    block, shown = BLOCKS[number]
    fits = not shown or re.fullmatch(pattern(shown), said[number])
    assert fits, f"{block}\n-- shown:\n{shown}\n-- said:\n{said[number]}"


def test_no_kvmi_host_command_of_the_guide_is_outside_of_its_shell_blocks() -> None:
    text = re.sub(r"^```sh\n.*?^```\n", "", GUIDE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert not re.findall(r"^(?: {4}|\$ )\S*kvmi-host .*", text, re.MULTILINE)
