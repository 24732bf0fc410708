# SPDX-License-Identifier: LGPL-2.1-or-later
"""Draws docs/NAME.svg of each docs/drawings/NAME.toml.

    python docs/make/drawings.py

A drawing is boxes in a grid with arrows between those that face each other, or lanes with messages between them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

DOCS = Path(__file__).parents[1]
SOURCES = DOCS / "drawings"

WIDTH, LINE, MARGIN = 230, 19, 30
"""Of a box in a column, of a line of text, and around all of it; in pixels."""
FILLS = {"": "#ffffff", "kernel": "#e9f2ea", "moment": "#ffffff", "note": "#fff8e1"}
DASHES = {"moment": ' stroke-dasharray="5 4"'}


class Box(NamedTuple):
    """Where a box is, in pixels."""

    left: int
    top: int
    right: int
    bottom: int


class Paper:
    """What was drawn so far."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def box(self, at: Box, kind: str = "", radius: int = 6) -> None:
        """A frame."""
        self.lines.append(
            f'<rect x="{at.left}" y="{at.top}" width="{at.right - at.left}" height="{at.bottom - at.top}" rx="{radius}"'
            f' fill="{FILLS[kind]}" stroke="#333344"{DASHES.get(kind, "")}/>'
        )

    def text(self, x: int, y: int, said: str, *, anchor: str = "start", bold: bool = False) -> None:
        """A line of text, whose base is at `y`."""
        weight = ' font-weight="bold"' if bold else ""
        self.lines.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}"{weight}>{escape(said)}</text>')

    def arrow(self, begin: tuple[int, int], end: tuple[int, int], *, both: bool = False, heavy: bool = False) -> None:
        """A straight line with a head, or two."""
        start = ' marker-start="url(#head)"' if both else ""
        self.lines.append(
            f'<path d="M{begin[0]},{begin[1]} L{end[0]},{end[1]}" stroke="#333344" stroke-width="{3 if heavy else 1.6}"'
            f' marker-end="url(#head)"{start}/>'
        )

    def svg(self, title: str, width: int, height: int) -> str:
        """All of it, as a file."""
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
                ' font-size="14" fill="#111122">',
                # REUSE-IgnoreStart
                "<!-- SPDX-License-Identifier: LGPL-2.1-or-later -->",
                # REUSE-IgnoreEnd
                "<!-- Drawn by docs/make/drawings.py of docs/drawings. -->",
                f"<title>{escape(title)}</title>",
                '<defs><marker id="head" markerWidth="10" markerHeight="9" refX="9" refY="4.5"'
                ' orient="auto-start-reverse" markerUnits="userSpaceOnUse">'
                '<path d="M0,0 L10,4.5 L0,9 z" fill="#333344"/></marker></defs>',
                f'<rect x="1" y="1" width="{width - 2}" height="{height - 2}" rx="8" fill="#f6f7f9" stroke="#9999aa"/>',
                *self.lines,
                "</svg>",
                "",
            ]
        )


def drawn(source: Mapping[str, Any]) -> str:
    """A drawing's SVG."""
    return _lanes(source) if "lanes" in source else _grid(source)


