# SPDX-License-Identifier: LGPL-2.1-or-later
"""The modewalk guest does what its README says, under QEMU without virtualization.

The guest's memory is a file that the test maps, so the control block is read and written in place; which mode a vCPU
is in, QEMU tells.
"""

from __future__ import annotations

import json
import mmap
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmi_host.testing import modewalk
from kvmi_host.testing.modewalk import Actions, Header, Record, Station

pytestmark = pytest.mark.integration

BUILD = Path(__file__).parents[2] / "vm-images/guests/modewalk/build"
VCPUS = 4
MIB = 16
DEADLINE = 60.0

CS_L = 1 << 21
CS_D = 1 << 22
CR0_PE = 1
EFER_LMA = 1 << 10
EFLAGS_VM = 1 << 17


class Guest:
    """A running modewalk: its control block, its serial lines, its registers as QEMU sees them."""

    def __init__(self, image: Path, directory: Path, vcpus: int, *options: str) -> None:
        self._serial = directory / "serial"
        memory = directory / "memory"
        self._qemu = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-nodefaults", "-display", "none", "-no-reboot", "-accel", "tcg"),
                *("-object", f"memory-backend-file,id=ram,size={MIB}M,mem-path={memory},share=on"),
                *("-machine", "memory-backend=ram", "-m", str(MIB), "-smp", str(vcpus), *options),
                *("-serial", f"file:{self._serial}", "-qmp", "stdio", "-kernel", str(image)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.command("qmp_capabilities")
            with memory.open("r+b") as file:
                self._memory = mmap.mmap(file.fileno(), 0)
            self.eventually(lambda: self.header.ready, "boots")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        self._qemu.kill()
        self._qemu.communicate()

    def command(self, name: str, **arguments: object) -> object:
        assert self._qemu.stdin
        assert self._qemu.stdout
        print(json.dumps({"execute": name, "arguments": arguments}), file=self._qemu.stdin, flush=True)
        for line in self._qemu.stdout:
            answer = json.loads(line)
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]
        raise AssertionError(f"QEMU ended with status {self._qemu.wait()} instead of answering {name}")

    def eventually(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + DEADLINE
        while not condition():
            assert self._qemu.poll() is None, f"QEMU ended with status {self._qemu.returncode}"
            assert time.monotonic() < end, f"not within {DEADLINE:.0f} s: the guest {what}; {self.lines[-5:]}"
            time.sleep(0.01)

    @property
    def lines(self) -> list[str]:
        return self._serial.read_text().splitlines()

    @property
    def header(self) -> Header:
        return Header.unpack(self._memory[modewalk.CONTROL_ADDRESS : modewalk.CONTROL_ADDRESS + 16])

    def record(self, vcpu: int) -> Record:
        address = modewalk.record_address(vcpu)
        return Record.unpack(self._memory[address : address + modewalk.RECORD_SIZE])

    def hold(self, vcpu: int, station: Station, actions: Actions = Actions.ALL) -> None:
        self._memory[modewalk.actions_address(vcpu)] = actions
        self.want(vcpu, station)
        self.eventually(lambda: self.record(vcpu).at is station, f"holds vCPU {vcpu} at {station.label}")

    def want(self, vcpu: int, station: int) -> None:
        self._memory[modewalk.want_address(vcpu)] = station

    def release(self) -> None:
        for vcpu in range(modewalk.MAX_VCPUS):
            self.want(vcpu, 0)
            self._memory[modewalk.actions_address(vcpu)] = Actions.ALL

    def registers(self, vcpu: int) -> dict[str, int]:
        """CR0, CR3, CR4, EFER, EFLAGS and the descriptor flags of CS, of a vCPU that is stopped meanwhile."""
        self.command("stop")
        text = str(self.command("human-monitor-command", **{"command-line": "info registers", "cpu-index": vcpu}))
        self.command("cont")
        found = {name: int(value, 16) for name, value in re.findall(r"\b(CR[034]|EFER|[RE]FL)=([0-9a-f]+)", text)}
        cs = re.search(r"^CS =(?:[0-9a-f]+ ){3}([0-9a-f]+)", text, re.MULTILINE)
        assert cs
        return found | {"CS": int(cs[1], 16), "EFLAGS": found.get("RFL", found.get("EFL", 0))}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("image")
    subprocess.run([BUILD, directory], check=True)
    return directory / "modewalk.elf"


@pytest.fixture(scope="module")
def running(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    guest = Guest(image, tmp_path_factory.mktemp("guest"), VCPUS, "-cpu", "max")
    yield guest
    guest.stop()


@pytest.fixture
def guest(running: Guest) -> Iterator[Guest]:
    yield running
    running.release()


def kvmi_mode(registers: dict[str, int]) -> int:
    """The mode table of KVMI."""
    if registers["EFER"] & EFER_LMA and registers["CS"] & CS_L:
        return 8
    return 4 if registers["CS"] & CS_D else 2


def faults(guest: Guest, vcpus: int = VCPUS) -> list[int]:
    return [vcpu for vcpu in range(vcpus) if guest.record(vcpu).exception_eip]


def test_first_line_counts_the_vcpus(guest: Guest) -> None:
    guest.eventually(lambda: bool(guest.lines), "prints a line")
    assert guest.lines[0] == modewalk.vcpus_line(VCPUS)


def test_every_vcpu_comes_to_every_station(guest: Guest) -> None:
    expected = {modewalk.station_line(vcpu, station) for vcpu in range(VCPUS) for station in Station}
    guest.eventually(lambda: expected <= set(guest.lines), "has been everywhere")
    assert faults(guest) == []


@pytest.mark.parametrize("station", Station, ids=lambda station: station.label)
def test_held_vcpu_is_in_the_mode_of_its_station(guest: Guest, station: Station) -> None:
    guest.hold(1, station, Actions(0))
    done = guest.record(1).iterations
    guest.eventually(lambda: guest.record(1).iterations > done, "goes by the new actions")
    registers = guest.registers(1)
    assert kvmi_mode(registers) == station.mode
    assert bool(registers["EFER"] & EFER_LMA) == (station >= Station.LONG64)
    assert bool(registers["CR0"] & CR0_PE) == (station > Station.BIGREAL)
    assert bool(registers["EFLAGS"] & EFLAGS_VM) == (station is Station.VM86)


@pytest.mark.parametrize("station", Station, ids=lambda station: station.label)
def test_held_vcpu_goes_on_and_says_so(guest: Guest, station: Station) -> None:
    guest.hold(2, station)
    count = guest.record(2).iterations // modewalk.HELD_LINE_ITERATIONS + 1
    line = modewalk.held_line(2, station, count * modewalk.HELD_LINE_ITERATIONS)
    guest.eventually(lambda: line in guest.lines, f"prints {line!r}")
    assert guest.record(2).at is station


def test_iterations_leave_no_trace_in_the_control_registers(guest: Guest) -> None:
    guest.hold(0, Station.PROT32)
    done = guest.record(0).iterations
    guest.eventually(lambda: guest.record(0).iterations > done + 10, "repeats the iteration")
    guest.hold(0, Station.PROT32, Actions(0))
    done = guest.record(0).iterations
    guest.eventually(lambda: guest.record(0).iterations > done + 1, "goes by the new actions")
    registers = guest.registers(0)
    assert not registers["CR0"] & modewalk.CR0_WP
    assert not registers["CR4"] & modewalk.CR4_TSD
    assert registers["CR3"] == guest.record(0).cr3_pair[0]


def test_released_vcpu_walks_on(guest: Guest) -> None:
    guest.hold(3, Station.COMPAT16)
    guest.release()
    laps = guest.record(3).laps
    guest.eventually(lambda: guest.record(3).laps > laps, "walks on")


def test_the_others_walk_on_while_one_is_held(guest: Guest) -> None:
    guest.hold(0, Station.REAL16)
    laps = [guest.record(vcpu).laps for vcpu in range(1, VCPUS)]
    guest.eventually(
        lambda: all(guest.record(vcpu + 1).laps > before for vcpu, before in enumerate(laps)), "walks on vCPUs 1 to 3"
    )
    assert guest.record(0).at is Station.REAL16


def test_a_wish_for_no_station_is_a_wish_to_walk(guest: Guest) -> None:
    guest.hold(0, Station.LONG64)
    guest.want(0, max(Station) + 1)
    laps = guest.record(0).laps
    guest.eventually(lambda: guest.record(0).laps > laps, "walks on")


def test_without_virtualization_nothing_answers_the_hypercall(guest: Guest) -> None:
    guest.hold(0, Station.PROT32)
    assert guest.record(0).result == modewalk.HYPERCALL


@pytest.mark.parametrize(
    ("vcpus", "options", "uses_vmmcall"),
    [
        (1, ["-M", "pc", "-cpu", "EPYC"], True),
        (3, ["-M", "q35", "-cpu", "Haswell"], False),
        (8, ["-M", "q35", "-cpu", "max,vendor=HygonGenuine"], True),
    ],
    ids=["amd-pc", "intel-q35", "hygon-q35"],
)
def test_walks_on_other_machines(
    image: Path, tmp_path: Path, vcpus: int, options: list[str], uses_vmmcall: bool
) -> None:
    guest = Guest(image, tmp_path, vcpus, *options)
    try:
        guest.eventually(lambda: all(guest.record(vcpu).laps for vcpu in range(vcpus)), "walks")
        assert guest.header.online == vcpus
        assert [guest.record(vcpu).uses_vmmcall for vcpu in range(vcpus)] == [uses_vmmcall] * vcpus
        assert faults(guest, vcpus) == []
    finally:
        guest.stop()
