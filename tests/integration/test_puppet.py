# SPDX-License-Identifier: LGPL-2.1-or-later
"""The puppet guest does what its README says, under QEMU without virtualization: its memory is a file that the test
maps in the place of a session."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmi_host.testing import puppet as guest
from kvmi_host.testing.live import LiveGuest
from kvmi_host.testing.memory import SharedMemory
from kvmi_host.testing.puppet import MARK, PAGE, SOFTWARE_INTERRUPT, STEPS, TICK, Puppet, address, alias, page, tss

pytestmark = pytest.mark.integration

BUILD = Path(__file__).parents[2] / "vm-images/guests/puppet/build"
VCPUS = 3
MIB = 32

LSTAR = 0xC0000082
NOT_CANONICAL = 1 << 63
DB, BP, UD, GP, PF, DE = 1, 3, 6, 13, 14, 0
CR4_TSD = 1 << 2


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveGuest, Puppet]]:
    directory = tmp_path_factory.mktemp("puppet")
    subprocess.run([BUILD, directory], check=True)
    memory = directory / "memory"
    options = ["-object", f"memory-backend-file,id=ram,size={MIB}M,mem-path={memory},share=on"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVMI_IMAGES", str(directory))
        options += ["-machine", "memory-backend=ram"]
        with LiveGuest(VCPUS, "puppet", accel="tcg", cpu="max", memory=str(MIB), options=options) as live:
            live.booted()
            yield live, Puppet(SharedMemory(memory))


@pytest.fixture
def puppet(running: tuple[LiveGuest, Puppet]) -> Iterator[Puppet]:
    yield running[1]
    running[1].settle(VCPUS)


def memory(puppet: Puppet, gpa: int, size: int = 8) -> int:
    return int.from_bytes(puppet.session.read_physical(gpa, size), "little")


def test_every_vcpu_says_that_it_is_alive(running: tuple[LiveGuest, Puppet]) -> None:
    running[0].goes_on()


@pytest.mark.parametrize("vcpu", range(VCPUS))
def test_a_snippet_gets_the_registers_and_leaves_them(puppet: Puppet, vcpu: int) -> None:
    names = ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"]
    values = {name: 0x1111_0000_0000_0000 + number for number, name in enumerate(names)}
    result = puppet.run(vcpu, "nop", **values)
    assert {name: getattr(result.registers, name) for name in names} == values
    assert result.exceptions == 0


def test_only_its_own_vcpu_runs_a_snippet(puppet: Puppet) -> None:
    puppet.start(1, "spin")
    puppet.advances(1)
    assert puppet.result(1) is None
    assert puppet.result(0) is not None
    puppet.stop(1)
    assert puppet.finish(1).exceptions == 0


def test_the_timer_goes_on_within_a_snippet(puppet: Puppet) -> None:
    puppet.start(0, "spin")
    puppet.advances(0, 10_000_000)
    puppet.stop(0)
    assert puppet.finish(0).counts[TICK] > 0


@pytest.mark.parametrize(
    ("snippet", "registers", "vector", "error_code"),
    [
        ("divide", {}, DE, 0),
        ("ud2", {}, UD, 0),
        ("load_ds", {"rax": 0xFFF8}, GP, 0xFFF8),
        ("read8", {"rsi": NOT_CANONICAL}, GP, 0),
        ("write64", {"rsi": 0x7FFF_0000_1000}, PF, 2),
    ],
)
def test_a_fault_is_described_and_ends_the_snippet(
    puppet: Puppet, snippet: str, registers: dict[str, int], vector: int, error_code: int
) -> None:
    result = puppet.run(0, snippet, **registers)
    assert (result.exceptions, result.vector, result.error_code) == (1, vector, error_code)
    assert result.rip == address(snippet)
    assert result.counts[vector] == 1
    assert vector != PF or result.cr2 == registers["rsi"]


@pytest.mark.parametrize(("snippet", "size"), [("int3", 1), ("int_3", 2)])
def test_a_breakpoint_is_counted_and_passed(puppet: Puppet, snippet: str, size: int) -> None:
    result = puppet.run(0, snippet)
    assert (result.exceptions, result.vector, result.rip) == (1, BP, address(snippet) + size)


def test_a_software_interrupt_is_counted_and_no_exception(puppet: Puppet) -> None:
    result = puppet.run(0, "int_n")
    assert (result.exceptions, result.counts[SOFTWARE_INTERRUPT]) == (0, 1)


def test_the_guest_steps_itself(puppet: Puppet) -> None:
    result = puppet.run(0, "step")
    assert (result.exceptions, result.counts[DB], result.vector) == (STEPS, STEPS, DB)
    assert result.dr6 & 1 << 14


def test_what_was_described_is_forgotten_when_the_next_snippet_begins(puppet: Puppet) -> None:
    puppet.run(0, "ud2")
    result = puppet.run(0, "nop")
    assert (result.exceptions, result.vector, result.counts[UD]) == (0, 0, 0)


def test_an_msr_is_written_and_read(puppet: Puppet) -> None:
    puppet.run(0, "wrmsr", rcx=LSTAR, rax=0x1234, rdx=0xFFFF8000)
    registers = puppet.run(0, "rdmsr", rcx=LSTAR).registers
    assert (registers.rax, registers.rdx) == (0x1234, 0xFFFF8000)


def test_control_registers_are_written_and_read(puppet: Puppet) -> None:
    before = puppet.run(0, "mov_from_cr4").registers.rax
    puppet.run(0, "mov_to_cr4", rax=before ^ CR4_TSD)
    assert puppet.run(0, "mov_from_cr4").registers.rax == before ^ CR4_TSD
    puppet.run(0, "mov_to_cr4", rax=before)
    for root in ("other_root", "root"):
        puppet.run(0, "mov_to_cr3", rax=address(root))
        assert puppet.run(0, "mov_from_cr3").registers.rax == address(root)


def test_xcr0_is_written_and_read(puppet: Puppet) -> None:
    before = puppet.run(0, "xgetbv").registers.rax
    assert before & 3 == 3
    assert puppet.run(0, "xsetbv", rax=1).exceptions == 0
    assert puppet.run(0, "xgetbv").registers.rax == 1
    puppet.run(0, "xsetbv", rax=before)
    assert puppet.run(0, "xsetbv", rax=0).vector == GP


@pytest.mark.parametrize(("load", "store", "size"), [("lidt", "sidt", 10), ("lgdt", "sgdt", 10)])
def test_table_registers_have_two_values(puppet: Puppet, load: str, store: str, size: int) -> None:
    table = load[1:] + "r"
    for name in (f"other_{table}", table):
        puppet.run(0, load, rsi=address(name))
        puppet.run(0, store, rsi=page(0))
        assert memory(puppet, page(0), size) == memory(puppet, address(name), size)


def test_ldtr_and_tr_have_two_values(puppet: Puppet) -> None:
    puppet.run(0, "lldt", rax=guest.LDT_SELECTOR)
    assert puppet.run(0, "sldt").registers.rax == guest.LDT_SELECTOR
    puppet.run(0, "lldt", rax=0)
    for which in (1, 0):
        selector, access = tss(0, which)
        puppet.session.write_physical(access, b"\x89")
        assert puppet.run(0, "ltr", rax=selector).exceptions == 0
        assert puppet.run(0, "str").registers.rax == selector
        assert memory(puppet, access, 1) == 0x8B


@pytest.mark.parametrize("index", [0, 1, 15])
def test_an_alias_is_another_address_of_its_page(puppet: Puppet, index: int) -> None:
    gva, gpa = alias(index)
    puppet.run(0, "write64", rsi=gva + 8, rax=0xABCDEF + index)
    assert memory(puppet, gpa + 8) == 0xABCDEF + index


def test_behind_the_last_alias_there_is_nothing(puppet: Puppet) -> None:
    gva, _ = alias(15)
    assert puppet.run(0, "read64", rsi=gva + PAGE).vector == PF


def test_strings_cross_pages(puppet: Puppet) -> None:
    data = bytes(range(200))
    puppet.session.write_physical(page(0), data)
    gva, gpa = alias(0)
    puppet.run(0, "rep_movsb", rsi=page(0), rdi=gva + PAGE - 100, rcx=200)
    assert puppet.session.read_physical(gpa + PAGE - 100, 100) == data[:100]
    assert puppet.session.read_physical(alias(1)[1], 100) == data[100:]


@pytest.mark.parametrize(
    ("snippet", "registers", "left"),
    [
        ("write8", {"rax": 0xFF}, 0x11223344556677FF),
        ("lock_add", {"rax": 1}, 0x1122334455667789),
        ("lock_cmpxchg", {"rax": 0x1122334455667788, "rcx": 5}, 5),
        ("xchg", {"rax": 6}, 6),
    ],
)
def test_memory_is_written(puppet: Puppet, snippet: str, registers: dict[str, int], left: int) -> None:
    puppet.session.write_physical(page(1), struct.pack("<Q", 0x1122334455667788))
    puppet.run(0, snippet, rsi=page(1), **registers)
    assert memory(puppet, page(1)) == left


@pytest.mark.parametrize(("read", "write", "size"), [("read_sse", "write_sse", 16), ("read_avx", "write_avx", 32)])
def test_vectors_are_read_and_written(puppet: Puppet, read: str, write: str, size: int) -> None:
    data = bytes(range(7, 7 + size))
    puppet.session.write_physical(page(0), data)
    assert puppet.run(0, read, rsi=page(0)).exceptions == 0
    puppet.run(0, write, rsi=page(2))
    assert puppet.session.read_physical(page(2), size) == data


def test_code_runs_where_it_is_called(puppet: Puppet) -> None:
    assert puppet.run(0, "call", rsi=address("own_page")).registers.rax == MARK
    puppet.session.write_physical(page(3), b"\xb8\x07\x00\x00\x00\xc3")  # mov eax, 7; ret
    assert puppet.run(0, page(3)).registers.rax == 7


def test_an_instruction_lies_across_two_pages(puppet: Puppet) -> None:
    assert address("straddle") % PAGE == PAGE - 3
    assert puppet.run(0, "straddle").registers.rax == 0x1122334455667788


def test_hlt_ends_with_the_next_tick(puppet: Puppet) -> None:
    assert puppet.run(0, "hlt").counts[TICK] >= 1


@pytest.mark.parametrize(
    ("snippet", "registers"),
    [
        ("loop_nop", {}),
        ("loop_cpuid", {}),
        ("loop_out", {"rdx": 0x80}),
        ("loop_wrmsr", {"rcx": LSTAR, "rbx": 1}),
        ("loop_xsetbv", {"rax": 1, "rbx": 3}),
        ("loop_mov_to_cr3", {"rax": "other_root", "rbx": "root"}),
        ("loop_lidt", {"rsi": "other_idtr", "rdi": "idtr"}),
        ("loop_write64", {"rsi": "pages"}),
        ("loop_read64", {"rsi": "pages"}),
    ],
)
def test_a_loop_goes_round_as_often_as_it_is_told(
    puppet: Puppet, snippet: str, registers: dict[str, int | str]
) -> None:
    values = {name: address(value) if isinstance(value, str) else value for name, value in registers.items()}
    assert puppet.run(0, snippet, **values, r15=100).exceptions == 0
    assert puppet.progress(0) == 100


def test_a_loop_of_breakpoints(puppet: Puppet) -> None:
    assert puppet.run(0, "loop_int3", r15=50).counts[BP] == 50


def test_the_storm_goes_on_until_it_is_told_to_stop(puppet: Puppet) -> None:
    # Nothing answers its hypercall here: that is an undefined opcode, and ends it.
    result = puppet.run(0, "storm", rsi=page(0))
    assert (result.vector, result.exceptions) == (UD, 1)
