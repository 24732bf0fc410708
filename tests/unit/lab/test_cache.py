# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules of the cache: what changes a key, and that an entry is whole or not there."""

import os
import threading
from pathlib import Path

import pytest

from kvmi_host.lab import cache
from kvmi_host.lab.errors import LabError


def fill(text: str = "made"):
    return lambda out: (out / "result").write_text(text)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    (top / "sub").mkdir(parents=True)
    (top / "a").write_text("one")
    (top / "sub" / "b").write_text("two")
    return top


def test_key_is_the_same_for_the_same_inputs(tree: Path) -> None:
    assert cache.digest(tree, "text") == cache.digest(tree, "text")


def test_key_does_not_depend_on_times(tree: Path) -> None:
    before = cache.digest(tree)
    os.utime(tree / "a", (1, 1))
    assert cache.digest(tree) == before


def test_key_does_not_depend_on_where_the_tree_is(tree: Path) -> None:
    before = cache.digest(tree)
    assert cache.digest(tree.rename(tree.with_name("elsewhere"))) == before


def test_key_depends_on_contents(tree: Path) -> None:
    before = cache.digest(tree)
    (tree / "sub" / "b").write_text("three")
    assert cache.digest(tree) != before


def test_key_depends_on_names(tree: Path) -> None:
    before = cache.digest(tree)
    (tree / "a").rename(tree / "c")
    assert cache.digest(tree) != before


def test_key_depends_on_the_executable_bit(tree: Path) -> None:
    before = cache.digest(tree)
    (tree / "a").chmod(0o755)
    assert cache.digest(tree) != before


def test_key_tells_where_one_text_ends(tree: Path) -> None:
    assert cache.digest("ab", "c") != cache.digest("a", "bc")


def test_key_ignores_what_python_leaves_behind(tree: Path) -> None:
    before = cache.digest(tree)
    (tree / "__pycache__").mkdir()
    (tree / "__pycache__" / "a.pyc").write_text("code")
    assert cache.digest(tree) == before


def test_entry_is_built_once() -> None:
    first = cache.entry("thing", "k1", fill())

    def again(out: Path) -> None:
        pytest.fail("built twice")

    assert cache.entry("thing", "k1", again) == first
    assert (first / "result").read_text() == "made"


def test_failed_build_leaves_nothing(own_cache: Path) -> None:
    def broken(out: Path) -> None:
        (out / "half").write_text("half")
        raise RuntimeError("no network")

    with pytest.raises(RuntimeError, match="no network"):
        cache.entry("thing", "k1", broken)
    assert not list(own_cache.glob("thing-*"))


def test_what_a_killed_build_left_is_swept(own_cache: Path) -> None:
    (own_cache / "thing-k1.part").mkdir(parents=True)
    (own_cache / "thing-k1.part" / "half").write_text("half")
    entry = cache.entry("thing", "k1", fill())
    assert [path.name for path in entry.iterdir()] == ["result"]


def test_older_entries_of_the_kind_go(own_cache: Path) -> None:
    cache.entry("thing", "k1", fill())
    cache.entry("other", "k1", fill())
    cache.entry("thing", "k2", fill())
    assert sorted(path.name for path in own_cache.glob("*-*")) == ["other-k1", "thing-k2"]


def test_entry_used_last_stays_where_two_may(own_cache: Path) -> None:
    for age, key in ((30, "k1"), (20, "k2")):
        os.utime(cache.entry("thing", key, fill(), keep=2), (age, age))
    cache.find("thing", "k1")
    cache.entry("thing", "k3", fill(), keep=2)
    assert sorted(path.name for path in own_cache.glob("thing-*")) == ["thing-k1", "thing-k3"]


def test_dropped_entry_is_built_again() -> None:
    cache.entry("thing", "k1", fill("old"))
    cache.drop("thing", "k1")
    assert cache.find("thing", "k1") is None
    assert (cache.entry("thing", "k1", fill("new")) / "result").read_text() == "new"


def test_two_at_once_build_one_entry() -> None:
    builds: list[str] = []
    building, go_on = threading.Event(), threading.Event()

    def slow(out: Path) -> None:
        builds.append("slow")
        building.set()
        assert go_on.wait(10)

    first = threading.Thread(target=cache.entry, args=("thing", "k1", slow))
    second = threading.Thread(target=cache.entry, args=("thing", "k1", lambda out: builds.append("second")))
    first.start()
    assert building.wait(10)
    second.start()
    go_on.set()
    first.join(10)
    second.join(10)
    assert builds == ["slow"]


def test_what_another_process_has_is_not_waited_for() -> None:
    with cache.claimed("box"), pytest.raises(LabError, match="another process has box"), cache.claimed("box"):
        pass
    with cache.claimed("box"):
        pass
