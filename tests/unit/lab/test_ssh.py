# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules of the SSH connection, against a server of our own: the host's key decides, and every wait has an end."""

import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import paramiko
import pytest

from kvmi_host.lab.errors import LabError
from kvmi_host.lab.ssh import Shell
from kvmi_host.testing.ssh_server import SshServer


def keypair(path: Path) -> paramiko.Ed25519Key:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return paramiko.Ed25519Key.from_private_key_file(str(path))


def known(folder: Path, key: paramiko.PKey) -> Path:
    file = folder / "known_hosts"
    file.write_text(f"kvmi-lab {key.get_name()} {key.get_base64()}\n")
    return file


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[paramiko.PKey, Path, Path]:
    """The host's key, the file of known hosts with it, and the client's private key."""
    folder = tmp_path_factory.mktemp("keys")
    host = keypair(folder / "host")
    keypair(folder / "client")
    return host, known(folder, host), folder / "client"


@pytest.fixture(scope="module")
def port(keys: tuple[paramiko.PKey, Path, Path]) -> Iterator[int]:
    """Where the server listens."""
    with SshServer(keys[0]) as server:
        yield server.port


@pytest.fixture
def shell(port: int, keys: tuple[paramiko.PKey, Path, Path]) -> Iterator[Shell]:
    """A connection to the server."""
    connection = Shell(port, keys[2], keys[1], 20)
    yield connection
    connection.close()


def test_output_of_both_streams_comes_back(shell: Shell) -> None:
    done = shell.run("echo out; echo err >&2")
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 0)


def test_arguments_arrive_as_they_are(shell: Shell) -> None:
    assert shell.run(["printf", "%s|", "a b", "$HOME", "it's"]).stdout == "a b|$HOME|it's|"


def test_large_output_comes_whole(shell: Shell) -> None:
    assert len(shell.run("head -c 3000000 /dev/zero | tr '\\0' x").stdout) == 3000000


def test_standard_input_arrives(shell: Shell) -> None:
    assert shell.run("cat", stdin=b"x" * 500000).stdout == "x" * 500000


def test_output_is_shown_as_it_comes(shell: Shell) -> None:
    shown: list[str] = []
    shell.run("echo one; echo two", on_output=shown.append)
    assert "".join(shown) == "one\ntwo\n"


def test_failed_command_is_an_error_with_what_it_said(shell: Shell) -> None:
    with pytest.raises(LabError, match=r"status 3(.|\n)*no such thing"):
        shell.run("echo no such thing >&2; exit 3")


def test_failed_command_is_an_answer_where_asked_for(shell: Shell) -> None:
    assert shell.run("exit 3", check=False).returncode == 3


def test_command_that_hangs_is_given_up(shell: Shell) -> None:
    with pytest.raises(LabError, match=r"within 0\.5 s"):
        shell.run("hang", deadline=0.5)


def test_connection_that_breaks_is_an_error(shell: Shell) -> None:
    with pytest.raises(LabError, match="broke"):
        shell.run("hang up", deadline=20)


def test_host_with_another_key_is_refused(port: int, keys: tuple[paramiko.PKey, Path, Path], tmp_path: Path) -> None:
    other = known(tmp_path, keypair(tmp_path / "other"))
    with pytest.raises(LabError, match="its SSH key is another"):
        Shell(port, keys[2], other, 20)


def test_host_that_is_down_is_an_error(keys: tuple[paramiko.PKey, Path, Path], unused: Callable[[], int]) -> None:
    with pytest.raises(LabError, match="no SSH connection to kvmi-lab"):
        Shell(unused(), keys[2], keys[1], 5)


def test_host_that_says_nothing_is_given_up(keys: tuple[paramiko.PKey, Path, Path]) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(LabError, match="no SSH connection to kvmi-lab"),
    ):
        Shell(listener.getsockname()[1], keys[2], keys[1], 1)


@pytest.fixture
def unused() -> Callable[[], int]:
    """Gives a port that nobody listens on."""

    def find() -> int:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            return int(listener.getsockname()[1])

    return find
