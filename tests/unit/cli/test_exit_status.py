# SPDX-License-Identifier: LGPL-2.1-or-later
"""Exit status: 0, 1 failed, 2 usage, 3 the host cannot. One line says why."""

import errno
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from kvmi_host import __version__
from kvmi_host.cli import app

TEST_DRIVER = ["-c", "test:///default"]


@pytest.fixture
def run(monkeypatch):
    monkeypatch.delenv("LIBVIRT_DEFAULT_URI", raising=False)
    return lambda *arguments: CliRunner().invoke(app, arguments)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["guest", "--help"], ["attach", "--help"], ["guest", "list", *TEST_DRIVER]]
)
def test_what_works_is_0(run, arguments):
    assert run(*arguments).exit_code == 0


def test_the_version_is_the_packages(run):
    assert run("--version").output.strip() == __version__


@pytest.mark.parametrize(
    "arguments",
    [
        ["attach", "webserver", *TEST_DRIVER],
        ["attach", "test", *TEST_DRIVER],
        ["attach", "pid:4194304"],
        ["detach", "webserver", *TEST_DRIVER],
        ["guest", "start", "webserver", *TEST_DRIVER],
        ["guest", "start", "test", *TEST_DRIVER],
        ["guest", "create", "web", "--image-dir", "/nowhere", *TEST_DRIVER],
        ["guest", "list", "-c", "qemu+ssh://root@127.0.0.1:1/system?no_tty=1"],
        ["hwtest", "--inventory", "/nowhere/lab.toml"],
        ["inventory", "import", "/nowhere/hosts.ini"],
    ],
)
def test_what_fails_is_1_and_one_line(run, arguments):
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("kvmi-host: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["reboot"],
        ["hwtest", "--limit", "lab7"],
        ["attach"],
        ["attach", "webserver", "--events", "cr8"],
        ["attach", "webserver", "--allow", "everything"],
        ["attach", "webserver", "--count", "0"],
        ["attach", "webserver", "--exec"],
        ["attach", "webserver", "program"],
        ["attach", "webserver", "--to", "/x", "--exec", "--", "program"],
        ["attach", "webserver", "--cookie-file", "/dev/null"],
        ["attach", "webserver", "--to", "/x", "--cookie-file", "/nowhere"],
        ["attach", "webserver", "--method", "telepathy"],
        ["detach", "webserver", "--method", "telepathy"],
        ["guest", "create", "web", "--vcpus", "0"],
    ],
)
def test_wrong_usage_is_2(run, arguments):
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize("way", [[], ["--to", "/nowhere.sock"], ["--exec", "--", "true"]], ids=["itself", "to", "exec"])
def test_what_the_policy_file_does_not_allow_is_1_whoever_gets_the_session(run, tmp_path, way):
    (tmp_path / "web.toml").touch()
    options = ["--allow", "full", "--policy", str(tmp_path / "web.toml"), *way]
    result = run("attach", f"pid:{os.getpid()}", *options)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"kvmi-host: {tmp_path}/web.toml: it does not allow set-registers, ")


def test_a_host_that_cannot_is_3(run, monkeypatch):
    import kvmi_host
    from kvmi_host.attach import AttachRefused

    def refuse(*arguments, **settings):
        raise AttachRefused("the loaded KVM modules have no introspection")

    monkeypatch.setattr(kvmi_host, "attach", refuse)
    result = run("attach", "webserver")
    assert result.exit_code == 3
    assert result.stderr == "kvmi-host: the loaded KVM modules have no introspection\n"


def test_starting_up_imports_nothing_heavy():
    code = "import sys, kvmi_host.cli; print(*sorted({'libvirt', 'paramiko', 'rich.live', 'qemu'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == ""


def test_a_reader_that_goes_away_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "kvmi_host.cli", "guest", "list", *TEST_DRIVER]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert os.strerror(errno.EPIPE) not in result.stderr