def _grid(source: Mapping[str, Any]) -> str:
    paper, title = Paper(), str(source["title"])
    gap_x, gap_y = source["gaps"]
    boxes: Mapping[str, Mapping[str, Any]] = source["boxes"]
    heights = _heights(boxes.values())
    tops = [2 * MARGIN + sum(heights[:row]) + row * gap_y for row in range(len(heights))]
    places: dict[str, Box] = {}
    for name, box in boxes.items():
        column, row = box["at"]
        columns = box.get("columns", 1)
        left = MARGIN + column * (WIDTH + gap_x)
        at = Box(left, tops[row], left + columns * WIDTH + (columns - 1) * gap_x, tops[row] + heights[row])
        places[name] = at
        paper.box(at, box.get("kind", ""), source.get("radius", 6))
        paper.text(at.left + 14, at.top + 26, box["title"], bold=True)
        for number, line in enumerate(box.get("text", ()), 1):
            paper.text(at.left + 14, at.top + 28 + number * LINE, line)
    for arrow in source["arrows"]:
        _connect(paper, places[arrow["from"]], places[arrow["to"]], arrow)
    paper.text(MARGIN // 2, 26, title, bold=True)
    return paper.svg(
        title, max(box.right for box in places.values()) + MARGIN, max(box.bottom for box in places.values()) + MARGIN
    )


def _heights(boxes: Iterable[Mapping[str, Any]]) -> list[int]:
    """How high each row of boxes is: as its highest."""
    rows: dict[int, int] = {}
    for box in boxes:
        row = box["at"][1]
        rows[row] = max(rows.get(row, 0), 44 + LINE * len(box.get("text", ())))
    return [rows[row] for row in sorted(rows)]


def _connect(paper: Paper, one: Box, other: Box, arrow: Mapping[str, Any]) -> None:
    """An arrow between two boxes that face each other, with its words beside or above it."""
    both, heavy, words = arrow.get("both", False), arrow.get("heavy", False), arrow.get("text", [])
    left, right = max(one.left, other.left), min(one.right, other.right)
    if left < right:
        x = (left + right) // 2
        down = one.bottom <= other.top
        begin, end = ((x, one.bottom), (x, other.top)) if down else ((x, one.top), (x, other.bottom))
        paper.arrow(begin, end, both=both, heavy=heavy)
        middle = (begin[1] + end[1]) // 2 - LINE * (len(words) - 1) // 2 + 5
        for number, line in enumerate(words):
            paper.text(x + 10, middle + number * LINE, line)
        return
    y = (max(one.top, other.top) + min(one.bottom, other.bottom)) // 2
    ends = (one.right, other.left) if one.right <= other.left else (one.left, other.right)
    paper.arrow((ends[0], y), (ends[1], y), both=both, heavy=heavy)
    for number, line in enumerate(reversed(words)):
        paper.text(sum(ends) // 2, y - 8 - number * LINE, line, anchor="middle")


def _lanes(source: Mapping[str, Any]) -> str:
    paper, title = Paper(), str(source["title"])
    step = source["width"]
    lanes: Sequence[Mapping[str, Any]] = source["lanes"]
    middles = {lane["name"]: MARGIN + step * number + WIDTH // 2 for number, lane in enumerate(lanes)}
    top, y = 2 * MARGIN, 2 * MARGIN + 2 * LINE + 50
    messages = Paper()
    for message in source["messages"]:
        words = message["text"]
        if "at" in message:
            x, height = middles[message["at"]], LINE * len(words) + 12
            messages.box(Box(x - WIDTH // 2, y - 14, x + WIDTH // 2, y - 14 + height), "note", 3)
            for number, line in enumerate(words):
                messages.text(x, y + 5 + number * LINE, line, anchor="middle")
            y += height + 22
            continue
        begin, end = middles[message["from"]], middles[message["to"]]
        for number, line in enumerate(words):
            messages.text((begin + end) // 2, y + number * LINE, line, anchor="middle")
        y += LINE * (len(words) - 1) + 9
        messages.arrow((begin, y), (end, y))
        y += 36
    for lane in lanes:
        x = middles[lane["name"]]
        paper.lines.append(f'<path d="M{x},{top} L{x},{y}" stroke="#9999aa" stroke-dasharray="4 4"/>')
        paper.box(Box(x - WIDTH // 2, top, x + WIDTH // 2, top + 2 * LINE + 16), lane.get("kind", ""))
        paper.text(x, top + 22, lane["name"], anchor="middle", bold=True)
        paper.text(x, top + 22 + LINE, lane["text"], anchor="middle")
    paper.lines += messages.lines
    paper.text(MARGIN // 2, 26, title, bold=True)
    return paper.svg(title, 2 * MARGIN + step * (len(lanes) - 1) + WIDTH, y + MARGIN)


def main() -> None:
    """Draw all of them."""
    for path in sorted(SOURCES.glob("*.toml")):
        (DOCS / f"{path.stem}.svg").write_text(drawn(tomllib.loads(path.read_text())))


if __name__ == "__main__":
    main()
