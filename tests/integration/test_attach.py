# SPDX-License-Identifier: LGPL-2.1-or-later
"""``kvmi-host attach`` through QEMU's object: with a real stock QEMU up to where it refuses, and end to end with a QEMU
whose object and kernel are simulated, and an introspector that knows nothing but the interface."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest

from kvmi_host.attach import AttachRefused, MonitorRefused, attach, find_target, qemu_object
from kvmi_host.attach.monitor import open_monitor
from kvmi_host.protocol import Command
from kvmi_host.testing import introspector
from kvmi_host.testing.qemu import SimulatedQemu

pytestmark = pytest.mark.integration

DEADLINE = 60.0
VM_UUID = UUID("6695eb01-f6a4-8304-79aa-97f2502e193f")


class Program:
    """A program whose output is read line by line."""

    def __init__(self, *words, **settings):
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings
        )

    def line(self):
        return self.process.stdout.readline().strip()

    def object(self):
        return json.loads(self.line())

    def finish(self):
        """Its exit status, and what it says on standard error."""
        errors = self.process.communicate(timeout=DEADLINE)[1]
        return self.process.returncode, errors

    def kill(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def run():
    """Starts programs, which end with the test."""
    programs = []

    def start(*words, **settings):
        programs.append(Program(*words, **settings))
        return programs[-1]

    yield start
    for program in programs:
        program.kill()


@pytest.fixture
def kvmi_host(run):
    """Starts the command."""
    return lambda *words: run(sys.executable, "-m", "kvmi_host.cli", *words)


# -- a real stock QEMU


@pytest.fixture
def stock(run, tmp_path):
    """A running stock QEMU with a monitor, as attach finds it."""
    path = os.fspath(tmp_path / "qmp.sock")
    with socket.socket(socket.AF_UNIX) as listening:
        # It listens before QEMU runs: nobody has to wait for it.
        listening.bind(path)
        listening.listen()
        chardev = f"socket,id=m,fd={listening.fileno()},server=on,wait=off"
        words = ["qemu-system-x86_64", "-M", "none", "-display", "none", "-name", "web", "-uuid", str(VM_UUID)]
        monitor = ["-chardev", chardev, "-mon", "chardev=m,mode=control"]
        program = run(*words, *monitor, pass_fds=[listening.fileno()])
    target = find_target(f"pid:{program.process.pid}")
    # What names the socket on its command line.
    return target, ["-qmp", f"unix:{path},server=on"]


@pytest.fixture
def monitor(stock, monkeypatch):
    from kvmi_host.attach import monitor

    target, words = stock
    monkeypatch.setattr(monitor, "command_line", lambda pid: words)
    with open_monitor(target) as opened:
        yield opened


def inventory(monitor):
    """The character devices and objects that QEMU has."""
    chardevs = sorted(chardev["label"] for chardev in monitor.execute("query-chardev"))
    try:
        children = monitor.execute("qom-list", {"path": "/objects"})
    except MonitorRefused:
        children = []  # there has never been one
    return chardevs, [child for child in children if child["type"].startswith("child<")]


@pytest.mark.parametrize("cookie", [None, b"secret"])
def test_stock_qemu_takes_every_step_but_the_object_and_all_is_undone(monitor, tmp_path, cookie):
    before, taken = inventory(monitor), []

    class Noting:
        def execute(self, command, arguments=None):
            result = monitor.execute(command, arguments)
            taken.append((command, (arguments or {}).get("id")))
            return result

    path = os.fspath(tmp_path / "introspector.sock")
    with pytest.raises(MonitorRefused, match="introspection"), qemu_object._added(Noting(), path, cookie):
        pass
    secret = [("object-add", qemu_object.SECRET)], [("object-del", qemu_object.SECRET)]
    added, deleted = secret if cookie else ([], [])
    socket_id = qemu_object.CHARDEV
    assert taken[1:] == [("chardev-add", socket_id), *added, *deleted, ("chardev-remove", socket_id)]
    assert inventory(monitor) == before


def test_stock_qemu_is_refused_before_anything_is_made(stock, monkeypatch):
    from kvmi_host.attach import monitor

    target, words = stock
    monkeypatch.setattr(monitor, "command_line", lambda pid: words)
    with pytest.raises(AttachRefused, match=r"QEMU \d+\.\d+\.\d+ has no 'introspection' object"):
        attach(f"pid:{target.pid}", method="qemu-object", allow="full")


def test_a_simulated_qemu_refuses_in_stock_qemus_words(monitor, tmp_path):
    path = tmp_path / "simulated.sock"
    simulated = SimulatedQemu(os.fspath(path), version=(7, 2, 22), knows_object=False)
    address = {"type": "unix", "data": {"path": "/nowhere"}}
    backend = {"type": "socket", "data": {"addr": address, "server": False, "reconnect": 10}}
    secret = {"qom-type": "secret", "id": "s", "data": "eA==", "format": "base64"}
    script = [
        ("qom-list", {"path": "/objects"}),
        ("chardev-add", {"id": "c", "backend": backend}),
        ("chardev-add", {"id": "c", "backend": backend}),
        ("object-add", secret),
        ("object-add", secret),
        ("object-add", {"qom-type": "secret", "id": "t", "props": {}}),
        ("object-add", {"qom-type": "introspection", "id": "i", "chardev": "c"}),
        ("qom-list", {"path": "/objects"}),
        ("object-del", {"id": "s"}),
        ("qom-list", {"path": "/objects"}),
        ("object-del", {"id": "s"}),
        ("chardev-remove", {"id": "c"}),
        ("chardev-remove", {"id": "c"}),
        ("nonsense", {}),
    ]

    def said(monitor):
        for command, arguments in script:
            try:
                yield monitor.execute(command, arguments)
            except MonitorRefused as refused:
                yield refused.kind, refused.description

    from kvmi_host.attach.qmp import QmpMonitor

    with simulated:
        other = QmpMonitor(simulated.path)
        try:
            assert list(said(other)) == list(said(monitor))
        finally:
            other.close()


# -- KVM-VMI's QEMU, simulated; everything else is real


@pytest.fixture
def qemu(run, tmp_path):
    """A process that is such a QEMU; as attach names it."""
    words = ["-name", "guest=web", "-uuid", str(VM_UUID), "-qmp", f"unix:{tmp_path}/qmp.sock,server=on"]
    program = run(sys.executable, "-m", "kvmi_host.testing.qemu", *words)
    assert program.line() == "ready"
    return f"pid:{program.process.pid}"


FULL = ("--method", "qemu-object", "--allow", "full")


@contextmanager
def nothing_left_in(qemu):
    with open_monitor(find_target(qemu)) as monitor:
        before = inventory(monitor)
    yield
    with open_monitor(find_target(qemu)) as monitor:
        assert inventory(monitor) == before


def test_the_built_in_agent_is_attached_and_leaves_nothing(kvmi_host, qemu):
    with nothing_left_in(qemu):
        program = kvmi_host("attach", qemu, *FULL, "--events", "hypercall", "--duration", "0", "--json")
        shown = program.object()["session"]
        assert program.finish() == (0, "")
    assert (shown["name"], shown["uuid"], shown["method"]) == ("web", str(VM_UUID), "qemu-object")


def test_detach_from_another_terminal_ends_the_built_in_agent(kvmi_host, qemu):
    with nothing_left_in(qemu):
        agent = kvmi_host("attach", qemu, *FULL, "--json")
        assert "session" in agent.object()
        assert kvmi_host("detach", qemu, "--method", "qemu-object", "--timeout", "30").finish() == (0, "")
        assert agent.object()["event"] == "unhook"
        assert agent.object()["summary"]["ended"] == "unhook"
        assert agent.finish() == (0, "")


def test_attaching_twice_is_refused_and_says_what_to_do(kvmi_host, qemu):
    agent = kvmi_host("attach", qemu, *FULL, "--json")
    assert "session" in agent.object()
    status, said = kvmi_host("attach", qemu, *FULL, "--json").finish()
    assert status == 1
    assert "detach first" in said
    agent.process.send_signal(signal.SIGINT)
    assert agent.finish()[0] == 0


@pytest.fixture
def listening(run, tmp_path):
    """Starts the introspector that knows nothing but the interface; it listens."""

    def start(*cookie):
        path = os.fspath(tmp_path / "introspector.sock")
        program = run(sys.executable, introspector.__file__, "listen", path, *cookie)
        assert program.object() == {"listening": path}
        return path, program

    return start


@pytest.fixture
def cookie_file(tmp_path):
    file = tmp_path / "cookie"
    file.write_bytes(b"secret")
    return os.fspath(file)


def test_an_introspector_that_listens_gets_the_session_until_detach(kvmi_host, qemu, listening, cookie_file):
    with nothing_left_in(qemu):
        path, program = listening("secret")
        assert kvmi_host("attach", qemu, *FULL, "--to", path, "--cookie-file", cookie_file).finish() == (0, "")
        said = program.object()
        assert (said["struct_size"], said["uuid"], said["name"]) == (96, VM_UUID.hex, "web")
        assert program.object() == {"error": 0, "version": 1}
        assert kvmi_host("detach", qemu, "--method", "qemu-object", "--timeout", "30").finish() == (0, "")
        assert [program.object(), program.object()] == [{"unhook": True}, {"closed": True}]


def test_a_program_gets_the_session_and_its_exit_status_is_passed_on(kvmi_host, qemu):
    with nothing_left_in(qemu):
        words = ("--exec", "--", sys.executable, introspector.__file__, "fd")
        program = kvmi_host("attach", qemu, *FULL, *words)
        assert program.object() == {"names": "kvmi"}
        assert program.object() == {"error": 0, "version": 1}
        assert kvmi_host("detach", qemu, "--method", "qemu-object", "--timeout", "30").finish() == (0, "")
        assert [program.object(), program.object()] == [{"unhook": True}, {"closed": True}]
        assert program.finish() == (0, "")


def test_a_signal_is_passed_on_to_the_program(kvmi_host, qemu):
    with nothing_left_in(qemu):
        code = "import signal, sys; signal.signal(15, lambda *_: sys.exit(7)); print(1, flush=True); signal.pause()"
        program = kvmi_host("attach", qemu, *FULL, "--exec", "--", sys.executable, "-c", code)
        assert program.line() == "1"
        program.process.send_signal(signal.SIGTERM)
        assert program.finish()[0] == 7


def test_a_program_that_a_signal_ended_is_128_and_its_number(kvmi_host, qemu):
    code = "import os; os.kill(os.getpid(), 9)"
    program = kvmi_host("attach", qemu, *FULL, "--exec", "--", sys.executable, "-c", code)
    assert program.finish()[0] == 128 + signal.SIGKILL


def test_the_interfaces_numbers_are_ours():
    ours = (Command.EVENT, Command.GET_VERSION, Command.CONTROL_VM_EVENTS)
    assert ours == (introspector.EVENT, introspector.GET_VERSION, introspector.CONTROL_VM_EVENTS)
    assert "import kvmi_host" not in Path(introspector.__file__).read_text()
