# SPDX-License-Identifier: LGPL-2.1-or-later
"""The manual pages: whole, in good order, and about what there is."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer

from kvmi_host.agent.config import load
from kvmi_host.attach import policy_file, read_policy
from kvmi_host.cli import app
from kvmi_host.cli.manual import examples, main
from kvmi_host.protocol import Command, EventId, command_name, event_name

TREE = Path(__file__).parents[3]
ROOT = typer.main.get_command(app)
VERBS = ROOT.list_commands(None)
BY_HAND = sorted((TREE / "docs/man").glob("*.5"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("man")
    main([str(TREE), str(folder)])
    return folder


def read(page):
    """A page as man shows it, on endless lines."""
    result = subprocess.run(
        ["man", "--warnings", "-E", "ascii", "--nh", "--nj", "-l", str(page)],
        env={"MANWIDTH": "1000", "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stderr == ""
    return re.sub(r".\x08", "", result.stdout)


def example(page):
    """The lines of a page that stand as they are typed."""
    (text,) = re.findall(r"^\.nf\n(.*?)^\.fi$", page.read_text(), re.MULTILINE | re.DOTALL)
    return text.replace("\\(dq", '"').replace("\\-", "-")


def test_there_is_a_page_for_each_verb_and_one_for_all(folder):
    assert {page.name for page in folder.iterdir()} == {"kvmi-host.1", *(f"kvmi-host-{verb}.1" for verb in VERBS)}


@pytest.mark.parametrize("name", ["kvmi-host", *(f"kvmi-host-{verb}" for verb in VERBS)])
def test_a_page_has_its_sections_in_order_and_nothing_to_complain_of(folder, name):
    page = folder / f"{name}.1"
    subprocess.run(["mandoc", "-T", "lint", "-W", "warning", str(page)], timeout=60, check=True)
    order = [
        *("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "COMMANDS", "EXIT STATUS", "ENVIRONMENT", "FILES"),
        *("EXAMPLES", "SEE ALSO"),
    ]
    sections = re.findall(r"^([A-Z][A-Z ]+)$", read(page), re.MULTILINE)
    assert sections == [section for section in order if section in sections]
    assert {"NAME", "SYNOPSIS", "DESCRIPTION", "EXIT STATUS", "SEE ALSO"} <= set(sections)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_of_a_verb_every_argument_and_every_option_is_in_its_page(folder, verb):
    text = read(folder / f"kvmi-host-{verb}.1")
    command = ROOT.get_command(None, verb)
    for name, sub in getattr(command, "commands", {"": command}).items():
        assert f"kvmi-host {verb} {name}".strip() in text
        for param in sub.params:
            for option in param.opts if param.param_type_name == "option" else [param.metavar or param.name.upper()]:
                assert re.search(rf"^ +(\S+, )*{re.escape(option)}(?!\w)", text, re.MULTILINE), option


def test_every_verb_is_in_the_page_for_all(folder):
    text = read(folder / "kvmi-host.1")
    for verb in VERBS:
        assert f"kvmi-host-{verb}(1)" in text


def test_sections_that_are_written_by_hand_are_those_of_pages_that_there_are(folder):
    sections = tomllib.loads((TREE / "docs/man/sections.toml").read_text())
    assert {f"{name}.1" for name in sections["pages"]} <= {page.name for page in folder.iterdir()}


@pytest.mark.parametrize("verb", ["attach", "detach", "guest", "agent", "doctor", "replay"])
def test_an_operators_verbs_have_examples_of_the_guide(folder, verb):
    found = examples((TREE / "docs/operating.md").read_text(), verb)
    assert found
    text = read(folder / f"kvmi-host-{verb}.1").partition("EXAMPLES")[2]
    for _, command in found:
        assert command in text


def test_a_page_that_refers_to_one_of_ours_refers_to_one_that_there_is(folder):
    pages = [*folder.iterdir(), *BY_HAND]
    there = {f"{page.stem}({page.suffix[1:]})" for page in pages}
    for page in pages:
        assert set(re.findall(r"\bkvmi-[a-z.-]+\(\d\)", read(page))) <= there


@pytest.mark.parametrize("page", BY_HAND, ids=lambda page: page.name)
def test_a_page_about_a_file_is_in_good_order(page):
    subprocess.run(["mandoc", "-T", "lint", "-W", "warning", str(page)], timeout=60, check=True)
    assert {"NAME", "SYNOPSIS", "DESCRIPTION", "KEYS", "EXAMPLES", "SEE ALSO"} <= set(
        re.findall(r"^([A-Z][A-Z ]+)$", read(page), re.MULTILINE)
    )


def test_the_policys_page_has_every_key_and_name_and_its_example_is_one(tmp_path):
    page = TREE / "docs/man/kvmi-policy.5"
    text = read(page)
    not_served = {Command.CONTROL_VE, Command.GET_MAP_TOKEN, *range(Command.CONTROL_SPP, Command.CONTROL_CMD_RESPONSE)}
    names = [command_name(command) for command in Command if command > Command.EVENT and command not in not_served]
    for name in [*policy_file._KEYS, *names, *map(event_name, EventId)]:
        assert re.search(rf"(?<![\w-]){name}(?![\w-])", text), name
    (tmp_path / "web.toml").write_text(example(page))
    assert read_policy(tmp_path / "web.toml").observe is False


def test_the_example_of_the_agents_page_is_a_configuration(tmp_path):
    file = tmp_path / "agent.toml"
    file.write_text(example(TREE / "docs/man/kvmi-agent.toml.5"))
    assert load(file).rules[0].match == "web*"
