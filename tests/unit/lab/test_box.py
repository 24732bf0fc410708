# SPDX-License-Identifier: LGPL-2.1-or-later
"""A box that is not there, and steps that fail: what the user is told."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvmi_host.cli.lab import app
from kvmi_host.lab import Box, LabError
from kvmi_host.lab.progress import build, started


def test_box_that_is_not_up_says_how_to_start_it() -> None:
    with pytest.raises(LabError, match="kvmi-host lab up"):
        Box().status()


def test_command_for_a_box_that_is_not_up_is_an_error() -> None:
    with pytest.raises(LabError, match="does not run"):
        Box().run(["true"])


def test_down_of_a_box_that_is_not_up_is_fine() -> None:
    assert Box().down() is False


def test_record_of_a_box_that_died_is_not_believed(own_cache: Path) -> None:
    box = Box()
    (own_cache / "run" / "box" / "box.json").write_text('{"port": 22, "image": "/nowhere"}')
    with pytest.raises(LabError, match="does not run"):
        box.status()


@pytest.mark.parametrize("name", ["", "../x", "a b", "a/b", "."])
def test_name_that_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(LabError, match="cannot be called"):
        Box(name)


def test_lab_down_says_what_it_did() -> None:
    result = CliRunner().invoke(app, ["down"])
    assert (result.exit_code, result.output) == (0, "box was not up\n")


def test_build_that_fails_shows_the_end_of_what_it_said() -> None:
    with pytest.raises(LabError, match=r"making it failed(.|\n)*status 4(.|\n)*mirror is down"):
        build("making it", ["/bin/sh", "-c", "echo mirror is down >&2; exit 4"])


def test_build_returns_what_it_wrote() -> None:
    assert build("making it", ["/bin/sh", "-c", "echo working >&2; echo result"]) == "result\n"


def test_build_gets_what_is_added_to_the_environment() -> None:
    assert build("making it", ["/bin/sh", "-c", 'echo "$KVMI_X"'], {"KVMI_X": "1"}) == "1\n"


def test_build_that_is_not_waited_for_is_ended(tmp_path: Path) -> None:
    (tmp_path / "pid").touch()
    with started("making it", ["/bin/sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 60"]):
        while not (pid := (tmp_path / "pid").read_text().strip()):
            pass
    assert not Path(f"/proc/{pid}").exists()
