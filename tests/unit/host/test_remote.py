# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules of a connection to another host: its key decides, ours opens it, every wait has an end, every error a line."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import paramiko
import pytest

from kvmi_host.host.errors import RemoteError
from kvmi_host.host.remote import Remote, connect
from kvmi_host.testing.ssh_server import SshServer


def keypair(path: Path, passphrase: str = "") -> str:
    """The public key, as base64."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", path], check=True)
    return Path(f"{path}.pub").read_text().split()[1]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the keys ``host``, ``client``, ``other``, and ``locked``, which has a passphrase."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("host", "client", "other"):
        keypair(folder / name)
    keypair(folder / "locked", "secret")
    return folder


def public(key: Path) -> str:
    return Path(f"{key}.pub").read_text().split()[1]


@pytest.fixture
def serve(keys: Path) -> Iterator[Callable[[], SshServer]]:
    """Starts a server that lets the key ``client`` in."""
    with ExitStack() as stack:

        def start() -> SshServer:
            key = paramiko.Ed25519Key.from_private_key_file(str(keys / "host"))
            return stack.enter_context(SshServer(key, {public(keys / "client")}))

        yield start


@pytest.fixture
def server(serve: Callable[[], SshServer]) -> SshServer:
    return serve()


@pytest.fixture
def configure(home: Path, keys: Path) -> Callable[..., None]:
    """Writes ~/.ssh/config: names of servers, known by their key, each with lines of its own."""

    def write(servers: dict[str, int], known: str = "host", identity: str = "client", **more: str) -> None:
        config = ["Host *", "HostName 127.0.0.1", f"IdentityFile {keys / identity}", f"UserKnownHostsFile {home}/known"]
        for name, port in servers.items():
            config += [f"Host {name}", f"Port {port}", f"HostKeyAlias {name}", more.get(name, "")]
        (home / ".ssh/config").write_text("\n".join(config))
        lines = [f"{name} ssh-ed25519 {public(keys / known)}" for name in servers]
        (home / "known").write_text("\n".join([*lines, ""]))

    return write


@pytest.fixture
def remote(server: SshServer, configure: Callable[..., None]) -> Iterator[Remote]:
    """A connection."""
    configure({"lab": server.port})
    with connect("lab", deadline=20) as connection:
        yield connection


def test_a_command_is_run_there(remote: Remote) -> None:
    done = remote.run("cat; echo err >&2; exit 3", stdin=b"in")
    assert (done.stdout, done.stderr, done.returncode) == (b"in", b"err\n", 3)


def test_what_does_not_end_is_given_up(remote: Remote) -> None:
    with pytest.raises(RemoteError, match=r"within 0\.2 s"):
        remote.run("hang", deadline=0.2)


def test_what_writes_too_much_is_given_up(remote: Remote) -> None:
    with pytest.raises(RemoteError, match="more than 1000 bytes"):
        remote.run("head -c 100000 /dev/zero", most=1000)


def test_a_connection_that_breaks_is_an_error(remote: Remote) -> None:
    with pytest.raises(RemoteError, match="broke"):
        remote.run("hang up")


def test_a_connection_that_is_closed_is_an_error(remote: Remote) -> None:
    remote.close()
    with pytest.raises(RemoteError, match="closed"):
        remote.run("true")


def test_a_host_whose_key_is_not_known_is_refused(
    server: SshServer, configure: Callable[..., None], home: Path
) -> None:
    configure({"lab": server.port})
    (home / "known").write_text("")
    with pytest.raises(RemoteError, match=r"not known \(ssh-ed25519 SHA256:.*`ssh lab`"):
        connect("lab", deadline=20)
    assert (home / "known").read_text() == ""


def test_a_host_whose_key_has_changed_is_refused(server: SshServer, configure: Callable[..., None]) -> None:
    configure({"lab": server.port}, known="other")
    with pytest.raises(RemoteError, match="HAS CHANGED"):
        connect("lab", deadline=20)


def test_a_key_that_was_revoked_is_refused(server: SshServer, configure: Callable[..., None], home: Path) -> None:
    configure({"lab": server.port})
    known = (home / "known").read_text()
    (home / "known").write_text(f"{known}@revoked * {known.split(maxsplit=1)[1]}")
    with pytest.raises(RemoteError, match="revoked"):
        connect("lab", deadline=20)


def test_known_hosts_that_cannot_be_read_are_an_error(
    server: SshServer, configure: Callable[..., None], home: Path
) -> None:
    configure({"lab": server.port})
    (home / "known").write_text("lab ssh-ed25519 notbase64!\n")
    with pytest.raises(RemoteError, match=r"cannot be read: .*/known"):
        connect("lab", deadline=20)


def test_a_host_that_does_not_take_our_key_is_an_error(server: SshServer, configure: Callable[..., None]) -> None:
    configure({"lab": server.port}, identity="other")
    with pytest.raises(RemoteError, match=r"does not let us in .*other.* ssh-copy-id lab"):
        connect("lab", deadline=20)


def test_a_user_without_keys_is_told_so(server: SshServer, configure: Callable[..., None]) -> None:
    configure({"lab": server.port}, identity="none")
    with pytest.raises(RemoteError, match="does not let us in"):
        connect("lab", deadline=20)


def test_a_key_with_a_passphrase_goes_to_the_agent(server: SshServer, configure: Callable[..., None]) -> None:
    configure({"lab": server.port}, identity="locked")
    with pytest.raises(RemoteError, match=r"locked has a passphrase: ssh-add .*locked"):
        connect("lab", deadline=20)


def test_a_host_that_is_down_is_an_error(configure: Callable[..., None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    configure({"lab": port})
    with pytest.raises(RemoteError, match="connection refused"):
        connect("lab", deadline=20)


def test_a_host_that_says_nothing_is_given_up(configure: Callable[..., None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        configure({"lab": listener.getsockname()[1]})
        with pytest.raises(RemoteError, match=r"no answer within 0\.5 s"):
            connect("lab", deadline=0.5)


def test_a_host_that_is_no_ssh_server_is_an_error(configure: Callable[..., None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        configure({"lab": listener.getsockname()[1]})

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 200)

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(RemoteError, match="no SSH connection"):
            connect("lab", deadline=20)


def test_a_host_that_answers_no_connection_is_given_up(
    configure: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure({"lab": 22})

    def wait(address: object, timeout: float) -> socket.socket:
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", wait)
    with pytest.raises(RemoteError, match="no answer within 7 s"):
        connect("lab", deadline=7)


def test_a_name_without_an_address_is_an_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*arguments: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(RemoteError, match="no address of lab7"):
        connect("lab7")


def test_the_way_leads_through_other_hosts(serve: Callable[[], SshServer], configure: Callable[..., None]) -> None:
    gate, inner, lab = serve(), serve(), serve()
    configure({"gate": gate.port, "inner": inner.port, "lab": lab.port}, lab="ProxyJump gate,inner")
    with connect("lab", deadline=20) as remote:
        assert remote.run("echo there").stdout == b"there\n"
    assert gate.asked_for == [("127.0.0.1", inner.port)]
    assert inner.asked_for == [("127.0.0.1", lab.port)]


def test_a_jump_has_jumps_of_its_own(serve: Callable[[], SshServer], configure: Callable[..., None]) -> None:
    gate, inner, lab = serve(), serve(), serve()
    servers = {"gate": gate.port, "inner": inner.port, "lab": lab.port}
    configure(servers, inner="ProxyJump gate", lab="ProxyJump inner")
    with connect("lab", deadline=20) as remote:
        assert remote.run("echo there").stdout == b"there\n"
    assert gate.asked_for == [("127.0.0.1", inner.port)]


def test_a_jump_whose_key_is_not_known_is_refused(
    serve: Callable[[], SshServer], configure: Callable[..., None], home: Path
) -> None:
    gate, lab = serve(), serve()
    configure({"gate": gate.port, "lab": lab.port}, lab="ProxyJump gate")
    known = (home / "known").read_text()
    (home / "known").write_text("".join(line for line in known.splitlines(True) if line.startswith("lab")))
    with pytest.raises(RemoteError, match="`ssh gate`"):
        connect("lab", deadline=20)


def test_a_jump_that_leads_nowhere_is_an_error(serve: Callable[[], SshServer], configure: Callable[..., None]) -> None:
    gate = serve()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    configure({"gate": gate.port, "lab": port}, lab="ProxyJump gate")
    with pytest.raises(RemoteError, match="the host before it does not lead there"):
        connect("lab", deadline=20)


def test_jumps_in_a_circle_are_refused(serve: Callable[[], SshServer], configure: Callable[..., None]) -> None:
    gate = serve()
    configure({"gate": gate.port, "lab": gate.port}, gate="ProxyJump lab", lab="ProxyJump gate")
    with pytest.raises(RemoteError, match="circle"):
        connect("lab", deadline=20)


def test_a_command_can_be_the_way(server: SshServer, configure: Callable[..., None]) -> None:
    through = "import os, socket, sys, threading; s = socket.create_connection((sys.argv[1], int(sys.argv[2])))"
    through += "; f = lambda: [os.write(1, b) for b in iter(lambda: s.recv(9999), b'')]"
    through += "; threading.Thread(target=f, daemon=True).start()"
    through += "; [s.sendall(b) for b in iter(lambda: os.read(0, 9999), b'')]"
    configure({"lab": server.port}, lab=f'ProxyCommand python3 -c "{through}" %h %p')
    with connect("lab", deadline=20) as remote:
        assert remote.run("echo there").stdout == b"there\n"


def test_a_command_that_fails_is_an_error(configure: Callable[..., None]) -> None:
    configure({"lab": 1}, lab="ProxyCommand false")
    with pytest.raises(RemoteError, match="no SSH connection"):
        connect("lab", deadline=20)
