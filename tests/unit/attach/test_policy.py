# SPDX-License-Identifier: LGPL-2.1-or-later
"""What people write for --allow, and what it means."""

import pytest

from kvmi_host.attach import FULL, OBSERVE, Policy, policy_for
from kvmi_host.protocol import Command, EventId


def test_observe_is_everything_that_cannot_change_the_guest():
    assert policy_for("observe") == OBSERVE == Policy(observe=True, commands=None, events=None)


def test_full_is_everything():
    assert policy_for("full") == FULL == Policy(observe=False, commands=None, events=None)


def test_a_list_names_commands():
    policy = policy_for("get-registers, read_physical")
    assert policy == Policy(True, frozenset({Command.GET_REGISTERS, Command.READ_PHYSICAL}), None)


def test_a_list_names_events_with_a_prefix():
    assert policy_for("control-events,event:cr").events == {EventId.CR}


@pytest.mark.parametrize("command", ["set-registers", "write-physical", "inject-exception", "set-page-access"])
def test_a_list_with_a_command_that_changes_the_guest_does_not_observe(command):
    assert policy_for(["get-registers", command]).observe is False


def test_what_is_always_allowed_need_not_be():
    assert policy_for(["get-version", Command.GET_MAX_GFN]).commands == {Command.GET_MAX_GFN}


@pytest.mark.parametrize("allow", ["everything", "get-registers,reboot", "event:reboot", "event-reply"])
def test_a_name_that_is_not_known_is_refused_with_those_there_are(allow):
    with pytest.raises(ValueError, match=r"there are .*,"):
        policy_for(allow)
