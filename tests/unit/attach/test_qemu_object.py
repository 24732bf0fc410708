# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attaching through QEMU's object, with a QEMU whose monitor, object and kernel are simulated."""

import asyncio
import os
import socket
from pathlib import Path
from threading import Thread
from uuid import UUID

import pytest

from kvmi_host import aio
from kvmi_host.attach import (
    FULL,
    OBSERVE,
    AlreadyHooked,
    AttachError,
    AttachRefused,
    MonitorRefused,
    NotHooked,
    Target,
    attach,
    detach,
    hand_over,
    monitor,
    qemu_object,
    run_with_session,
    session,
)
from kvmi_host.host import HostError
from kvmi_host.introspect import Listener, SessionClosed
from kvmi_host.protocol import HandshakeError
from kvmi_host.testing import qemu as qemu_peer
from kvmi_host.testing.qemu import SimulatedQemu

WEBSERVER = Target(os.getpid(), "webserver", UUID(int=7), 1_700_000_000)
VERSIONS = [(2, 11, 93), (4, 2, 1), (7, 2, 0)]  # KVM-VMI's, and one that takes object-add's arguments the new way


@pytest.fixture
def qemu(tmp_path, monkeypatch):
    """This process, as if it were that QEMU."""
    monkeypatch.setattr(qemu_object, "_RUN", tmp_path / "run")
    monkeypatch.setattr(qemu_object, "_SETTLED", 0.2)
    monkeypatch.setattr(session, "find_target", lambda vm, uri, wait: WEBSERVER)
    path = os.fspath(tmp_path / "qmp.sock")
    monkeypatch.setattr(monitor, "command_line", lambda pid: ["-qmp", f"unix:{path},server=on"])
    with SimulatedQemu(path) as simulated:
        yield simulated


def nothing_is_left(qemu):
    return not (qemu.chardevs or qemu.secrets or qemu.objects)


def by_object(**settings):
    return attach("webserver", method="qemu-object", **{"allow": "full", **settings})


@pytest.mark.parametrize("version", VERSIONS)
def test_attaching_gives_a_session_and_its_facts(qemu, version):
    qemu.version = version
    with by_object() as vm:
        assert (vm.facts.method, vm.facts.dialect, vm.facts.vcpus) == ("qemu-object", "v6", 2)
        assert (vm.peer.name, vm.peer.uuid) == ("webserver", UUID(int=7))


def test_the_object_has_a_secret_of_its_own_each_time(qemu):
    cookies = []
    for _ in range(2):
        with by_object():
            cookies += qemu.secrets.values()
    assert len(set(cookies)) == 2
    assert all(len(cookie) >= 32 and cookie.isascii() for cookie in cookies)


def test_closing_leaves_nothing_in_qemu(qemu):
    by_object().close()
    assert nothing_is_left(qemu)
    assert not list((qemu_object._RUN).iterdir())


def test_while_attached_nobody_else_can_connect_to_our_socket(qemu):
    with by_object():
        assert not list((qemu_object._RUN).iterdir())


def test_asyncio_leaves_nothing_in_qemu_either(qemu):
    async def look():
        async with await aio.attach("webserver", allow="full", method="qemu-object") as vm:
            return (await vm.facts).method

    assert asyncio.run(look()) == "qemu-object"
    assert nothing_is_left(qemu)


def test_a_program_gets_the_session_and_nothing_is_left(qemu):
    command = ["/bin/sh", "-c", 'test "$LISTEN_FDNAMES" = kvmi && test -S /proc/self/fd/3 && exit 5']
    assert run_with_session(WEBSERVER, command, FULL, method="qemu-object") == 5
    assert nothing_is_left(qemu)


@pytest.mark.parametrize("allow", ["observe", "get-registers", ["event:cr"]])
def test_a_policy_is_refused_because_qemu_cannot_enforce_it(qemu, allow):
    with pytest.raises(AttachRefused, match="--allow full"):
        by_object(allow=allow)
    assert qemu.commands == []


def test_a_stock_qemu_is_refused_and_left_as_it_was(qemu):
    qemu.knows_object, qemu.version = False, (7, 2, 22)
    with pytest.raises(HostError, match=r"QEMU 7\.2\.22 has no 'introspection' object"):
        by_object()
    assert {command for command in qemu.commands if "add" in command} == set()


@pytest.mark.parametrize("command", ["qom-list-types", "qom-list", "query-version"])
@pytest.mark.parametrize("nonsense", [None, 1, "x", [1], {"qemu": {}}])
def test_a_monitor_that_returns_nonsense_is_an_error_and_nothing_is_left(qemu, monkeypatch, command, nonsense):
    original = qemu._execute
    monkeypatch.setattr(
        qemu, "_execute", lambda name, arguments: nonsense if name == command else original(name, arguments)
    )
    with pytest.raises(AttachError, match="what QMP does not know"):
        by_object()
    assert nothing_is_left(qemu)


