# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every block of commands in the documentation is run by a test, or stands in a table here: with the test that does
what it says, or with what it would take to run it. What is not run is read: commands, options, make targets and files
exist."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from kvmi_host.cli import app

ROOT = Path(__file__).parents[3]
PAGES = [
    *("README.md", "kernel/README.md"),
    *(name for name in ("CONTRIBUTING.md",) if (ROOT / name).exists()),
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]

GUIDE = "tests/hardware/test_guide.py::test_a_block_of_the_guide_prints_what_the_guide_shows"
RUN = {"docs/operating.md": GUIDE, "docs/tutorial.md": GUIDE}
"""Whose fenced shell blocks run, all of them and as they stand there."""

BOXES = "minutes of several emulated hosts, or hours"
LAB = "a lab of several hosts"
ROOTS_HOST = "a host whose installation may be changed"
BUILDS = "minutes of compiling"

DONE_BY = {
    ("README.md", "kvmi-host attach webserver --events cr3,hypercall"): GUIDE,
    (
        "README.md",
        "kvmi-host guest create web --image debian --network default --ssh-key ~/.ssh/id_ed25519.pub --start",
    ): "tests/integration/test_debian_guest.py::test_it_is_started_from_what_was_uploaded",
    ("README.md", "kvmi-host agent --config agent.toml"): GUIDE,
    ("docs/agent.md", "kvmi-host agent --config /etc/kvmi-host/agent.toml"): GUIDE,
    (
        "docs/attaching.md",
        "kvmi-host attach webserver --to /run/introspector.sock --cookie-file /etc/introspector.cookie",
    ): "tests/hardware/test_attach.py::test_an_introspector_that_listens_gets_the_session_until_detach",
    (
        "docs/attaching.md",
        "kvmi-host attach webserver --exec -- my-introspector --verbose",
    ): "tests/hardware/test_attach.py::test_a_program_gets_the_session_on_descriptor_3",
    (
        "docs/doctor.md",
        "kvmi-host doctor",
    ): "tests/integration/test_doctor_ssh.py::test_it_finds_there_what_it_finds_here",
    (
        "docs/fleet.md",
        "kvmi-host hwtest --inventory lab.toml --report report",
    ): "tests/integration/test_fleet.py::test_the_other_host_comes_to_its_end",
    (
        "docs/fleet.md",
        "kvmi-host inventory import hosts.ini --group kvm > lab.toml",
    ): "tests/integration/test_fleet.py::test_ansible_says_who_the_hosts_are",
    (
        "docs/guests.md",
        "kvmi-host guest create walker --image modewalk --start",
    ): "tests/hardware/test_provision.py::test_a_saved_guest_goes_on_where_it_was",
    (
        "docs/nightly.md",
        "make nightly",
    ): "tests/unit/ci/test_nightly.py::test_the_suite_of_the_inventory_then_ten_minutes_of_fuzzing",
    (
        "docs/nightly.md",
        "labgrid-exporter -c rack.example.org:20408 -n shelf hosts.yaml",
    ): "tests/integration/test_rack.py::test_the_suites_hosts_are_the_places_and_are_given_back",
    ("docs/recordings.md", "kvmi-host replay session.pcapng"): GUIDE,
    ("docs/report.md", "kvmi-host report DIR"): "tests/unit/cli/test_report.py::test_the_history_is_made_and_asked",
}
"""What other blocks say is done by these tests, in words of their own."""

