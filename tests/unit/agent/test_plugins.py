# SPDX-License-Identifier: LGPL-2.1-or-later
"""Handlers come from entry points; what is wrong with one shows when the configuration is read."""

import pytest

from kvmi_host.agent.errors import ConfigError
from kvmi_host.agent.plugins import set_up_by


def test_a_plugin_is_given_its_options(install):
    install("mine", "def plugin(options): return lambda vm: vm.append(options['what'])")
    vm = []
    set_up_by("mine", {"what": 5})(vm)
    assert vm == [5]


def test_a_plugin_says_what_is_wrong_with_its_options(install):
    install("picky", "def plugin(options): raise ValueError('what = 5 is too much')")
    with pytest.raises(ConfigError, match=r"handler 'picky' \(picky_plugin:plugin\): what = 5 is too much"):
        set_up_by("picky", {})


@pytest.mark.parametrize("source", ["import no_such_module", "plugin", ""])
def test_a_plugin_that_cannot_be_imported_is_an_error_of_the_configuration(install, source):
    install("broken", source)
    with pytest.raises(ConfigError, match=r"handler 'broken' \(broken_plugin:plugin\): "):
        set_up_by("broken", {})


def test_a_plugin_that_is_not_installed_is_an_error_which_names_those_that_are(install):
    install("mine", "")
    with pytest.raises(ConfigError, match=r"no handler 'yours' is installed.*there are: log, mine"):
        set_up_by("yours", {})


@pytest.mark.parametrize("options", [{}, {"events": []}, {"events": "cr3"}, {"events": ["cr3"], "more": 1}])
def test_the_log_plugin_takes_a_list_of_events(options):
    with pytest.raises(ConfigError, match="its one option is events"):
        set_up_by("log", options)


def test_the_log_plugin_knows_its_events():
    with pytest.raises(ConfigError, match="no event is called 'cr5'"):
        set_up_by("log", {"events": ["cr3", "cr5"]})