STEPS = [
    "chardev-add kvmi-host-socket",
    "object-add kvmi-host-cookie",
    "object-add kvmi-host-session",
]


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_qemu_refuses_undoes_those_before_it(qemu, step):
    qemu.refuse[step] = "no more of these"
    with pytest.raises(MonitorRefused, match="no more of these"):
        by_object()
    assert nothing_is_left(qemu)


def test_a_qemu_that_does_not_connect_is_told_apart_and_nothing_is_left(qemu, monkeypatch):
    elsewhere = os.fspath(qemu_object._RUN.parent / "elsewhere.sock")
    original = qemu._chardev_add

    def misled(id, backend):  # noqa: A002 - QMP's name
        backend["data"]["addr"]["data"]["path"] = elsewhere
        return original(id, backend)

    monkeypatch.setattr(qemu, "_chardev_add", misled)
    with pytest.raises(AttachRefused, match="did not connect to"):
        qemu_object.connect_object(WEBSERVER, timeout=0.1)
    assert nothing_is_left(qemu)


@pytest.fixture
def proc(tmp_path, monkeypatch):
    """What the kernel shows of this process."""
    process = tmp_path / "proc" / str(os.getpid())
    (process / "attr").mkdir(parents=True)
    (process / "status").write_text(f"Name:\tqemu\nUid:\t0\t{os.geteuid()}\t0\t0\n")
    monkeypatch.setattr(qemu_object, "_PROC", process.parent)
    return process


@pytest.mark.parametrize(("label", "advice"), [("libvirt-1234 (enforce)\n", True), ("unconfined\n", False)])
def test_a_qemu_that_apparmor_confines_is_told_what_to_allow(qemu, proc, socket_path, label, advice):
    (proc / "attr/current").write_text(label)
    with pytest.raises(AttachError) as refused:
        hand_over(WEBSERVER, socket_path, FULL, method="qemu-object", timeout=0.1)
    assert (f"{socket_path} rw," in str(refused.value)) is advice


@pytest.fixture
def of_another_user(proc, monkeypatch):
    """QEMU runs as user 64055; whom sockets were given to."""
    (proc / "status").write_text("Name:\tqemu\nUid:\t64055\t64055\t64055\t64055\n")
    given = []
    monkeypatch.setattr(os, "chown", lambda path, user, group: given.append((path, user, group)))
    return given


def test_our_socket_is_for_qemus_user_alone(qemu, of_another_user):
    with qemu_object._listening_for(WEBSERVER) as (path, _):
        assert of_another_user == [(Path(path), 64055, -1)]
        assert os.stat(path).st_mode & 0o777 == 0o600