NOT_RUN = {
    ("CONTRIBUTING.md", "environment=$(ci/setup)"): "a checkout of somebody's own, whose hooks it changes",
    ("README.md", "make demo"): BOXES,
    ("README.md", "apt-get install linux-source-6.1 linux-headers-cloud-amd64 gcc make patch xz-utils"): ROOTS_HOST,
    ("README.md", "kvmi-host hwtest"): BOXES,
    ("README.md", "make test-hardware KERNEL=6.12 CPU=intel"): BOXES,
    ("docs/agent.md", "cd kvmi_host/services"): ROOTS_HOST,
    ("docs/deploying.md", 'PATH="$(ci/setup)/bin:$PATH"'): "ci/deploy, which is hours of an emulated host",
    ("docs/deploying.md", "make test-deploy"): BOXES,
    ("docs/guests.md", "echo '/run/kvmi-agent/agent.sock rw,' >> /etc/apparmor.d/local/abstractions/libvirt-qemu"): (
        ROOTS_HOST
    ),
    ("docs/hardware-suite.md", "kvmi-host hwtest"): BOXES,
    ("docs/mutants.md", "make mutants KERNEL=6.1"): BOXES,
    (
        "docs/nightly.md",
        "useradd --system --home-dir /var/lib/kvmi-nightly --shell /usr/sbin/nologin kvmi-nightly",
    ): ROOTS_HOST,
    ("docs/nightly.md", "systemctl daemon-reload"): ROOTS_HOST,
    (
        "docs/nightly.md",
        "install -D kvmi-host/ci/systemd/boxes.conf /etc/systemd/system/kvmi-nightly.service.d/boxes.conf",
    ): ROOTS_HOST,
    ("docs/selftests.md", "make kvm-selftests KERNEL=6.1 CPU=amd"): BOXES,
    (
        "docs/selftests.md",
        "make kvm-selftests CPU=intel T='^(?!vmx_preemption_timer|hardware_disable|memslot_perf|set_memory_region)'",
    ): BOXES,
    ("docs/tutorial.md", "make demo"): BOXES,
    ("docs/tutorial.md", 'PATH="$(ci/setup)/bin:$PATH"'): BOXES,
    ("docs/tutorial.md", "kvmi-host lab down"): BOXES,
    ("kernel/README.md", "./build"): BUILDS,
    ("kernel/README.md", "apt-get install linux-headers-cloud-amd64"): ROOTS_HOST,
    (
        "kernel/README.md",
        "mokutil --import /var/lib/dkms/mok.pub",
    ): "firmware with Secure Boot, and who confirms at boot",
    ("kernel/README.md", "./port checkout 6.12 /tmp/kvm-6.12"): "somebody who edits the patches",
    ("kernel/README.md", "make test-hardware KERNEL=debug"): BOXES,
    ("kernel/README.md", 'kvmi-host hwtest --modules "$(kernel/dialects/build v7)"'): BOXES,
}
"""What nothing runs, and what it would take."""

NO_COMMANDS = {
    ("docs/attaching.md", "/run/kvmi-host/*.sock rw,"),
    ("docs/mutants.md", "Broken: the first event of a session is number 0"),
    ("docs/nightly.md", "INVENTORY=/etc/kvmi-host/lab.toml"),
    (
        "docs/recordings.md",
        'with Recorder("session.pcapng", "webserver") as recorder,'
        ' kvmi_host.attach("webserver", tap=recorder.tap) as vm:',
    ),
}
"""What is indented, and no shell's."""

SHELL = ("sh", "bash", "console", "shell")


class Block(NamedTuple):
    """A block of commands: its page, its line there, its text, and whether it is fenced."""

    page: str
    line: int
    text: str
    fenced: bool

    @property
    def name(self) -> tuple[str, str]:
        """Its page, and its first line without what is remarked behind it."""
        return self.page, re.sub(r"\s+# .*", "", self.text.splitlines()[0])


def blocks(page: str) -> Iterator[Block]:
    """The fenced shell blocks of a page, and what is indented."""
    fence: tuple[str, int] | None = None
    kept: list[tuple[int, str]] = []
    inside: list[str] = []
    for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
        if line.startswith("```"):
            if fence is None:
                fence, inside = (line[3:], number + 1), []
                continue
            if fence[0] in SHELL:
                yield Block(page, fence[1], "\n".join(inside), fenced=True)
            fence = None
        elif fence is not None:
            inside.append(line)
        else:
            kept.append((number, line))
    for indented, lines in groupby(kept, key=lambda item: item[1].startswith("    ") or not item[1]):
        part = [(number, line[4:]) for number, line in lines]
        while part and not part[0][1]:
            part.pop(0)
        if indented and part:
            yield Block(page, part[0][0], "\n".join(line for _, line in part).rstrip(), fenced=False)


BLOCKS = [block for page in PAGES for block in blocks(page)]
TO_READ = [block for block in BLOCKS if not (block.fenced and block.page in RUN) and block.name not in NO_COMMANDS]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))
SETTINGS = MAKEFILE + "".join(path.read_text() for path in sorted((ROOT / "ci").iterdir()) if path.is_file())


