# SPDX-License-Identifier: LGPL-2.1-or-later
"""Links of the documentation as a forge shows it: to files that are there, and to addresses that can be one. The site's
own, with every anchor, are checked when it is built (ci/docs)."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", ROOT / "kernel/README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKS = runpy.run_path(str(ROOT / "docs/make/tree.py"))["links"]
OUTWARD = re.compile(r"\]\((\w+:[^)]*)\)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_link_within_the_tree_leads_to_a_file(page: Path) -> None:
    assert [link for link in LINKS(page.read_text()) if not (page.parent / link).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_link_out_of_the_tree_is_to_a_host_by_https(page: Path) -> None:
    parts = [urlsplit(link) for link in OUTWARD.findall(page.read_text())]
    assert all(part.scheme == "https" and "." in (part.hostname or "") for part in parts)


def test_a_link_in_a_fenced_block_is_none() -> None:
    assert list(LINKS("[a](b.md#c)\n```\n[d](e.md)\n```\n[f](https://g.org) [h](#i)\n")) == ["b.md"]
