# SPDX-License-Identifier: LGPL-2.1-or-later
"""The simulated kernel and the live kernel part make the same of the same exchanges.

Unit tests, fuzzing and benchmarks stand on the simulated one: what is shown here is what they may be believed for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from kvmi_host.testing.differential import LiveSide, Script, SimulatedSide, disagreement, drawn, written
from kvmi_host.testing.live import SharedGuests
from kvmi_host.testing.puppet import page

# The simulated kernel has what ours has.
pytestmark = [pytest.mark.hardware, pytest.mark.needs("observing sessions")]

DRAWN = 20
NAMES = tuple(written(0))


@pytest.fixture(scope="module")
def live() -> Iterator[LiveSide]:
    """The kernel part of this host, with a guest of its own, whose memory is a file."""
    with TemporaryDirectory(dir="/dev/shm") as directory, LiveSide(Path(directory) / "memory") as side:
        yield side


@pytest.fixture
def sides(shared: SharedGuests, live: LiveSide) -> tuple[SimulatedSide, LiveSide]:
    """Both sides; other guests leave them the host's CPUs."""
    shared.stand_aside()
    return SimulatedSide(page(0)), live


def agree(script: Script, sides: tuple[SimulatedSide, LiveSide]) -> None:
    __tracebackhide__ = True
    if difference := disagreement(script, *sides):
        pytest.fail(difference, pytrace=False)


@pytest.mark.parametrize("name", NAMES)
def test_both_make_the_same_of_an_exchange(name: str, sides: tuple[SimulatedSide, LiveSide]) -> None:
    agree(written(page(0))[name], sides)


@pytest.mark.parametrize("number", range(DRAWN))
def test_both_make_the_same_of_what_a_seed_draws(
    number: int, sides: tuple[SimulatedSide, LiveSide], pytestconfig: pytest.Config
) -> None:
    seed = pytestconfig.getoption("--seed") * DRAWN + number
    agree(drawn(seed, [page(index) for index in range(4)], sides[0]), sides)
