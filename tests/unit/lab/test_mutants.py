# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mutants that there are: each applies to the kernel part as it is, and names tests that there are."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvmi_host.lab.errors import LabError
from kvmi_host.lab.mutants import Mutant, read, select
from kvmi_host.lab.paths import project_root

ROOT = project_root()
SOURCE = ROOT / "kernel" / "src"
MUTANTS = select()
each = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)

PATCH = """Broken: a thing
Caught-by: test_a.py: one or another
---
--- a/thing.c
+++ b/thing.c
@@ -1,3 +1,3 @@
 one
-two
+2
 three
"""


@pytest.fixture
def mutant(tmp_path: Path) -> Mutant:
    patch = tmp_path / "some-thing.patch"
    patch.write_text(PATCH)
    return read(patch)


@pytest.fixture(scope="session")
def tests() -> list[str]:
    """The hardware suite's tests, by their full names."""
    argv = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/hardware"]
    listed = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [line.lower() for line in listed.splitlines() if "::" in line]


def matches(expression: str, test: str) -> bool:
    """What pytest makes of its ``-k``: each word is whether the test's name has it."""
    words = re.sub(
        r"[^\s()]+", lambda word: word[0] if word[0] in ("and", "or", "not") else str(word[0] in test), expression
    )
    return bool(eval(words))


@each
def test_it_applies_to_the_source_of_every_kernel_series(mutant: Mutant) -> None:
    # All series share these files: no mutant changes the patches of one.
    assert all(content != (SOURCE / file).read_bytes() for file, content in mutant.apply(SOURCE).items())


@each
def test_what_is_broken_is_said_in_a_line_of_a_table(mutant: Mutant) -> None:
    assert len(mutant.broken) <= 110
    assert not mutant.broken.endswith(".")
    assert "|" not in mutant.broken


@each
def test_the_tests_that_should_find_it_are_there_and_not_all(mutant: Mutant, tests: list[str]) -> None:
    expected = [test for test in tests if f"/{mutant.file}::" in test and matches(mutant.expected.lower(), test)]
    assert 1 <= len(expected) <= 40


def test_every_one_is_in_the_documentation() -> None:
    page = (ROOT / "docs" / "mutants.md").read_text()
    rows = re.findall(r"^\| ([a-z0-9-]+) \| (?!---|what is broken)", page, re.MULTILINE)
    assert rows == [mutant.name for mutant in MUTANTS]


def test_head_and_name_are_read(mutant: Mutant) -> None:
    assert (mutant.name, mutant.broken) == ("some-thing", "a thing")
    assert (mutant.file, mutant.expected) == ("test_a.py", "one or another")


@pytest.mark.parametrize("line", ["Broken: a thing\n", "Caught-by: test_a.py: one or another\n", "---\n"])
def test_a_patch_without_its_head_is_refused(tmp_path: Path, line: str) -> None:
    patch = tmp_path / "some.patch"
    patch.write_text(PATCH.replace(line, "", 1))
    with pytest.raises(LabError, match="has to begin with"):
        read(patch)


def test_what_it_changes_is_told_and_the_source_left_alone(mutant: Mutant, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "thing.c").write_text("one\ntwo\nthree\n")
    assert mutant.apply(source) == {"thing.c": b"one\n2\nthree\n"}
    assert [file.name for file in source.iterdir()] == ["thing.c"]
    assert (source / "thing.c").read_text() == "one\ntwo\nthree\n"


@pytest.mark.parametrize("text", ["one\n2\nthree\n", "one\ntwo\n3\n"], ids=["applied already", "another context"])
def test_one_that_does_not_fit_as_it_stands_is_refused(mutant: Mutant, tmp_path: Path, text: str) -> None:
    (tmp_path / "thing.c").write_text(text)
    with pytest.raises(LabError, match=r"some-thing\.patch does not apply"):
        mutant.apply(tmp_path)


def test_names_choose() -> None:
    assert {mutant.name for mutant in select(["seq-from", "padding"])} < {mutant.name for mutant in MUTANTS}
    assert all("seq-from" in mutant.name or "padding" in mutant.name for mutant in select(["seq-from", "padding"]))


def test_a_name_that_there_is_not_is_told_those_that_there_are() -> None:
    with pytest.raises(LabError, match=r"no mutant called 'nonsense'; there are: .*seq-skips"):
        select(["seq-", "nonsense"])
