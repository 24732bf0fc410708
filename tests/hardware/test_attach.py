# SPDX-License-Identifier: LGPL-2.1-or-later
"""``kvmi-host attach`` and ``detach`` with live VMs: what introspectors of others are told, what is refused and left
behind, and that the VM goes on as if nothing happened."""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any
from uuid import UUID

import pytest

from kvmi_host.attach import MonitorRefused, attach, detach, find_target, qemu_object
from kvmi_host.attach.monitor import Monitor, open_monitor
from kvmi_host.provision import Guest, connect, define, destroy, find_image, start
from kvmi_host.testing import introspector, vmm
from kvmi_host.testing.live import DEADLINE, LiveGuest, SharedGuests, hook

pytestmark = pytest.mark.hardware


# -- the VM is neither stopped nor slowed: first, as long as no other guest of this file runs

LOAD, RECORD = 0x100000, 0x200000
_MULTIBOOT = 0x1BADB002
_ADDRESSES = 0x10000  # the header says where the image goes
_LOOP = bytes.fromhex(
    "0fa2"  # cpuid: an exit, for an emulated CPU that cannot be interrupted without
    "0f31 89c1 29f1 89c6"  # rdtsc; ecx: since the last time round; esi: now
    "3b0f 7602 890f"  # the record keeps the largest
    "ff4704 ebeb"  # and counts
)
_BEGIN = b"\xbf" + struct.pack("<I", RECORD) + bytes.fromhex("0f31 89c6")


@pytest.fixture
def clock(tmp_path: Path, shared: SharedGuests) -> Iterator[tuple[LiveGuest, mmap.mmap]]:
    """A guest that looks at its clock all the time, and its memory, which nobody needs to stop it for.

    At RECORD: the largest difference of two looks, in ticks of its TSC, then how many there were.
    """
    shared.stand_aside()
    header = struct.pack("<3I", _MULTIBOOT, _ADDRESSES, -(_MULTIBOOT + _ADDRESSES) & 0xFFFFFFFF)
    code = _BEGIN + _LOOP
    end = LOAD + 32 + len(code)
    image = tmp_path / "clock"
    image.write_bytes(header + struct.pack("<5I", LOAD, LOAD, end, end, LOAD + 32) + code)
    ram = tmp_path / "ram"
    backend = f"memory-backend-file,id=ram,size=32M,share=on,mem-path={ram}"
    with LiveGuest(1, str(image), options=["-object", backend, "-machine", "memory-backend=ram"]) as guest:
        guest.monitor.command("query-status")
        with ram.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            deadline = monotonic() + DEADLINE
            while not _looks(memory):
                assert monotonic() < deadline, "the guest does not run"
            yield guest, memory


def _looks(memory: mmap.mmap) -> int:
    return _counter(memory[RECORD + 4 : RECORD + 8])


def _counter(data: bytes) -> int:
    return int.from_bytes(data, "little")


ROUNDS = 8
FACTOR = 4
"""Between two medians of few gaps, each of which is a turn of the scheduler more or less."""


def test_attaching_stops_the_guest_no_longer_than_a_query_of_the_monitor(
    clock: tuple[LiveGuest, mmap.mmap], capsys: pytest.CaptureFixture[str]
) -> None:
    guest, memory = clock

    def gap(what: Callable[[], None]) -> int:
        """The guest's longest time without a look at its clock, while that goes on."""
        memory[RECORD : RECORD + 4] = bytes(4)
        what()
        before = _looks(memory)
        deadline = monotonic() + DEADLINE
        while _looks(memory) == before:
            assert monotonic() < deadline, "the guest does not run any more"
        return _counter(memory[RECORD : RECORD + 4])

    def cycle() -> None:
        attach(guest.name, timeout=DEADLINE).close()

    def queries(seconds: float) -> None:
        """No-op queries of the monitor, for as long as the cycle took: who runs longer meets more turns of the
        scheduler."""
        deadline = monotonic() + seconds
        while monotonic() < deadline:
            guest.monitor.command("query-status")

    def stopped(seconds: float) -> None:
        guest.monitor.command("stop")
        queries(seconds)
        guest.monitor.command("cont")

    attached, queried, held = [], [], []
    for _ in range(ROUNDS):
        begun = monotonic()
        attached.append(gap(cycle))
        took = monotonic() - begun
        queried.append(gap(lambda took=took: queries(took)))
        held.append(gap(lambda took=took: stopped(took)))
    ratio, control = (median(gaps) / median(queried) for gaps in (attached, held))
    with capsys.disabled():
        sys.stdout.write(
            f"\nthe guest's longest gap in ticks, median of {ROUNDS}: {median(queried):.0f} with queries, with attach"
            f" and detach {median(attached):.0f} ({ratio:.2f} x), stopped {median(held):.0f} ({control:.2f} x)\n"
        )
    assert control > 2 * ratio, "a guest that is stopped as long as attaching takes must be told apart"
    assert ratio < FACTOR


