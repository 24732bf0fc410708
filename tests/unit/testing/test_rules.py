# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rules of the hardware suite: the file that has them, and the tests that show them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvmi_host.testing.emulators import Fault
from kvmi_host.testing.modules import Paging
from kvmi_host.testing.rules import PROPERTIES, Host, Rule, Rules, RulesError, read_rules
from kvmi_host.testing.under_test import deployed, lacking

SUITE = Path(__file__).parents[2] / "hardware"

COLLECT = """
import json, sys
import pytest

class Named:
    def pytest_collection_finish(self, session):
        numbers = [number for item in session.items for mark in item.iter_markers("rule") for number in mark.args]
        print("rules", json.dumps(numbers))

sys.exit(pytest.main(["--collect-only", "-q", sys.argv[1]], plugins=[Named()]))
"""


@pytest.fixture(scope="module")
def suite() -> Rules:
    return read_rules(SUITE / "rules.toml")


@pytest.fixture(scope="module")
def named() -> set[str]:
    """The rules that the suite's tests name."""
    argv = [sys.executable, "-c", COLLECT, str(SUITE)]
    run = subprocess.run(argv, cwd=SUITE.parents[1], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("rules "))
    return set(json.loads(line.removeprefix("rules ")))


def test_every_rule_has_a_test(suite: Rules, named: set[str]) -> None:
    assert sorted(set(suite.rules) - named) == []


def test_every_rule_is_one_sentence(suite: Rules) -> None:
    for rule in suite.rules.values():
        assert rule.text.endswith("."), rule
        assert ". " not in rule.text, rule


def test_no_two_rules_say_the_same(suite: Rules) -> None:
    texts = [rule.text for rule in suite.rules.values()]
    assert len(set(texts)) == len(texts)


def test_every_group_has_rules(suite: Rules) -> None:
    assert {rule.group for rule in suite.rules.values()} == set(suite.groups)


def read(tmp_path: Path, text: str) -> Rules:
    file = tmp_path / "rules.toml"
    file.write_text(text)
    return read_rules(file)


GROUP = '[[groups]]\nid = "a"\ntitle = "A"\n[groups.rules]\n'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not a list of groups"),
        ("[[groups]]\nid =", "not a list of groups"),
        ('[[groups]]\nid = "a"\ntitle = "A"\n', "not a list of groups"),
        (GROUP + '"2.1" = 7\n', "not a list of groups"),
        (GROUP + '"2.1" = {}\n', "not a list of groups"),
        (GROUP + '"9.1" = "X."\n', "'9.1' is no rule's number"),
        (GROUP + '"2.01" = "X."\n', "'2.01' is no rule's number"),
        (GROUP + '"2.1" = "X."\n' + GROUP.replace('"a"', '"b"') + '"2.1" = "Y."\n', "2.1 is given twice"),
        (GROUP + '"2.1" = { text = "X.", need = "y" }\n', "2.1: there is no need"),
        (GROUP + '"2.1" = { text = "X.", dialects = ["v8"] }\n', "2.1: dialects are v6, v7, not v8"),
        (GROUP + '"2.1" = { text = "X.", needs = "luck" }\n', "2.1: no property of a host is called 'luck'"),
        (GROUP + '"2.1" = { text = "X.", fault = "F00F" }\n', "2.1: no fault is called 'F00F'"),
    ],
)
def test_a_file_that_is_none_is_refused_with_what_is_wrong(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(RulesError, match=complaint) as refused:
        read(tmp_path, text)
    assert str(refused.value).startswith(str(tmp_path / "rules.toml"))


def test_rules_keep_the_order_of_their_file(tmp_path: Path) -> None:
    rules = read(tmp_path, GROUP + '"2.10" = "X."\n"2.9" = { text = "Y.", needs = "nested paging" }\n')
    assert list(rules.rules.values()) == [Rule("2.10", "a", "X."), Rule("2.9", "a", "Y.", needs="nested paging")]
    assert rules.groups == {"a": "A"}


HOST = Host("lab7", "6.1.0", "GenuineIntel", "v6", "nested", "0.1.0", {"shadow paging": "no shadows here"})


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (Rule("2.1", "a", "X."), ""),
        (Rule("2.1", "a", "X.", dialects=("v6", "v7")), ""),
        (Rule("2.1", "a", "X.", dialects=("v7",)), "a rule of dialect v7; this kernel speaks v6"),
        (Rule("2.1", "a", "X.", needs="nested paging"), ""),
        (Rule("2.1", "a", "X.", needs="shadow paging"), "no shadows here"),
        (Rule("2.1", "a", "X.", fault=Fault.NO_XSETBV_EXIT), ""),
    ],
)
def test_where_a_rule_does_not_hold_there_is_a_reason(rule: Rule, reason: str) -> None:
    assert rule.not_here(HOST) == reason


WHOLE = {"ours": True, "checks_itself": True, "systemd": True, "undeployed": True, "first_number": True}


def test_every_host_lacks_one_kind_of_paging_and_of_pages() -> None:
    for paging in Paging:
        for intel in (False, True):
            lacks = lacking(paging=paging, intel=intel, **WHOLE)
            assert len(lacks) == 2
            assert f"{paging} paging" not in lacks
            assert all(lacks.values())


def test_a_kernel_that_is_not_ours_lacks_what_we_have_added() -> None:
    lacks = lacking(paging=Paging.NESTED, intel=False, **WHOLE | {"ours": False})
    assert {"attach from outside", "observing sessions", "short replies"} <= set(lacks)


@pytest.mark.parametrize("path", ["etc/kvmi-host/policies/web.toml", "etc/libvirt/hooks/qemu.d/kvmi-host"])
def test_a_host_with_a_configuration_of_kvmi_host_is_deployed(tmp_path: Path, path: str) -> None:
    (tmp_path / "etc/kvmi-host/autoattach").mkdir(parents=True)
    assert not deployed(tmp_path)
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).touch()
    assert deployed(tmp_path)


def test_a_guest_that_is_attached_to_as_it_starts_is_a_deployment(tmp_path: Path) -> None:
    links = tmp_path / "etc/kvmi-host/autoattach"
    links.mkdir(parents=True)
    (links / "web").symlink_to("/run/kvmi-agent/agent.sock")  # which need not be there
    assert deployed(tmp_path)


def test_what_a_host_may_lack_is_what_a_rule_may_need() -> None:
    lacks = lacking(paging=Paging.SHADOW, intel=True, **dict.fromkeys(WHOLE, False))
    assert set(lacks) <= set(PROPERTIES)
