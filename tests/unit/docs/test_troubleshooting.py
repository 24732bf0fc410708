# SPDX-License-Identifier: LGPL-2.1-or-later
"""docs/troubleshooting.md quotes what is in the source, and leaves out no message of those who operate a host."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
QUOTES = [cell.replace("``", "`") for cell in re.findall(r"^\| `(.*?)` \|", PAGE, re.MULTILINE)]
SCRIPTS = ("kernel/build", "kernel/prepare", "kernel/dkms/pre-build")
OPERATORS = ("agent", "attach", "cli", "host", "introspect", "protocol", "provision", "recording")
"""Packages whose errors whoever operates a host may meet. Those of the lab and its reports say all there is to say."""

LETTERS = 9
"""How many a message has of its own that does not just pass on another's; and so many has a quote, to be found by."""

HOLE = "\N{OBJECT REPLACEMENT CHARACTER}"
"""What stands for a value in a message."""


def text_of(node: ast.expr) -> str:
    """A message as it is written, a :data:`HOLE` for each value."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(text_of(part) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return text_of(left) + text_of(right)
        case _:
            return HOLE


def letters(text: str) -> int:
    return sum(letter.isalpha() for letter in text)


def sources(*folders: str) -> Iterator[tuple[Path, ast.AST]]:
    for folder in folders:
        for path in sorted((ROOT / "kvmi_host" / folder).rglob("*.py")):
            yield path, ast.parse(path.read_text())


def literals() -> Iterator[str]:
    """Every text of the package, and of the scripts that build the modules."""
    for folder in (*OPERATORS, "lab"):
        for _, tree in sources(folder):
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant | ast.JoinedStr):
                    yield text_of(node)
    for script in SCRIPTS:
        for line in (ROOT / script).read_text().splitlines():
            yield re.sub(r"\$\(.*?\)|\$\w+", HOLE, line)


def messages() -> Iterator[tuple[str, str]]:
    """What is raised with words of its own: where, and the words."""
    for path, tree in sources(*OPERATORS):
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                kind = ast.unparse(node.exc.func).rpartition(".")[2]
                text = text_of(node.exc.args[0])
                ours = kind[0].isupper() and kind not in ("ValueError", "TypeError", "AssertionError", "OSError")
                if ours and letters(text) >= LETTERS:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def quoted(quote: str) -> re.Pattern[str]:
    """What a row of the page stands for; its ``...`` is at least a value."""
    return re.compile(f".*?{HOLE}.*?".join(map(re.escape, quote.split("..."))), re.DOTALL)


ALL = list(literals())


@pytest.mark.parametrize("quote", QUOTES)
def test_what_the_page_quotes_is_in_the_source(quote: str) -> None:
    assert any(quoted(quote).search(text) for text in ALL)


@pytest.mark.parametrize(("where", "message"), [pytest.param(*found, id=found[0]) for found in messages()])
def test_every_message_of_an_operators_host_has_a_row(where: str, message: str) -> None:
    assert any(quoted(quote).search(message) for quote in QUOTES), message


@pytest.mark.parametrize("quote", QUOTES)
def test_a_quote_is_long_enough_to_be_found_by(quote: str) -> None:
    assert letters(quote) >= LETTERS


def test_no_row_is_there_twice() -> None:
    assert sorted(set(QUOTES)) == sorted(QUOTES)
