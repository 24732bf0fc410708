# SPDX-License-Identifier: LGPL-2.1-or-later
"""``kvmi-host report``: a night's folder gets its page, and the exit status says whether the night passed."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from kvmi_host.cli import app
from kvmi_host.testing.nights import MadeUpHost, write_night

GOOD = MadeUpHost("lab7")


@pytest.fixture
def report():
    return lambda *arguments: CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_a_night_that_passed_is_0_and_its_page_is_named(report, tmp_path):
    result = report(write_night(tmp_path, [GOOD]))
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path}/index.html: the night passed\n")
    assert (tmp_path / "index.html").exists()


def test_a_night_that_failed_is_1(report, tmp_path):
    result = report(write_night(tmp_path, [MadeUpHost("lab7", fails={0: "no"})]))
    assert (result.exit_code, result.stdout) == (1, f"{tmp_path}/index.html: the night failed\n")


def test_the_history_is_made_and_asked(report, tmp_path):
    history = tmp_path / "history.sqlite"
    for number in (1, 2):
        folder = write_night(tmp_path / str(number), [GOOD], number)
        assert report(folder, "--history", history).exit_code == 0
    assert "What changed since the night of 12 November 2026" in (folder / "index.html").read_text()


def test_a_folder_that_is_no_night_is_1_and_one_line(report, tmp_path):
    result = report(tmp_path)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"kvmi-host: {tmp_path}/night.json cannot be read: ")
    assert result.stderr.count("\n") == 1


def test_a_folder_that_is_not_there_is_2(report, tmp_path):
    assert report(tmp_path / "nowhere").exit_code == 2
    assert report().exit_code == 2


def test_help_needs_no_templates():
    code = "import sys, kvmi_host.cli.report; print('jinja2' in sys.modules, 'sqlite3' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "False False"
