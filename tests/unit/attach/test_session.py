# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attaching, handing over and detaching, with the kernel simulated behind a real descriptor."""

import errno
import os
import signal
import socket
import sys
from threading import Event, Thread
from time import monotonic

import pytest

from kvmi_host.attach import (
    FULL,
    AlreadyHooked,
    AttachError,
    NotHooked,
    PolicyRefused,
    attach,
    detach,
    find_target,
    hand_over,
    handover,
    run_with_session,
)
from kvmi_host.introspect import Listener, SessionClosed
from kvmi_host.protocol import HandshakeError


@pytest.fixture
def vm():
    return f"pid:{os.getpid()}"


def test_attaching_gives_a_session_and_its_facts(simulated_vm, vm):
    with attach(vm) as attached:
        facts = attached.facts
        assert (facts.version, facts.dialect, facts.vcpus, facts.method) == (1, "v6", 2, "vm-fd")
        assert "read-physical" in facts.commands
        assert "cr" in facts.events
        assert attached.session.peer.pid == os.getpid()
        assert attached.session.guest_info() == 2


def test_observing_is_the_default(simulated_vm, vm):
    with attach(vm) as attached:
        assert not {"set-registers", "write-physical"} & set(attached.facts.commands)
    assert [call[0] for call in simulated_vm.calls] == ["hook", "allow_command", "allow_event"]
    assert simulated_vm.calls[0][2] is True
    assert simulated_vm.calls[1:] == [("allow_command", -1), ("allow_event", -1)]


def test_a_full_session_can_change_the_guest(simulated_vm, vm):
    with attach(vm, allow="full") as attached:
        attached.session.write_physical(0, b"x")
    assert simulated_vm.calls[0][2] is False


def test_a_list_is_what_is_allowed(simulated_vm, vm):
    attach(vm, allow="get-max-gfn,event:cr").close()
    assert simulated_vm.calls[1:] == [("allow_command", 29), ("allow_event", 1)]


def test_a_policy_file_is_what_is_allowed(simulated_vm, vm, tmp_path):
    file = tmp_path / "web.toml"
    file.write_text('commands = ["get-max-gfn"]\nevents = ["cr"]')
    with attach(vm, policy=file) as attached:
        assert attached.session.peer.policy == str(file)
    assert simulated_vm.calls[0][2] is True
    assert simulated_vm.calls[1:] == [("allow_command", 29), ("allow_event", 1)]


def test_what_a_policy_file_does_not_allow_is_not_attached_with(simulated_vm, vm, tmp_path):
    file = tmp_path / "web.toml"
    file.touch()
    with pytest.raises(PolicyRefused):
        attach(vm, allow="full", policy=file)
    assert simulated_vm.calls == []


@pytest.mark.parametrize(("allow", "name"), [(None, "observe"), ("full", "full"), ("get-max-gfn", "list")])
def test_the_session_says_what_its_policy_is(simulated_vm, vm, allow, name):
    with attach(vm, allow=allow) as attached:
        assert attached.facts.policy == name


def test_attaching_leaves_no_descriptor_of_the_vm_behind(simulated_vm, vm):
    with attach(vm):
        links = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.islink(entry.path)]
    assert links.count("anon_inode:[eventfd]") == 1


def test_closing_ends_the_session(simulated_vm, vm):
    attached = attach(vm)
    attached.close()
    assert simulated_vm.kernel.wait_ended() == "the introspector closed"
    with pytest.raises(SessionClosed):
        attached.session.guest_info()


def test_a_vm_that_is_hooked_is_refused(simulated_vm, vm):
    simulated_vm.refuse["hook"] = errno.EEXIST
    with pytest.raises(AlreadyHooked):
        attach(vm)


def test_an_introspector_that_listens_gets_the_session(simulated_vm, vm, tmp_path):
    path = tmp_path / "kvmi.sock"
    target = find_target(vm)
    with Listener(path, b"secret") as listener:
        handing = Thread(target=hand_over, args=(target, os.fspath(path), FULL), kwargs={"cookie": b"secret"})
        handing.start()
        with listener.accept(5) as session:
            handing.join(5)
            assert session.peer.uuid == target.uuid
            assert session.peer.name == target.name
            assert session.guest_info() == 2