# -- programs


class Program:
    """A program whose output is read line by line."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def object(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.line())
        return found

    def finish(self) -> tuple[int, str]:
        """Its exit status, and what it says on standard error."""
        errors = self.process.communicate(timeout=DEADLINE)[1]
        return self.process.returncode, errors

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


Start = Callable[..., Program]


@pytest.fixture
def run() -> Iterator[Start]:
    """Starts programs, which end with the test."""
    programs: list[Program] = []

    def begin(*words: str) -> Program:
        programs.append(Program(*words))
        return programs[-1]

    yield begin
    for program in programs:
        program.kill()


@pytest.fixture
def command(run: Start) -> Start:
    """Starts ``kvmi-host``."""
    return lambda *words: run(sys.executable, "-m", "kvmi_host.cli", *words)


@pytest.fixture
def listening(run: Start, tmp_path: Path) -> Callable[..., tuple[str, Program]]:
    """Starts an introspector that knows nothing but the interface; it listens."""

    def begin(*cookie: str) -> tuple[str, Program]:
        path = str(tmp_path / "introspector.sock")
        program = run(sys.executable, introspector.__file__, "listen", path, *cookie)
        assert program.object() == {"listening": path}
        return path, program

    return begin


@pytest.fixture
def cookie_file(tmp_path: Path) -> str:
    file = tmp_path / "cookie"
    file.write_bytes(b"secret")
    return str(file)


@pytest.fixture(scope="module")
def quiet() -> Iterator[LiveGuest]:
    """A running guest with one vCPU, which leaves most of the host's time to the programs of these tests."""
    with LiveGuest(1) as guest:
        guest.booted()
        for thread in os.listdir(f"/proc/{guest.pid}/task"):
            os.setpriority(os.PRIO_PROCESS, int(thread), 19)
        yield guest


@pytest.fixture
def guest(quiet: LiveGuest, shared: SharedGuests) -> LiveGuest:
    """The same; the shared guests stand aside."""
    shared.stand_aside()
    return quiet


# -- an introspector that listens


@pytest.mark.rule("6.2", "6.4")
def test_an_introspector_that_listens_gets_the_session_until_detach(
    guest: LiveGuest, command: Start, listening: Callable[..., tuple[str, Program]], cookie_file: str
) -> None:
    path, program = listening("secret")
    assert command("attach", guest.name, "--to", path, "--cookie-file", cookie_file).finish() == (0, "")
    said = program.object()
    assert (said["struct_size"], said["uuid"], said["name"]) == (96, UUID(int=0).hex, guest.name)
    assert program.object() == {"error": 0, "version": 1}
    assert command("detach", guest.name, "--timeout", str(DEADLINE)).finish() == (0, "")
    assert [program.object(), program.object()] == [{"unhook": True}, {"closed": True}]
    guest.goes_on()


@pytest.mark.rule("6.3")
def test_an_introspector_with_another_secret_gets_nothing(
    guest: LiveGuest, command: Start, listening: Callable[..., tuple[str, Program]], cookie_file: str
) -> None:
    path, _ = listening("another")
    status, said = command("attach", guest.name, "--to", path, "--cookie-file", cookie_file).finish()
    assert status == 1
    assert "wrong cookie" in said
    attach(guest.name, timeout=DEADLINE).close()


@pytest.mark.rule("1.1")
def test_a_hooked_vm_is_refused_before_the_introspector_is_told(
    guest: LiveGuest, command: Start, tmp_path: Path
) -> None:
    path = tmp_path / "introspector.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        sock.setblocking(False)
        with hook(guest):
            status, said = command("attach", guest.name, "--to", str(path)).finish()
        with pytest.raises(BlockingIOError):
            sock.accept()
    assert status == 1
    assert "detach first" in said


def test_a_program_gets_the_session_on_descriptor_3(guest: LiveGuest, command: Start) -> None:
    code = (
        "import os, socket, sys; from kvmi_host.introspect import Session\n"
        "with Session(socket.socket(fileno=3)) as session:\n"
        "    print(os.environ['LISTEN_FDNAMES'], session.get_version().version, session.guest_info())\n"
        "sys.exit(9)"
    )
    program = command("attach", guest.name, "--exec", "--", sys.executable, "-c", code)
    assert program.line() == f"kvmi 1 {guest.vcpus}"
    assert program.finish() == (9, "")
    guest.goes_on()


