# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules of reading suite.json: all that a suite writes is taken, and nothing that would harm who reads it."""

import json
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmi_host.report import suite
from kvmi_host.report.errors import SuiteUnreadable
from kvmi_host.report.suite import Outcome, read_suite, suite_from
from kvmi_host.testing.nights import MadeUpHost, suite_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def read(**changed):
    """A suite.json with these keys in place of what was there."""
    return suite_from(json.dumps({**suite_of(MadeUpHost("amd-6.1")), **changed}).encode())


def test_what_a_suite_writes_is_read():
    found = read()
    assert found.host["kernel"] == "6.1.0-56-cloud-amd64"
    assert found.groups["framing"] == "Framing and errors"
    assert found.rules[0].tests == ("test_framing.py::test_rule_1_holds",)
    assert found.tests[0].outcome is Outcome.PASSED
    assert len(found.measured("event round trip").values) == 1925


def test_keys_that_are_not_known_are_passed_over():
    assert read(weather="fine").groups == read().groups


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"format": 2}, "format is 2, and this kvmi-host reads format 1"),
        ({"format": None}, "format is None"),
        ({"tests": {}}, "tests is an object, and a list belongs there"),
        ({"tests": [{}]}, "tests[0]: it has no id"),
        ({"tests": [{"id": "a", "outcome": "great"}]}, "tests[0]: outcome is 'great', and one of passed, failed"),
        ({"tests": [{"id": "a", "outcome": "not run"}]}, "tests[0]: outcome is 'not run'"),
        ({"tests": [{"id": "a", "outcome": "passed"}] * 2}, "tests: a is there twice"),
        ({"tests": [{"id": "a", "outcome": "passed", "seconds": "1"}]}, "'1' is there, and a number belongs there"),
        ({"tests": [{"id": "a", "outcome": "passed", "seconds": True}]}, "True is there, and a number belongs there"),
        ({"rules": [{"number": 1}]}, "rules[0]: 1 is there, and a text belongs there"),
        ({"rules": ["1.1"]}, "rules[0]: it is '1.1', and an object belongs there"),
        ({"host": "amd"}, "host is 'amd', and an object belongs there"),
        ({"measurements": [{"name": "a", "values": [10**400]}]}, "a huge number is there"),
        ({"measurements": [{"name": "a", "values": [1, 2], "at_seconds": [1]}]}, "1 at_seconds, and 2 values"),
    ],
)
def test_what_a_suite_does_not_write_is_refused_by_name(changed, said):
    with pytest.raises(SuiteUnreadable) as refused:
        read(**changed)
    assert said in str(refused.value)


@pytest.mark.parametrize("text", ["", "{", '{"format": NaN}', "[" * 100_000, "\xff", "[]", "null"])
def test_what_is_no_suite_json_is_refused(text):
    with pytest.raises(SuiteUnreadable):
        suite_from(text.encode("latin-1"))


def places(value, path=()):
    """The paths of all values in a JSON value."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


@settings(deadline=None)
@given(st.data(), JSON)
def test_whatever_stands_at_any_place_is_read_or_refused(data, value):
    small = {
        "format": 1,
        "host": {"kernel": "6.1"},
        "groups": [{"id": "a", "title": "A"}],
        "rules": [{"number": "1", "group": "a", "text": "t", "outcome": "passed", "reason": "", "tests": ["t"]}],
        "tests": [{"id": "t", "group": "a", "rules": ["1"], "seconds": 1, "outcome": "failed", "message": "m"}],
        "measurements": [{"name": "n", "unit": "us", "values": [1], "at_seconds": [0]}],
    }
    *way, last = data.draw(st.sampled_from([path for path in places(small) if path]))
    inner = small
    for key in way:
        inner = inner[key]
    inner[last] = value
    with suppress(SuiteUnreadable):
        suite_from(json.dumps(small).encode())


@settings(deadline=None)
@given(st.text())
def test_texts_hold_nothing_that_a_terminal_or_xml_cannot_take(text):
    found = read(tests=[{"id": "a", "outcome": "failed", "message": text}])
    assert all(char.isprintable() or char == "\n" for char in found.tests[0].message)


@pytest.mark.parametrize(("key", "most"), [("tests", suite._MAX_TESTS), ("rules", suite._MAX_RULES)])
def test_lists_that_are_too_long_are_refused(key, most):
    with pytest.raises(SuiteUnreadable, match=f"{key} has {most + 1:,} items, more than {most:,}"):
        read(**{key: [{}] * (most + 1)})


def test_texts_that_are_too_long_are_cut():
    message = read(tests=[{"id": "a", "outcome": "failed", "message": "x" * 10_000}]).tests[0].message
    assert len(message) == suite._MAX_TEXT
    assert message.endswith("x …")


def test_a_file_that_is_too_large_is_not_read_to_its_end(tmp_path):
    with (tmp_path / "suite.json").open("wb") as file:
        file.truncate(suite._MAX_FILE + 1)
    with pytest.raises(SuiteUnreadable, match="more than 32 MiB"):
        read_suite(tmp_path / "suite.json")


def test_a_file_that_cannot_be_read_is_said_to(tmp_path):
    with pytest.raises(SuiteUnreadable, match="Is a directory"):
        read_suite(tmp_path)