def commands(text: str) -> Iterator[list[str]]:
    """The words of each simple command, those in $(...) too."""
    text = text.replace("\\\n", " ")
    for line in [*text.splitlines(), *re.findall(r"\$\(([^()]*)\)", text)]:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("();&|<>"):
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def require_kvmi_host(words: list[str]) -> None:
    """The command line is one that ``kvmi-host`` takes: verb, options, and arguments in their number."""
    command: Any = typer.main.get_command(app)
    context, name = typer.Context(command), ""
    while hasattr(command, "get_command"):
        name, *words = words
        command = command.get_command(context, name)
        assert command, f"there is no verb {name}"
        context = typer.Context(command, parent=context, **command.context_settings)
    given, left, _ = command.make_parser(context).parse_args(list(words))  # values are not looked at: files are made up
    assert context.allow_extra_args or not left, f"{name}: too many words: {left}"
    if any(param.is_eager and given.get(param.name) for param in command.params):
        return  # such an option is all that is looked at, as --help
    missing = [param.name for param in command.params if param.required and not isinstance(given.get(param.name), str)]
    assert not missing, f"{name}: missing: {missing}"


def require_make(settings: list[str], words: list[str]) -> None:
    """Make has these targets, and somebody reads what is set."""
    for word in [*settings, *words]:
        name, is_setting, _ = word.partition("=")
        if is_setting:
            assert re.search(rf"\b{name}\b", SETTINGS), f"nobody reads {name}"
        else:
            assert name in TARGETS, f"there is no target {name}"


def file_of(word: str, page: str) -> str | None:
    """The file of this tree that a word names, if it is to name one."""
    if page == "kernel/README.md" and re.match(r"\./\w+$", word):
        return f"kernel/{word[2:]}"
    word = word.removeprefix(".../").removeprefix("kvmi-host/")
    return word if re.match(r"(?:ci|docs|kernel|tests|vm-images)/[\w./*-]+$", word) else None


@pytest.mark.parametrize("block", [pytest.param(block, id=f"{block.page}:{block.line}") for block in TO_READ])
def test_a_block_that_is_not_run_names_what_there_is(block: Block) -> None:
    subprocess.run(["bash", "-n", "-c", block.text], check=True)
    for words in commands(block.text):
        settings = []
        while words and re.match(r"\w+=", words[0]):
            settings.append(words.pop(0))
        program = words[0].rpartition("/")[2] if words else ""
        if program == "kvmi-host":
            require_kvmi_host(words[1:])
        elif program == "make":
            require_make(settings, words[1:])
        for word in [*settings, *words]:
            if file := file_of(word, block.page):
                assert list(ROOT.glob(file)), f"there is no {file}"
        if words and (script := file_of(words[0], block.page)):
            said = (ROOT / script).read_text()
            assert all(word in said for word in words[1:] if word.startswith("--")), f"{script}: {words[1:]}"


def test_every_block_is_run_or_in_one_of_the_tables() -> None:
    told = DONE_BY.keys() | NOT_RUN.keys()
    assert [block.name for block in TO_READ if block.name not in told] == []


def test_no_block_is_in_two_tables_and_no_entry_is_there_in_vain() -> None:
    there = {block.name for block in BLOCKS if not (block.fenced and block.page in RUN)}
    tables = [*DONE_BY, *NOT_RUN, *NO_COMMANDS]
    assert sorted(set(tables)) == sorted(tables)
    assert set(tables) - there == set()


@pytest.mark.parametrize("test", sorted({*RUN.values(), *DONE_BY.values()}))
def test_a_test_that_runs_a_block_is_there(test: str) -> None:
    path, name = test.split("::")
    assert re.search(rf"^(?:async )?def {name}\(", (ROOT / path).read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", RUN)
def test_a_guide_that_runs_is_beside_the_test_that_runs_it(page: str) -> None:
    beside = ROOT / "tests/hardware" / Path(page).name
    assert beside.samefile(ROOT / page)
    assert f'"{beside.stem}"' in (ROOT / "tests/hardware/test_guide.py").read_text()


@pytest.mark.parametrize(
    "line",
    [
        "kvmi-host attach web --event cr3",
        "kvmi-host atach web",
        "kvmi-host attach",
        "kvmi-host detach web now",
        "make tests",
        "MINUTE=5 make storm",
        "ci/setups",
        "make demo &&",
    ],
)
def test_a_wrong_line_would_be_found(line: str) -> None:
    with pytest.raises((typer.TyperException, subprocess.CalledProcessError, AssertionError)):
        test_a_block_that_is_not_run_names_what_there_is(Block("README.md", 1, line, fenced=False))
