# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is on a night's page. How it looks is seen in a browser, in the integration tests."""

import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmi_host.lab.night import HostRun, State
from kvmi_host.report import page, write
from kvmi_host.report.page import page_of
from kvmi_host.report.results import read_results
from kvmi_host.testing.nights import MadeUpHost, lab, suite_of, write_night

LATE = "TimedOut: no event within 20 s"
MARKUP = st.text(st.sampled_from("<>&\"'/=script img\x00\u202e`{}%#;")) | st.sampled_from(
    ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}", "</style>", "]]>", "&lt;b&gt;"]
)


def tags(text):
    """The names of all tags of a page, in order, and all addresses that it names."""
    found, addresses = [], []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append(tag)
            addresses.extend(value for name, value in attrs if name in {"href", "src"} and not value.startswith("#"))

    Tags().feed(text)
    return found, addresses


def test_the_verdict_is_the_headline(written):
    assert "✓ Passed" in written(MadeUpHost("lab7"))[1]
    assert "✕ Failed" in written(MadeUpHost("lab7", fails={0: LATE}), number=1)[1]


def test_the_first_night_has_nothing_to_be_compared_with(written):
    assert "There is no earlier night to compare with." in written(MadeUpHost("lab7"), number=1)[1]


def test_a_night_like_the_one_before_says_so(written):
    written(MadeUpHost("lab7"), number=1)
    text = written(MadeUpHost("lab7"), number=2)[1]
    assert "What changed since the night of 12 November 2026 Nothing: all that passed still passes." in text


def test_two_nights_of_one_day_are_told_apart(written):
    written(MadeUpHost("lab7"), number=1)
    text = written(MadeUpHost("lab7"), number=1, hour=5)[1]
    assert "What changed since the night of 12 November 2026, 01:00 Nothing" in text


def test_what_changed_comes_before_all_else_and_new_failures_before_what_was_fixed(written):
    written(MadeUpHost("lab7", fails={0: LATE}), MadeUpHost("old"), number=1)
    away = MadeUpHost("new", run=HostRun("new", State.UNREACHABLE, "No answer: is it on?"))
    now = MadeUpHost("lab7", fails={1: LATE}, without={"pages": "no EPT"})
    text = written(now, away, number=2)[1]
    parts = [
        "New failures 2 new its first run the host itself No answer: is it on?",
        f"lab7 test_framing.py::test_rule_2_holds {LATE}",
        "Fixed 1 lab7 test_framing.py::test_rule_1_holds",
        "Newly not applicable 16 lab7 test_pages.py::test_rule_1_holds",
        "and 13 more tests",
        "new came.",
        "old is not there any more.",
        "Groups of rules, by host",
    ]
    places = [text.find(part) for part in parts]
    assert -1 not in places, parts[places.index(-1)]
    assert places == sorted(places)


def test_a_failure_that_is_not_new_says_since_when(written):
    for number in (1, 2, 3):
        text = written(MadeUpHost("lab7", fails={0: LATE}), number=number)[1]
    assert "test_framing.py::test_rule_1_holds rule 1.1 lab7 since 12 November 2026, 3 nights" in text


def test_a_failed_test_has_its_message_and_what_pytest_showed_by_host(written):
    text = written(MadeUpHost("a", fails={0: LATE}), MadeUpHost("b", fails={0: "AssertionError"}))[1]
    shown = 'session = Session(uuid=..., name="puppet") def test_a_rule_holds(session): > assert'
    assert f"rule 1.1 a {LATE} What pytest showed on a {shown}" in text
    assert f"b AssertionError What pytest showed on b {shown}" in text


def test_a_night_that_is_written_again_is_compared_with_the_one_before_it(written):
    written(MadeUpHost("lab7"), number=1)
    first = written(MadeUpHost("lab7", fails={0: LATE}), number=2)[1]
    assert written(MadeUpHost("lab7", fails={0: LATE}), number=2)[1] == first


def test_the_matrix_counts_by_group_and_host(written):
    text = written(MadeUpHost("lab7", fails={0: LATE}, without={"cr": "no"}), MadeUpHost("lab8"))[1]
    assert "Framing and errors ✕ 1 failed ✓ 11 passed ✓ 12 passed" in text
    assert "Control registers ○ 8 not applicable ✓ 8 passed" in text
    assert "The host's own software ✓ 3 passed ✓ 3 passed" in text


def test_a_host_shows_its_state_and_sentence_and_that_it_may_be_dirty(written):
    run = HostRun("box", State.DIED, "Its QEMU ended: start it anew.", dirty=True, warnings=("BUG: no",))
    text = written(MadeUpHost("box", run=run))[1]
    assert "box ✕ died ✕ kernel complained ▲ dirty Its QEMU ended: start it anew." in text
    assert "1 complaint of its kernel BUG: no" in text