def test_an_introspector_with_another_secret_gets_nothing(simulated_vm, vm, tmp_path):
    path = tmp_path / "kvmi.sock"
    with Listener(path, b"other") as listener:
        accepting = Thread(target=lambda: listener.accept(5).close())
        accepting.start()
        with pytest.raises(HandshakeError, match="wrong cookie"):
            hand_over(find_target(vm), os.fspath(path), FULL, cookie=b"secret")
        accepting.join(5)
    assert simulated_vm.calls == []


def test_an_introspector_that_is_silent_gets_nothing(simulated_vm, vm, tmp_path):
    path = os.fspath(tmp_path / "silent.sock")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(path)
        silent.listen()
        with pytest.raises(HandshakeError, match="in time"):
            hand_over(find_target(vm), path, FULL, timeout=0.05)
    assert simulated_vm.calls == []


def test_a_hooked_vm_is_refused_before_the_introspector_is_told(simulated_vm, vm, tmp_path):
    with attach(vm), pytest.raises(AlreadyHooked, match="detach first"):
        hand_over(find_target(vm), os.fspath(tmp_path / "none.sock"), FULL)


def test_nobody_listens(simulated_vm, vm, tmp_path):
    with pytest.raises(AttachError, match="no introspector listens"):
        hand_over(find_target(vm), os.fspath(tmp_path / "none.sock"), FULL)


CHILD = """
import os, socket, sys
environment = [os.environ[name] for name in ("LISTEN_FDS", "LISTEN_FDNAMES")]
assert environment == ["1", "kvmi"], environment
assert os.environ["LISTEN_PID"] == str(os.getpid())
kvm = socket.socket(fileno=3)
kvm.sendall(bytes.fromhex("0200 0000 01000000"))
assert kvm.recv(100) == bytes.fromhex("0200 1000 01000000 00000000 00000000 01000000 00000000")
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("status", [0, 5])
def test_a_program_gets_the_session_as_in_socket_activation(simulated_vm, vm, status):
    assert run_with_session(find_target(vm), [sys.executable, "-c", CHILD, str(status)], FULL) == status


def test_a_program_that_is_not_there_is_127(simulated_vm, vm, capfd):
    assert run_with_session(find_target(vm), ["no-such-program"], FULL) == 127
    assert "no-such-program: No such file" in capfd.readouterr().err


def test_the_end_of_a_program_is_seen_when_another_thread_was_told_of_it(simulated_vm, vm, monkeypatch):
    wait_for = handover._wait_for

    def late(child):
        """Wait when SIGCHLD has come and gone."""
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        deadline = monotonic() + 60
        while signal.SIGCHLD in signal.sigpending():
            assert monotonic() < deadline
        return wait_for(child)

    monkeypatch.setattr(handover, "_wait_for", late)
    over = Event()
    other = Thread(target=over.wait)  # blocks no signal
    other.start()
    try:
        assert run_with_session(find_target(vm), ["true"], FULL) == 0
    finally:
        over.set()
        other.join()


def test_detaching_asks_first(simulated_vm, vm):
    attached = attach(vm)
    simulated_vm.when_asked = attached.close
    assert detach(find_target(vm)) is True
    assert ("unhook_force",) not in simulated_vm.calls


def test_detaching_insists_when_nobody_cleans_up(simulated_vm, vm):
    with attach(vm):
        assert detach(find_target(vm), timeout=0) is False
        assert simulated_vm.kernel.wait_ended() == "unhooked"


def test_detaching_insists_at_once_when_the_introspector_does_not_listen_to_it(simulated_vm, vm):
    simulated_vm.refuse["unhook"] = errno.ENOENT
    with attach(vm):
        assert detach(find_target(vm), timeout=60) is False


def test_detaching_a_vm_that_nobody_introspects_is_an_error(simulated_vm, vm):
    simulated_vm.refuse["unhook"] = errno.EFAULT
    with pytest.raises(NotHooked):
        detach(find_target(vm))
