# SPDX-License-Identifier: LGPL-2.1-or-later
"""Listening for VMs: the handshake, and who may not come in."""

import os
import socket
import stat
from uuid import UUID

import pytest

from kvmi_host.introspect import Listener, SessionError, SessionTimeout
from kvmi_host.introspect.greeting import introduce
from kvmi_host.protocol import HandshakeError, Hello

HELLO = Hello(UUID("00112233-4455-6677-8899-aabbccddeeff"), 1_700_000_000, "webserver")
HELLO_BYTES = bytes.fromhex("60000000 00112233445566778899aabbccddeeff 00000000 00f1536500000000") + b"webserver".ljust(
    64, b"\0"
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "kvmi.sock"


def call(path):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(os.fspath(path))
    return sock


def test_a_vm_that_announces_itself_becomes_a_session(path):
    with Listener(path, b"secret") as listener, call(path) as vm:
        vm.sendall(HELLO_BYTES)
        with listener.accept(5) as session:
            assert session.peer.uuid == HELLO.uuid
            assert (session.peer.name, session.peer.start_time) == ("webserver", 1_700_000_000)
            assert vm.recv(100) == bytes.fromhex("18000000 e5e9fa1ba31ecd1ae84f75caaa474f3a663f05f4")


def test_what_kvm_says_right_behind_the_handshake_is_not_lost(path):
    with Listener(path) as listener, call(path) as vm:
        vm.sendall(HELLO_BYTES + bytes.fromhex("0100 2002 01000000 2002 0000 05 000000") + bytes(536))
        with listener.accept(5) as session:
            assert session.next_event().seq == 1


def test_nobody_connects_in_time(path):
    with Listener(path) as listener, pytest.raises(SessionTimeout, match="no VM announced itself"):
        listener.accept(0.01)


@pytest.mark.parametrize("said", [b"", b"\x60", HELLO_BYTES[:50]])
def test_a_silent_peer_is_dropped_after_the_deadline_and_listening_goes_on(path, said):
    with Listener(path, handshake_timeout=0.05) as listener, call(path) as silent:
        silent.sendall(said)
        with pytest.raises(HandshakeError, match="in time"):
            listener.accept(5)
        assert silent.recv(1) == b""
        with call(path) as vm:
            vm.sendall(HELLO_BYTES)
            listener.accept(5).close()


@pytest.mark.parametrize("said", [b"", b"\x60", HELLO_BYTES[:50]])
def test_a_peer_that_hangs_up_early_is_an_error(path, said):
    with Listener(path) as listener:
        with call(path) as vm:
            vm.sendall(said)
        with pytest.raises(HandshakeError, match="hung up"):
            listener.accept(5)


def test_a_peer_that_speaks_something_else_is_dropped(path):
    with Listener(path) as listener, call(path) as browser:
        browser.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(HandshakeError, match="does not speak"):
            listener.accept(5)


def test_a_user_who_may_not_is_dropped(path):
    refused = pytest.raises(HandshakeError, match=f"user {os.geteuid()} may not")
    with Listener(path, users=[os.geteuid() + 1]) as listener, call(path), refused:
        listener.accept(5)


def test_only_the_owner_can_connect(path):
    with Listener(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_directory_that_others_can_write_to_is_refused(path):
    path.parent.chmod(0o777)
    with pytest.raises(SessionError, match="others can write"):
        Listener(path)


def test_a_directory_that_is_not_there_is_an_error(path):
    with pytest.raises(SessionError, match="No such file"):
        Listener(path.parent / "nowhere" / "kvmi.sock")


def test_a_second_listener_is_refused(path):
    with Listener(path), pytest.raises(SessionError, match="someone listens"):
        Listener(path)


def test_the_socket_of_a_listener_that_is_gone_is_replaced(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as gone:
        gone.bind(os.fspath(path))
    with Listener(path):
        pass
    assert not path.exists()


# -- the other side of the handshake


def test_the_vms_side_says_who_it_is_and_checks_the_cookie():
    vm, introspector = socket.socketpair()
    with vm, introspector:
        introspector.sendall(bytes.fromhex("18000000 e5e9fa1ba31ecd1ae84f75caaa474f3a663f05f4"))
        introduce(vm, HELLO, b"secret", 1)
        assert introspector.recv(200) == HELLO_BYTES


def test_the_vms_side_refuses_a_wrong_cookie():
    vm, introspector = socket.socketpair()
    with vm, introspector:
        introspector.sendall(bytes.fromhex("18000000") + bytes(20))
        with pytest.raises(HandshakeError, match="wrong cookie"):
            introduce(vm, HELLO, b"secret", 1)


def test_the_vms_side_gives_up_on_a_silent_introspector():
    vm, introspector = socket.socketpair()
    with vm, introspector, pytest.raises(HandshakeError, match="in time"):
        introduce(vm, HELLO, None, 0.01)
