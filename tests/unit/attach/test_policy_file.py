# SPDX-License-Identifier: LGPL-2.1-or-later
"""A VM's policy file: which one it is, what it says, and that nobody gets more than it has."""

import os
from uuid import UUID

import pytest

from kvmi_host.attach import FULL, OBSERVE, Policy, PolicyRefused, Target, policy_of, read_policy
from kvmi_host.protocol import Command, EventId

WEB = Target(1234, "webserver", UUID("00112233-4455-6677-8899-aabbccddeeff"), 1_700_000_000)
NAMELESS = Target(1234, "pid:1234", UUID(int=0), 1_700_000_000)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KVMI_POLICIES", str(tmp_path))
    return tmp_path


@pytest.fixture
def file(tmp_path):
    """Writes a policy file; its path."""

    def write(text):
        path = tmp_path / "policy.toml"
        path.write_text(text)
        path.chmod(0o644)
        return path

    return write


def test_a_vm_without_a_file_may_have_what_is_asked_for(folder):
    assert policy_of(WEB, "full") == FULL


def test_observing_is_the_default_without_a_file(folder):
    assert policy_of(WEB) == OBSERVE


@pytest.mark.parametrize("name", ["webserver.toml", "00112233-4455-6677-8899-aabbccddeeff.toml"])
def test_the_file_is_found_by_name_and_by_uuid(folder, name):
    (folder / name).write_text('allow = "full"')
    policy = policy_of(WEB)
    assert (policy, policy.name) == (FULL, str(folder / name))


def test_two_files_for_one_vm_are_refused(folder):
    for name in (WEB.name, WEB.uuid):
        (folder / f"{name}.toml").write_text("")
    with pytest.raises(PolicyRefused, match="both for webserver: remove one"):
        policy_of(WEB)


def test_a_vm_that_has_no_uuid_has_no_file_by_that(folder):
    (folder / f"{UUID(int=0)}.toml").write_text('allow = "full"')
    assert policy_of(NAMELESS) == OBSERVE


def test_a_vms_name_does_not_lead_out_of_the_folder(folder, monkeypatch):
    (folder / "in").mkdir()
    (folder / "out.toml").write_text('allow = "full"')
    monkeypatch.setenv("KVMI_POLICIES", str(folder / "in"))
    assert policy_of(Target(1, "../out", UUID(int=0), 0)) == OBSERVE


def test_a_name_that_is_too_long_for_a_file_has_none(folder):
    assert policy_of(Target(1, "w" * 300, UUID(int=0), 0)) == OBSERVE


def test_a_folder_that_cannot_be_looked_into_is_no_missing_file(folder, monkeypatch):
    (folder / "file").touch()
    monkeypatch.setenv("KVMI_POLICIES", str(folder / "file"))
    with pytest.raises(PolicyRefused, match="whether there is a policy file cannot be seen"):
        policy_of(WEB)


def test_a_file_that_points_nowhere_is_no_missing_file(folder):
    (folder / "webserver.toml").symlink_to("nowhere")
    with pytest.raises(PolicyRefused, match="cannot be read"):
        policy_of(WEB)


def test_a_file_that_is_given_is_in_place_of_the_vms_own(folder, file):
    (folder / "webserver.toml").write_text('allow = "full"')
    assert policy_of(WEB, file=file("")) == OBSERVE


def test_a_file_that_is_given_has_to_be_there(tmp_path):
    with pytest.raises(PolicyRefused, match=r"none\.toml: the policy file cannot be read: No such file"):
        policy_of(WEB, file=tmp_path / "none.toml")


# -- what it says

SAYS = {
    "": OBSERVE,
    'allow = "observe"': OBSERVE,
    'allow = "full"': FULL,
    'allow = ["get-registers", "read_physical"]': Policy(True, frozenset({13, 17})),
    'allow = ["get-registers", "event:cr"]': Policy(True, frozenset({13}), frozenset({1})),
    'allow = ["write-physical"]\nevents = []': Policy(False, frozenset({18}), frozenset()),
    'commands = ["get-version", "get-registers"]': Policy(True, frozenset({13})),
    'allow = "full"\ncommands = ["get-registers"]\nevents = ["cr"]': Policy(False, frozenset({13}), frozenset({1})),
}


@pytest.mark.parametrize(("text", "policy"), SAYS.items())
def test_what_a_file_says(file, text, policy):
    assert read_policy(file(text)) == policy


