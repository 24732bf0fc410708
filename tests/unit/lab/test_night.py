# SPDX-License-Identifier: LGPL-2.1-or-later
"""night.json: what is written is read, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmi_host.lab.errors import NightError
from kvmi_host.lab.night import HostRun, Night, State, read_night

RUN = HostRun("amd-6.1", State.FINISHED, "", {"kernel": "6.1"}, False, 0, {"connect": 1.5, "suite": 800.0})
NIGHT = Night("2026-11-23T01:00:00+00:00", "2026-11-23T02:00:00+00:00", "0.1.0", "", (RUN,))

texts = st.text(max_size=40)
runs = st.builds(
    HostRun,
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
    state=st.sampled_from(State),
    reason=texts,
    tags=st.dictionaries(texts, texts, max_size=3),
    dirty=st.booleans(),
    status=st.none() | st.integers(0, 255),
    phases=st.dictionaries(texts, st.floats(0, 1e6), max_size=3),
    warnings=st.lists(texts, max_size=3).map(tuple),
)


@given(st.lists(runs, max_size=4, unique_by=lambda run: run.name))
def test_what_is_written_is_read(hosts: list[HostRun]) -> None:
    night = Night(NIGHT.started, NIGHT.ended, "0.1.0", "v0.1-3-gabc", tuple(hosts))
    assert Night.from_json(night.to_json()) == night


@given(st.text() | st.binary().map(lambda data: data.decode(errors="replace")))
def test_any_text_is_read_or_refused(text: str) -> None:
    with pytest.raises(NightError):
        Night.from_json(text)


def put(*path: object, value: Any) -> Callable[[Any], None]:
    """Sets what is at a place of the object."""

    def change(values: Any) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("format", value=2), "its format is 2"),
        (put("started", value="2026-11-23T01:00:00"), "started = .*offset belongs there"),
        (put("ended", value="soon"), "ended = 'soon'"),
        (put("hosts", value={}), "hosts is dict, not list"),
        (put("hosts", 0, value=[]), r"hosts\[0\] is no object"),
        (put("hosts", 0, "name", value="../x"), r"hosts\[0\]\.name = '\.\./x'"),
        (put("hosts", 0, "state", value="well"), r"hosts\[0\]\.state = 'well': one of finished"),
        (put("hosts", 0, "status", value=True), r"hosts\[0\]\.status is bool, not int"),
        (put("hosts", 0, "dirty", value=1), r"hosts\[0\]\.dirty is int, not bool"),
        (put("hosts", 0, "tags", value={"a": 1}), r"hosts\[0\]: its tags and warnings have to be texts"),
        (put("hosts", 0, "phases", value={"suite": -1}), r"hosts\[0\]\.phases\.suite: seconds"),
        (put("hosts", 0, "phases", value={"suite": float("nan")}), r"hosts\[0\]\.phases\.suite: seconds"),
        (lambda values: values.pop("revision"), "revision is missing"),
        (lambda values: values["hosts"].append(values["hosts"][0]), "two have the same name"),
    ],
)
def test_what_cannot_be_used_is_named(change: Callable[[Any], None], said: str) -> None:
    values = json.loads(NIGHT.to_json())
    change(values)
    with pytest.raises(NightError, match=said):
        Night.from_json(json.dumps(values))


def test_a_folder_without_a_night_is_said(tmp_path: Path) -> None:
    with pytest.raises(NightError, match=r"night\.json cannot be read: No such file"):
        read_night(tmp_path)


@pytest.mark.parametrize(
    ("run", "passed"),
    [
        (RUN, True),
        (HostRun("a", State.FINISHED, status=1), False),
        (HostRun("a", State.FINISHED, status=0, warnings=("WARNING: CPU: 0",)), False),
        (HostRun("a", State.DIED), False),
        (HostRun("a", State.INTERRUPTED, status=0), False),
    ],
)
def test_a_night_passed_if_every_host_finished_well(run: HostRun, passed: bool) -> None:
    assert Night(NIGHT.started, NIGHT.ended, "0.1.0", "", (RUN, run)).passed is passed
