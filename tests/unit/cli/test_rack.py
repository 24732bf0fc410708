# SPDX-License-Identifier: LGPL-2.1-or-later
"""``hwtest --lg-...``: which places are meant is said once, and clearly."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from kvmi_host.cli import app


@pytest.fixture(autouse=True)
def nothing_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LG_COORDINATOR", "LG_PLACE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lg-coordinator", "rack"], "which places"),
        (["--lg-filter", "vendor"], "TAG=VALUE"),
        (["--lg-filter", "=amd"], "TAG=VALUE"),
        (["--lg-place", "lab1", "--lg-filter", "vendor=amd"], "one of the two"),
    ],
)
def test_what_does_not_say_which_places_is_a_wrong_usage(options: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["hwtest", *options])
    assert result.exit_code == 2
    assert said in " ".join(result.output.replace("│", "").split())  # as it was before it was framed


def test_without_labgrid_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "labgrid.remote", None)
    result = CliRunner().invoke(app, ["hwtest", "--lg-coordinator", "rack", "--lg-filter", "vendor=amd"])
    assert result.exit_code == 3
    assert "labgrid is needed to ask rack for hosts" in result.output
    assert "pip install 'kvmi-host[lab]'" in result.output