WRONG = {
    'allow = "full"\nalow = "full"': "line 2, alow: there is no such key; there are allow, commands, events",
    '\n[vms]\nallow = "full"': "line 2, vms: there is no such key",
    'allow = "everything"': "line 1, allow = 'everything': observe, full or a list",
    "allow = 1": "line 1, allow = 1: a list of names",
    "events = [1]": "line 1, events = .*: a list of names",
    'allow = [\n  "get-registers",\n  "reboot",\n]': "line 3, allow: no command is called 'reboot'; there are",
    'events = [\n  "cr",  # "boot"\n  "boot",\n]': "line 3, events: no event is called 'boot'; there are",
    'commands = ["write-physical"]': 'line 1, commands: write-physical changes the guest: that takes allow = "full"',
    'allow = ["get-registers"]\ncommands = []': "line 2, commands: allow lists the commands already",
    'allow = ["event:cr"]\nevents = []': "line 2, events: allow lists events already",
    "\nallow = observe": "line 2",
}


@pytest.mark.parametrize(("text", "why"), WRONG.items())
def test_what_is_not_known_is_refused_with_its_line(file, text, why):
    path = file(text)
    with pytest.raises(PolicyRefused, match=f"{path}: .*{why}"):
        read_policy(path)


def test_a_file_of_another_user_is_refused(file, monkeypatch):
    path = file('allow = "full"')
    os.chown(path, 12345, -1) if os.geteuid() == 0 else monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(PolicyRefused, match=f"chown root {path}"):
        read_policy(path)


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_file_that_others_may_write_is_refused(file, mode):
    path = file('allow = "full"')
    path.chmod(mode)
    with pytest.raises(PolicyRefused, match=f"chmod go-w {path}"):
        read_policy(path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PolicyRefused, match="not a regular file"):
        read_policy(tmp_path / "pipe")


def test_a_file_that_is_too_large_is_refused(file):
    with pytest.raises(PolicyRefused, match="larger than 65536 bytes"):
        read_policy(file("#" * 65537))


@pytest.mark.parametrize("text", [b"allow = '\xff'", b"allow = " + b"[" * 60000])
def test_what_is_no_toml_is_refused(tmp_path, text):
    path = tmp_path / "policy.toml"
    path.write_bytes(text)
    with pytest.raises(PolicyRefused, match=str(path)):
        read_policy(path)


# -- nobody gets more

SAME_OR_LESS = {
    "the profile itself": ('allow = "observe"', "observe"),
    "the lesser profile": ('allow = "full"', "observe"),
    "some of a profile's": ('allow = "observe"', "get-registers,event:cr"),
    "a list that changes the guest, of all": ('allow = "full"', "write-physical,event:cr"),
    "some of a list's": ('allow = ["get-registers", "read-physical"]', "get-registers,event:cr"),
    "a list of no command": ('allow = ["get-registers"]', "event:cr"),
    "what is always allowed": ("commands = []\nevents = []", "get-version"),
}


@pytest.mark.parametrize(("text", "allow"), SAME_OR_LESS.values(), ids=SAME_OR_LESS)
def test_less_than_the_file_has_is_what_is_asked_for(file, text, allow):
    if allow == "get-version":
        assert policy_of(WEB, allow, file(text)) == Policy(True, frozenset(), frozenset())
    else:
        assert policy_of(WEB, allow, file(text)) == policy_of(WEB, allow)


def test_a_list_that_names_no_event_has_those_of_the_file(file):
    asked = policy_of(WEB, "get-registers", file('events = ["cr", "msr"]'))
    assert asked == Policy(True, frozenset({Command.GET_REGISTERS}), frozenset({EventId.CR, EventId.MSR}))


MORE = {
    "full of observe": ('allow = "observe"', "full", "set-registers, write-physical, .*"),
    "one that changes the guest": ('allow = "observe"', "get-registers,write-physical", "write-physical"),
    "a profile of a list": ('allow = ["get-registers"]\nevents = ["cr"]', "observe", "get-guest-info, .*event:msr, .*"),
    "a command": ('allow = "full"\ncommands = ["get-registers"]', "get-xsave,get-cpuid", "get-cpuid, get-xsave"),
    "an event": ('allow = "full"\nevents = ["cr"]', "get-registers,event:cr,event:msr", "event:msr"),
    "every event": ('allow = "full"\nevents = ["cr"]', "full", "event:unhook, event:msr, .*"),
    "replies": ("", Policy(observe=False, commands=frozenset(), events=None), "replies that change the guest"),
}


@pytest.mark.parametrize(("text", "allow", "what"), MORE.values(), ids=MORE)
def test_more_than_the_file_has_is_refused_with_what_was_too_much(file, text, allow, what):
    path = file(text)
    with pytest.raises(PolicyRefused, match=f"^{path}: it does not allow {what}: ask for less"):
        policy_of(WEB, allow, path)


def test_the_lines_in_the_head_of_the_module_are_a_policy(file):
    from kvmi_host.attach import policy_file

    example = "\n".join(line for line in policy_file.__doc__.splitlines() if line.startswith("    "))
    policy = read_policy(file(example.replace("    allow", "allow")))
    assert policy.commands == {Command.GET_REGISTERS, Command.READ_PHYSICAL}
