# SPDX-License-Identifier: LGPL-2.1-or-later
"""docs/troubleshooting.md quotes what is in the source, and leaves out no message."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
QUOTES = re.findall(r"^\| `(.*?)` \|", PAGE, re.MULTILINE)
SCRIPTS = ("kernel/build", "kernel/prepare", "kernel/dkms/pre-build")
FOLDERS = ("agent", "attach", "cli", "host", "introspect", "lab", "protocol", "provision", "recording", "report")
"""The packages that people meet; `testing` is for those who write tests."""

FINDINGS = ("missing", "note", "unknown")
"""What the doctor says of a thing that is not ok; in :mod:`kvmi_host.host.doctor.finding`."""

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
    for folder in FOLDERS:
        for _, tree in sources(folder):
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant | ast.JoinedStr):
                    yield text_of(node)
    for script in SCRIPTS:
        for line in (ROOT / script).read_text().splitlines():
            yield re.sub(r"\$\(.*?\)|\$\w+", HOLE, line)


def messages() -> Iterator[tuple[str, str]]:
    """What is raised or found with words of its own: where, and the words."""
    for path, tree in sources(*FOLDERS):
        for node in ast.walk(tree):
            match node:
                case ast.Raise(exc=ast.Call(func=func, args=said)):
                    kind = ast.unparse(func).rpartition(".")[2]
                    ours = kind[0].isupper() and kind not in ("ValueError", "TypeError", "AssertionError", "OSError")
                case ast.Call(func=ast.Name(id=kind), args=[*said]) if kind in FINDINGS:
                    ours, said = True, said[:1]  # the remedy is beside it
                case _:
                    continue
            for text in map(text_of, said) if ours else ():
                if letters(text) >= LETTERS:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def quoted(quote: str) -> re.Pattern[str]:
    """What a row of the page stands for; its ``...`` is at least a value."""
    return re.compile(f".*?{HOLE}.*?".join(map(re.escape, quote.split("..."))), re.DOTALL)


ALL = list(literals())


@pytest.mark.parametrize("quote", QUOTES)
def test_what_the_page_quotes_is_in_the_source(quote: str) -> None:
    assert any(quoted(quote).search(text) for text in ALL)


@pytest.mark.parametrize(("where", "message"), [pytest.param(*found, id=found[0]) for found in messages()])
def test_every_message_has_a_row(where: str, message: str) -> None:
    assert any(quoted(quote).search(message) for quote in QUOTES), message


@pytest.mark.parametrize("quote", QUOTES)
def test_a_quote_is_long_enough_to_be_found_by(quote: str) -> None:
    assert letters(quote) >= LETTERS


def test_no_row_is_there_twice() -> None:
    assert sorted(set(QUOTES)) == sorted(QUOTES)
