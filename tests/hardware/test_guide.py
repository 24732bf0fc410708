# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guides whose shell blocks run as they stand there, in their order and in one shell for each guide.

The block after a shell block is what it has to print: ``...`` in a line stands for anything, a line of it for any
lines.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from kvmi_host.testing.live import DEADLINE, SharedGuests
from kvmi_host.testing.rules import UNDEPLOYED

pytestmark = [pytest.mark.hardware, pytest.mark.libvirt, pytest.mark.services, pytest.mark.needs(UNDEPLOYED)]

GUIDES = {name: Path(__file__).with_name(f"{name}.md").read_text() for name in ("tutorial", "operating")}
BLOCKS = {
    name: re.findall(r"^```sh\n(.*?)^```\n(?:```\n(.*?)^```\n)?", text, re.MULTILINE | re.DOTALL)
    for name, text in GUIDES.items()
}
MARK = "== block"


def script(guide: str) -> str:
    """All blocks, each with its number said before it."""
    said = [f"echo '{MARK} {number}'\n{block}" for number, (block, _) in enumerate(BLOCKS[guide])]
    return "set -euo pipefail\nexec 2>&1\n" + "".join(said)


def pattern(shown: str) -> str:
    """What the guide shows, as a regular expression. Runs of blanks are alike: columns move with what is in them."""
    lines = []
    for line in shown.splitlines():
        words = [r"\s+".join(map(re.escape, part.split(" "))) for part in re.sub(r" +", " ", line).split("...")]
        lines.append("(?:.*\n)*?" if line == "..." else "[^\n]*".join(words) + r"[^\S\n]*\n")
    return "".join(lines)


@pytest.fixture(scope="module")
def run(
    in_the_systems_path: None, shared: SharedGuests, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[int, str]]:
    """Runs a guide, once: its exit status, and what was printed."""
    shared.stand_aside()

    @cache
    def result(guide: str) -> tuple[int, str]:
        folder = tmp_path_factory.mktemp("guide")
        output = folder / "output"
        with output.open("w") as file:  # a pipe would be held open by what a block leaves in the background
            ended = subprocess.run(
                ["bash", "-c", script(guide)],
                cwd=folder,
                env={**os.environ, "COLUMNS": "200"},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=15 * DEADLINE,
                check=False,
            )
        return ended.returncode, output.read_text()

    return result


@pytest.mark.parametrize(
    ("guide", "number"), [(guide, number) for guide, blocks in BLOCKS.items() for number in range(len(blocks))]
)
def test_a_block_of_the_guide_prints_what_the_guide_shows(
    run: Callable[[str], tuple[int, str]], guide: str, number: int
) -> None:
    status, text = run(guide)
    assert status == 0, text
    block, shown = BLOCKS[guide][number]
    said = re.split(rf"^{MARK} \d+\n", text, flags=re.MULTILINE)[1:][number]
    fits = not shown or re.fullmatch(pattern(shown), said)
    assert fits, f"{block}\n-- shown:\n{shown}\n-- said:\n{said}"


@pytest.mark.parametrize("guide", GUIDES)
def test_no_kvmi_host_command_of_a_host_is_outside_of_the_guides_shell_blocks(guide: str) -> None:
    text = re.sub(r"^```sh\n.*?^```\n", "", GUIDES[guide], flags=re.MULTILINE | re.DOTALL)
    assert not re.findall(r"^(?: {4}|\$ )\S*kvmi-host (?!lab ).*", text, re.MULTILINE)
