# SPDX-License-Identifier: LGPL-2.1-or-later
"""Nights with few hosts, written and read again."""

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kvmi_host.report import write
from kvmi_host.testing.nights import MadeUpHost, write_night

Written = Callable[..., tuple[int, str]]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Writes a night and its report, with a history where `number` is given: the status, and the page as text."""

    def make(*hosts: MadeUpHost, number: int = 0, hour: int = 1) -> tuple[int, str]:
        folder = write_night(tmp_path / f"night-{number}-{hour}", hosts, number, hour)
        status = write(folder, tmp_path / "history.sqlite" if number else None)
        return status, text_of((folder / "index.html").read_text())

    return make


def text_of(page: str) -> str:
    """What a page says: its text, with one blank where there are many."""
    parser = _Text()
    parser.feed(page)
    return " ".join(" ".join(parser.parts).split())


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._silent = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._silent = tag in {"style", "script", "title", "desc"}

    def handle_endtag(self, tag: str) -> None:
        self._silent = False

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.parts.append(data)