def test_a_host_shows_what_it_is_and_how_long_its_phases_took(written):
    text = written(MadeUpHost("lab7"))[1]
    assert "kernel 6.1.0-56-cloud-amd64 CPU AuthenticAMD paging nested dialect v6 version 0.1.0" in text
    assert "connect 1.2 s deploy 30.5 s suite 13 min 32 s collect 2.2 s" in text


def test_a_rule_shows_its_outcome_on_each_host_and_why_it_was_not_applicable(written):
    hosts = (MadeUpHost("a", fails={0: LATE}), MadeUpHost("b", without={"framing": "no EPT"}), MadeUpHost("c"))
    text = written(*hosts)[1]
    row = re.search(r"1\.1 [A-Z].*? 1\.2 ", text)[0]
    name = "test_framing.py::test_rule_1_holds"
    assert f"1 test {name} failed on a: {name} not applicable on b: no EPT" in row
    assert row.endswith("✕ failed ○ not applicable ✓ passed 1.2 ")


def test_tests_that_are_for_no_rule_are_shown_as_the_hosts_own_software(written):
    text = written(MadeUpHost("a", without={"": "no libvirt"}))[1]
    assert "The host's own software a test_guide.py::test_the_guide_runs not applicable on a: no libvirt" in text


def test_links_lead_to_files_and_places_that_there_are(tmp_path):
    folder = write_night(tmp_path, lab())
    write(folder, tmp_path / "history")
    text = (folder / "index.html").read_text()
    places = set(re.findall(r' id="([^"]+)"', text))
    inside = re.findall(r'href="#([^"]+)"', text)
    assert set(inside) <= places
    outside = [address for address in tags(text)[1] if address != "data:,"]
    assert len(outside) > 10
    assert all((folder / address).is_file() for address in outside)


def test_an_id_is_there_once(tmp_path):
    write(write_night(tmp_path, lab()))
    ids = re.findall(r' id="([^"]+)"', (tmp_path / "index.html").read_text())
    assert len(ids) == len(set(ids))


def test_scripts_and_styles_are_those_that_the_pages_policy_names(tmp_path):
    text = page_of(read_results(write_night(tmp_path, [MadeUpHost("lab7")])))
    policy = re.search(r'Security-Policy" content="([^"]+)"', text)[1].replace("&#39;", "'").replace("&#43;", "+")
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        (inner,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert f"{directive} '{page._hash(inner)}'" in policy
    assert policy.startswith("default-src 'none'; ")


def tags_of_a_page_with(folder, text):
    """The tags of a page where a host calls its tests, rules and groups so, and says nothing else."""
    suite = suite_of(MadeUpHost("host", fails={0: "m"}, without={"cr": "w"}))
    suite["host"] = dict.fromkeys(suite["host"], text)
    for group in suite["groups"]:
        group["title"] = text
    for rule in suite["rules"]:
        rule.update(text=text, reason=text, number=f"{rule['number']}{text}")
    for test in suite["tests"]:
        test.update(id=f"{test['id']}{text}", message=text, rules=[f"{text}1"])
    write_night(folder, [MadeUpHost("host", run=HostRun("host", State.FINISHED, text, status=1, warnings=(text,)))])
    (folder / "hosts/host/suite.json").write_text(json.dumps(suite))
    return tags(page_of(read_results(folder)))


@pytest.fixture(scope="module")
def harmless(tmp_path_factory):
    return tags_of_a_page_with(tmp_path_factory.mktemp("night"), "a")


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(MARKUP)
def test_no_text_of_a_host_becomes_markup(harmless, tmp_path_factory, text):
    assert tags_of_a_page_with(tmp_path_factory.mktemp("night"), f"a{text}") == harmless


@pytest.mark.parametrize(
    "values",
    [[0], [-1, 0], [1e15], [1e-300, 1e15], [5, 5, 5], [1]],
    ids=["0", "below 0", "huge", "wide", "same", "one"],
)
def test_whatever_was_measured_the_page_is_written(tmp_path, values):
    folder = write_night(tmp_path, [MadeUpHost("host")])
    file = folder / "hosts/host/suite.json"
    suite = json.loads(file.read_text())
    times = list(range(len(values)))
    for measurement in suite["measurements"]:
        measurement.update(values=values, at_seconds=times[::-1])
    file.write_text(json.dumps(suite))
    text = page_of(read_results(folder))
    assert "nan" not in re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert "Round trip of an event" in text or max(values) <= 0


def test_a_page_has_a_bound_on_the_failures_that_it_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "_MOST_SHOWN", 3)
    folder = write_night(tmp_path, [MadeUpHost("host", fails=dict.fromkeys(range(10), LATE))])
    text = page_of(read_results(folder))
    assert text.count('<article class="failure"') == 3
    assert "... and 7 more, which junit.xml has." in text
