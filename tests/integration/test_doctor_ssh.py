# SPDX-License-Identifier: LGPL-2.1-or-later
"""The doctor behind SSH, with OpenSSH's own server, agent and client: it finds there what it finds here."""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from kvmi_host.host.doctor import CHECKS, examine, this_machine
from kvmi_host.lab.paths import program

pytestmark = pytest.mark.integration

DEADLINE = 300


def keypair(path: Path, passphrase: str = "") -> str:
    """The public key, as a line."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", path], check=True)
    return Path(f"{path}.pub").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The keys: the server's, one that opens it, one that opens it and has a passphrase, and one that does not."""
    folder = tmp_path_factory.mktemp("ssh")
    keypair(folder / "host")
    keypair(folder / "other")
    (folder / "authorized").write_text(keypair(folder / "client") + keypair(folder / "locked", "secret"))
    return folder


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    """Where the server listens, as this user."""
    sshd = program("/usr/sbin/sshd", "openssh-server")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # it insists
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = [f"Port {port}", "ListenAddress 127.0.0.1", f"HostKey {folder}/host", "PidFile none", "UsePAM no"]
    settings += [f"AuthorizedKeysFile {folder}/authorized", "StrictModes no", "PasswordAuthentication no"]
    (folder / "sshd_config").write_text("\n".join([*settings, ""]))
    argv = [sshd, "-D", "-e", "-f", folder / "sshd_config"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        said = []
        for line in server.stderr:
            said.append(line)
            if "Server listening" in line:
                break
        else:
            pytest.fail(f"sshd ended: {said}")
        yield port
        server.terminate()


@pytest.fixture
def doctor(folder: Path, port: int, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``kvmi-host doctor lab``, with lines of its own in the configuration, and variables in the environment."""

    def run(*lines: str, identity: str = "client", **environment: str) -> subprocess.CompletedProcess[str]:
        config = [f"HostName 127.0.0.1\nPort {port}\nUser {getpass.getuser()}\nIdentityFile {folder / identity}"]
        config += [f"UserKnownHostsFile {folder / 'known'}\nHostKeyAlias lab\nIdentitiesOnly yes\nLogLevel ERROR"]
        (tmp_path / "config").write_text("\n".join(["Host lab", *lines, "Host *", *config, ""]))
        (folder / "known").write_text(f"lab {(folder / 'host.pub').read_text()}")
        argv = [sys.executable, "-m", "kvmi_host.cli", "doctor", "-F", tmp_path / "config", "lab", "--json"]
        env = {name: value for name, value in os.environ.items() if name != "SSH_AUTH_SOCK"}
        return subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE, env={**env, **environment})

    return run


def found(run: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    findings = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == (3 if any(finding["state"] == "missing" for finding in findings) else 0), run.stderr
    return {finding["subject"]: finding for finding in findings}


def test_it_finds_there_what_it_finds_here(doctor: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    there = found(doctor())
    here = {finding.subject: asdict(finding) for finding in examine(this_machine())}
    # Which Python and which kvmi-host are found depends on the PATH, which the login shell may change.
    for subject in ("libvirt's binding", "kvmi-host"):
        assert there.pop(subject)["group"] == here.pop(subject)["group"]
    assert there == here


@pytest.mark.parametrize(
    "line", ["ProxyJump gate", "ProxyJump gate,inner", "ProxyCommand ssh -F {config} -W %h:%p gate"]
)
def test_the_way_may_lead_through_others(
    doctor: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, line: str
) -> None:
    assert len(found(doctor(line.format(config=tmp_path / "config")))) == len(CHECKS)


def test_a_key_with_a_passphrase_comes_from_the_agent(
    doctor: Callable[..., subprocess.CompletedProcess[str]], folder: Path, tmp_path: Path
) -> None:
    refused = doctor(identity="locked")
    assert refused.returncode == 1
    assert f"ssh-add {folder}/locked" in refused.stderr

    with subprocess.Popen(["ssh-agent", "-D", "-a", tmp_path / "agent"], stdout=subprocess.PIPE, text=True) as agent:
        try:
            assert agent.stdout is not None
            assert agent.stdout.readline()  # it listens
            ask = tmp_path / "ask"
            ask.write_text("#!/bin/sh\necho secret\n")
            ask.chmod(0o755)
            environment = {"SSH_AUTH_SOCK": str(tmp_path / "agent")}
            askpass = {"SSH_ASKPASS": str(ask), "SSH_ASKPASS_REQUIRE": "force"}
            argv = ["ssh-add", "-q", folder / "locked"]
            subprocess.run(argv, env={**os.environ, **environment, **askpass}, check=True, timeout=60)
            assert len(found(doctor(identity="locked", **environment))) == len(CHECKS)
        finally:
            agent.terminate()


def test_a_key_that_does_not_open_it_is_one_line(doctor: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    run = doctor(identity="other")
    assert (run.returncode, run.stdout) == (1, "")
    assert re.fullmatch(r"kvmi-host: .* does not let us in with these keys: .*other, .*\n", run.stderr)
