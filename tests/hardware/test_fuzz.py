# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whatever an introspector sends, and to whatever VM: the host is well, and nothing is left behind.

A few thousand messages here; ``make fuzz`` sends many more.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmi_host.testing.campaign import Profile, Report

pytestmark = pytest.mark.hardware

MIB = 1024


@pytest.mark.rule("2.17", "2.3")
@pytest.mark.parametrize("profile", [Profile.HARMLESS, Profile.ANYTHING])
def test_the_host_comes_through_whatever_it_is_sent(
    campaign: Callable[..., Report], pytestconfig: pytest.Config, profile: Profile
) -> None:
    wanted = pytestconfig.getoption("--messages")
    report = campaign(profile, messages=wanted)
    assert report.messages >= wanted
    assert report.ended
    left_nothing_behind(report)


@pytest.mark.rule("4.81")
def test_a_storm_of_events_on_every_vcpu_ends_no_session(
    campaign: Callable[..., Report], pytestconfig: pytest.Config
) -> None:
    seconds, vcpus = (pytestconfig.getoption(name) for name in ("--storm-seconds", "--storm-vcpus"))
    report = campaign(Profile.STORM, seconds=seconds, vcpus=vcpus)
    assert report.events.total()
    assert report.ended == 0
    left_nothing_behind(report)


def left_nothing_behind(report: Report) -> None:
    """What is left of one message in four is too much: most of them make the kernel allocate something."""
    assert report.left_behind < report.messages / 4
    assert report.after.vmalloc_kib - report.before.vmalloc_kib < MIB