def test_who_may_not_give_a_socket_away_is_told_to_be_root(qemu, of_another_user, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(AttachRefused, match="run as root"):
        qemu_object.connect_object(WEBSERVER)


def test_a_user_who_is_not_qemus_is_refused(qemu, of_another_user):
    with pytest.raises(HandshakeError, match="may not connect"):
        qemu_object.connect_object(WEBSERVER)
    assert nothing_is_left(qemu)


def test_a_peer_that_is_not_that_qemu_is_refused(qemu):
    another = Target(os.getppid(), "webserver", UUID(int=7), 0)
    with pytest.raises(AttachError, match=f"process {os.getpid()} connected"):
        qemu_object.connect_object(another)
    assert nothing_is_left(qemu)


def test_a_vm_that_is_introspected_is_refused_and_says_where(qemu):
    with by_object() as vm:
        with pytest.raises(AlreadyHooked, match=r"over 'unix:.*\.sock': detach first"):
            by_object()
        assert vm.session.guest_info() == 2


def test_a_vm_whose_qemu_was_started_with_an_object_is_refused_and_says_where(qemu, tmp_path):
    qemu._execute("chardev-add", {"id": "own", "backend": _backend(tmp_path / "introspector.sock")})
    qemu._execute("object-add", {"qom-type": "introspection", "id": "kvmi", "props": {"chardev": "own"}})
    with pytest.raises(AlreadyHooked, match=r"\(kvmi\): it connects to 'unix:.*introspector\.sock"):
        by_object()


def test_what_a_killed_introspector_left_is_replaced(qemu, tmp_path):
    qemu._execute("chardev-add", {"id": qemu_object.CHARDEV, "backend": _backend(tmp_path / "gone.sock")})
    properties = {"chardev": qemu_object.CHARDEV}
    qemu._execute("object-add", {"qom-type": "introspection", "id": qemu_object.OBJECT, "props": properties})
    with by_object() as vm:
        assert vm.session.guest_info() == 2
    assert nothing_is_left(qemu)


def _backend(path):
    address = {"type": "unix", "data": {"path": os.fspath(path)}}
    return {"type": "socket", "data": {"addr": address, "server": False, "reconnect": 10}}


# -- an introspector that listens


@pytest.fixture
def socket_path(tmp_path):
    return os.fspath(tmp_path / "introspector.sock")


def handing(path, **settings):
    thread = Thread(target=hand_over, args=(WEBSERVER, path, FULL), kwargs={"method": "qemu-object", **settings})
    thread.start()
    return thread


@pytest.mark.parametrize("cookie", [None, b"secret"])
def test_an_introspector_that_listens_gets_the_session_from_qemu(qemu, socket_path, cookie):
    with Listener(socket_path, cookie) as listener:
        thread = handing(socket_path, cookie=cookie)
        with listener.accept(10) as given:
            thread.join(10)
            assert (given.peer.name, given.peer.uuid, given.peer.start_time) == (
                "webserver",
                UUID(int=7),
                1_700_000_000,
            )
            assert given.guest_info() == 2
    assert list(qemu.secrets.values()) == ([cookie] if cookie else [])


def test_an_introspector_that_comes_back_gets_another_session(qemu, socket_path):
    qemu.reconnect = 0.01
    with Listener(socket_path) as listener:
        thread = handing(socket_path)
        with listener.accept(10):
            thread.join(10)
            first = qemu.introspection.await_session()
        with listener.accept(10) as second:
            qemu.introspection.await_session(after=first)
            assert second.guest_info() == 2


def test_an_introspector_with_another_secret_is_dropped_and_nothing_is_left(qemu, socket_path):
    with Listener(socket_path, b"other") as listener:
        accepting = Thread(target=lambda: listener.accept(10).close())
        accepting.start()
        with pytest.raises(AttachError, match="its cookie is wrong"):
            hand_over(WEBSERVER, socket_path, FULL, cookie=b"secret", method="qemu-object", timeout=0.5)
        accepting.join(10)
    assert nothing_is_left(qemu)


def test_nobody_listens(qemu, socket_path):
    with pytest.raises(AttachError, match="nobody listens there"):
        hand_over(WEBSERVER, socket_path, FULL, method="qemu-object", timeout=0.1)
    assert nothing_is_left(qemu)


def test_an_introspector_that_is_silent_is_dropped_by_qemu(qemu, socket_path):
    qemu.handshake_timeout = 0.05
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(socket_path)
        silent.listen()
        qemu._execute("chardev-add", {"id": "own", "backend": _backend(socket_path)})
        qemu._execute("object-add", {"qom-type": "introspection", "id": "kvmi", "props": {"chardev": "own"}})
        assert "in time" in qemu.introspection.await_drop()


# -- detaching


def test_detaching_asks_the_introspector_and_removes_everything(qemu, socket_path):
    with Listener(socket_path) as listener:
        thread = handing(socket_path)
        with listener.accept(10) as given:
            thread.join(10)
            given.control_vm_events(0, True)

            def obey():
                assert given.next_event(10).event == 0
                given.close()

            obeying = Thread(target=obey)
            obeying.start()
            assert detach(WEBSERVER, 10, "qemu-object") is True
            obeying.join(10)
    assert nothing_is_left(qemu)


def test_an_introspector_that_stays_keeps_the_session(qemu):
    with by_object() as vm:
        with pytest.raises(AttachError, match="has not closed the session"):
            detach(WEBSERVER, 0.1, "qemu-object")
        assert vm.session.guest_info() == 2


def test_detaching_a_vm_that_nobody_introspects_is_an_error(qemu):
    with pytest.raises(NotHooked):
        detach(WEBSERVER, 1, "qemu-object")


def test_closing_after_someone_detached_is_no_error(qemu):
    vm = by_object()
    vm.session.close()
    detach(WEBSERVER, 10, "qemu-object")
    vm.close()
    assert nothing_is_left(qemu)


def test_closing_after_qemu_has_ended_is_no_error(qemu):
    vm = by_object()
    qemu.end()
    with pytest.raises(SessionClosed):
        vm.session.guest_info()
    vm.close()


def test_an_object_that_hangs_up_in_the_handshake_leaves_nothing(qemu, monkeypatch):
    monkeypatch.setattr(qemu_peer, "introduce", lambda *_: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(HandshakeError, match="hung up"):
        by_object()
    assert nothing_is_left(qemu)


def test_observe_is_no_policy_for_an_introspector_that_listens_either(qemu, socket_path):
    with pytest.raises(AttachRefused, match="--allow full"):
        hand_over(WEBSERVER, socket_path, OBSERVE, method="qemu-object")