# -- the built-in agent


def test_detach_from_another_terminal_ends_the_built_in_agent(guest: LiveGuest, command: Start) -> None:
    agent = command("attach", guest.name, "--events", "xsetbv", "--json")
    assert agent.object()["session"]["method"] == "vm-fd"
    assert detach(find_target(guest.name), DEADLINE) is True
    assert agent.object()["event"] == "unhook"
    assert agent.object()["summary"]["ended"] == "unhook"
    assert agent.finish() == (0, "")


@pytest.mark.rule("1.1")
def test_attaching_twice_is_refused_and_the_first_session_goes_on(guest: LiveGuest, command: Start) -> None:
    agent = command("attach", guest.name, "--events", "hypercall", "--json")
    assert "session" in agent.object()
    status, said = command("attach", guest.name, "--json").finish()
    assert status == 1
    assert "is being introspected already: detach first" in said
    assert agent.object()["event"] == "hypercall"
    agent.process.send_signal(signal.SIGINT)


# -- other VMMs


def test_a_vmm_that_is_no_qemu_is_attached_to_by_its_process(run: Start) -> None:
    program = run(sys.executable, "-m", "kvmi_host.testing.vmm")
    assert program.line() == "running"
    with attach(f"pid:{program.process.pid}", timeout=DEADLINE) as vm:
        assert (vm.facts.name, vm.facts.uuid, vm.facts.vcpus) == (f"pid:{program.process.pid}", UUID(int=0), 1)
        with vm.paused():
            assert vm.vcpus[0].state().mode == 2
            assert vmm.CODE <= vm.vcpus[0].registers.rip < vmm.CODE + 9
            before = _counter(vm.memory[vmm.COUNTER : vmm.COUNTER + 4])
        deadline = monotonic() + DEADLINE
        while _counter(vm.memory[vmm.COUNTER : vmm.COUNTER + 4]) == before:
            assert monotonic() < deadline
    assert program.process.poll() is None


# -- a libvirt guest, and QEMU's object


@pytest.fixture(scope="module")
def domain() -> Iterator[str]:
    """A running guest of libvirt."""
    connection = connect("qemu:///system")
    name = "hwtest-attach"
    define(connection, Guest(name=name, image=find_image("modewalk")))
    try:
        start(connection, name)
        yield name
    finally:
        destroy(connection, name)
        connection.close()


@pytest.mark.rule("6.1")
@pytest.mark.libvirt
def test_an_introspector_that_listens_is_told_uuid_name_and_start_time(
    domain: str, command: Start, listening: Callable[..., tuple[str, Program]]
) -> None:
    path, program = listening()
    assert command("attach", domain, "--to", path).finish() == (0, "")
    said, target = program.object(), find_target(domain)
    assert (said["uuid"], said["name"]) == (target.uuid.hex, domain)
    process = os.stat(f"/proc/{target.pid}").st_ctime  # when the kernel first showed it: not before it was started
    assert said["start_time"] == target.start_time <= process + 1
    program.kill()


def inventory(monitor: Monitor) -> tuple[list[str], object]:
    """The character devices and objects that QEMU has."""
    chardevs = sorted(chardev["label"] for chardev in monitor.execute("query-chardev"))
    return chardevs, monitor.execute("qom-list", {"path": "/objects"})


@pytest.mark.libvirt
def test_qemus_object_that_a_stock_host_lacks_is_status_3_and_nothing_is_left(domain: str, command: Start) -> None:
    with open_monitor(find_target(domain)) as monitor:
        before = inventory(monitor)
    status, said = command("attach", domain, "--method", "qemu-object", "--allow", "full").finish()
    assert status == 3
    assert "has no 'introspection' object" in said
    with open_monitor(find_target(domain)) as monitor:
        assert inventory(monitor) == before


@pytest.mark.libvirt
def test_every_step_but_the_object_is_taken_through_libvirt_and_undone(domain: str, tmp_path: Path) -> None:
    with open_monitor(find_target(domain)) as monitor:
        before = inventory(monitor)
        adding = qemu_object._added(monitor, str(tmp_path / "introspector.sock"), b"secret")
        with pytest.raises(MonitorRefused, match="introspection"), adding:
            pass
        assert inventory(monitor) == before
