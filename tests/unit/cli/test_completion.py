# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a shell is offered when someone presses tab."""

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from time import monotonic

import pytest

from kvmi_host.cli import completion
from kvmi_host.introspect.interests import NAMES, parse

DEADLINE = 60.0
PROGRAM = [sys.executable, "-m", "kvmi_host.cli"]
TEST_DRIVER = "test:///default"  # libvirt's built-in driver: one running guest, test


def ask(**environment):
    result = subprocess.run(
        PROGRAM,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert result.stderr == ""
    return result.stdout.split("\n")[:-1] if result.stdout.strip() else []


def bash(*words):
    """What bash is offered in place of the last of these words, which are as bash breaks them."""
    return ask(_KVMI_HOST_COMPLETE="complete_bash", COMP_WORDS="\n".join(words), COMP_CWORD=str(len(words) - 1))


@pytest.fixture
def vmm():
    """A process with the command line of libvirt's QEMU, another with that of one started by hand."""
    sleep = "read line"
    names = ["-name", "guest=completion-web,debug-threads=on"]
    processes = [
        subprocess.Popen(["qemu-system-x86_64", "-c", sleep, *arguments], executable="/bin/sh", stdin=subprocess.PIPE)
        for arguments in (names, [])
    ]
    yield [process.pid for process in processes]
    for process in processes:
        process.communicate(b"\n")


def test_the_verbs_are_offered():
    assert {"attach", "detach", "doctor", "guest", "lab", "agent", "replay"} <= set(bash("kvmi-host", ""))


def test_the_verbs_of_a_verb_are_offered():
    assert {"create", "start", "stop", "destroy", "list"} <= set(bash("kvmi-host", "guest", ""))


def test_options_are_offered():
    assert bash("kvmi-host", "attach", "--al") == ["--allow"]


def test_running_vms_are_offered_by_name_and_those_without_by_process(vmm):
    named, nameless = vmm
    offered = bash("kvmi-host", "attach", "")
    assert {"completion-web", f"pid:{nameless}"} <= set(offered)
    assert f"pid:{named}" not in offered


def test_every_vm_is_offered_by_process_if_that_is_what_is_typed(vmm):
    assert set(map(str, vmm)) <= set(bash("kvmi-host", "attach", "pid", ":"))


def test_a_running_guest_is_offered_to_stop_and_not_to_start():
    assert bash("kvmi-host", "guest", "stop", "-c", "test", ":", "///default", "") == ["test"]
    assert bash("kvmi-host", "guest", "start", "-c", "test", ":", "///default", "") == []


@pytest.mark.parametrize("uri", [["qemu+unix:///system?socket=/nowhere/none"], ["nonsense", "://"]])
def test_a_libvirt_that_cannot_be_asked_is_no_error(uri):
    assert bash("kvmi-host", "guest", "start", "-c", *uri, "") == []


def test_a_libvirt_that_does_not_answer_is_not_waited_for(monkeypatch):
    from threading import Event

    never = Event()
    monkeypatch.setattr(completion, "_DEADLINE", 0.01)
    assert completion._in_time(lambda: [str(never.wait(DEADLINE))]) == []
    never.set()


def test_events_are_offered_after_each_comma_and_once():
    offered = bash("kvmi-host", "attach", "web", "--events", "cr3,cr")
    assert set(offered) == {"cr3,cr", "cr3,cr0", "cr3,cr4", "cr3,create-vcpu"}


def test_every_event_that_is_offered_is_taken():
    assert set(NAMES) <= set(completion.events(""))
    for name in completion.events(""):
        parse(f"{name}0x1000" if name.endswith(":") else name)


def test_profiles_and_names_are_offered_as_policies():
    offered = bash("kvmi-host", "attach", "web", "--allow", "")
    assert offered[:2] == ["observe", "full"]
    assert {"get-registers", "event:cr"} <= set(offered)


def test_a_profile_is_not_offered_in_a_list():
    assert bash("kvmi-host", "attach", "web", "--allow", "get-registers,ob") == []


def test_an_option_and_its_value_may_be_one_word():
    assert bash("kvmi-host", "attach", "web", "--allow", "=", "ob") == ["observe"]


def test_images_are_offered():
    assert bash("kvmi-host", "guest", "create", "web", "--image", "mo") == ["modewalk"]


def test_zsh_and_fish_are_offered_the_same():
    line = "kvmi-host attach web --events cr3,hy"
    assert ask(_KVMI_HOST_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS=line) == [
        "_arguments '*: :((\"cr3,hypercall\"))'"
    ]
    fish = {"_TYPER_COMPLETE_FISH_ACTION": "get-args", "_TYPER_COMPLETE_ARGS": line}
    assert ask(_KVMI_HOST_COMPLETE="complete_fish", **fish) == ["cr3,hypercall"]


def test_no_verb_installs_a_completion_of_its_own():
    lab = ("lab", "hwtest", "bench", "selftests", "mutants")
    for verb in ("doctor", "guest", "attach", "detach", "agent", "replay", *lab):
        assert not {"--install-completion", "--show-completion"} & set(bash("kvmi-host", verb, "--"))


# -- a real shell


class Shell:
    """An interactive bash that knows our completion."""

    def __init__(self, folder: Path):
        program = folder / "kvmi-host"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m kvmi_host.cli "$@"\n')
        program.chmod(0o755)
        path = f"{folder}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PS1": "", "TERM": "dumb", "HISTFILE": ""}
        bash = shutil.which("bash")
        assert bash
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.execve(bash, ["bash", "--norc", "--noprofile", "-i"], environment)
        self._said = ""
        self._send('eval "$(_KVMI_HOST_COMPLETE=source_bash kvmi-host)"; bind "set enable-bracketed-paste off"\n')
        self._send("echo re''ady\n")
        self._await("ready")

    def line_after_tab(self, line):
        """What stands on the command line after tab was pressed once."""
        self._send(f"{line}\t\x01echo '<'\x05'>'\n")  # ctrl-a and ctrl-e: to the line's beginning, and to its end
        return self._await(">\r\n").rpartition("<")[2].removesuffix(">\r\n").strip()

    def close(self):
        os.close(self._terminal)
        os.waitpid(self.pid, 0)

    def _send(self, text):
        os.write(self._terminal, text.encode())

    def _await(self, text):
        deadline = monotonic() + DEADLINE
        while text not in self._said:
            assert monotonic() < deadline, self._said
            self._said += os.read(self._terminal, 4096).decode()
        said, _, self._said = self._said.rpartition(text)
        return said + text


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    shell = Shell(tmp_path_factory.mktemp("bin"))
    yield shell
    shell.close()


LINES = {
    "a verb": ("kvmi-host att", "kvmi-host attach"),
    "an option": ("kvmi-host attach web --al", "kvmi-host attach web --allow"),
    "the second of a list": ("kvmi-host attach web --events cr3,hyp", "kvmi-host attach web --events cr3,hypercall"),
    "after a colon": ("kvmi-host attach web --events cr3,msr:lst", "kvmi-host attach web --events cr3,msr:lstar"),
    "after an equals sign": ("kvmi-host attach web --allow=obs", "kvmi-host attach web --allow=observe"),
    "nothing": ("kvmi-host attach web --allow nonsense", "kvmi-host attach web --allow nonsense"),
}


@pytest.mark.parametrize(("typed", "line"), LINES.values(), ids=LINES)
def test_bash_completes(shell, typed, line):
    assert shell.line_after_tab(typed) == line


def test_bash_leaves_a_process_that_is_typed_already_as_it_is(shell, vmm):
    assert shell.line_after_tab(f"kvmi-host attach pid:{vmm[1]}") == f"kvmi-host attach pid:{vmm[1]}"
