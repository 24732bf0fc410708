# SPDX-License-Identifier: LGPL-2.1-or-later
"""The modewalk image is what boot loaders take, and its control block is what kvmi_host.testing.modewalk describes."""

from __future__ import annotations

import subprocess
from pathlib import Path
from struct import iter_unpack, unpack_from

import pytest

from kvmi_host.testing import modewalk
from kvmi_host.testing.modewalk import Actions, Header, Record, Station

BUILD = Path(__file__).parents[3] / "vm-images/guests/modewalk/build"

ELF32_I386_EXECUTABLE = (b"\x7fELF\x01\x01\x01", 2, 3)
PT_LOAD = 1
MULTIBOOT_MAGIC = 0x1BADB002
MULTIBOOT_SEARCH = 8192
ONE_MIB = 1 << 20


def build(directory: Path) -> bytes:
    subprocess.run([BUILD, directory], check=True)
    return (directory / "modewalk.elf").read_bytes()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return build(tmp_path_factory.mktemp("modewalk"))


def segments(image: bytes) -> list[tuple[int, ...]]:
    """What to load: type, offset, virtual and physical address, size in the file and in memory, flags, alignment."""
    (offset,) = unpack_from("<I", image, 28)
    size, count = unpack_from("<2H", image, 42)
    return [header for header in iter_unpack("<8I", image[offset : offset + size * count]) if header[0] == PT_LOAD]


def memory(image: bytes, address: int, size: int) -> bytes:
    """What the image has at an address that the guest uses."""
    for _, offset, start, _, file_size, *_ in segments(image):
        if start <= address and address + size <= start + file_size:
            return image[offset + address - start :][:size]
    raise AssertionError(f"no segment of the image covers {address:#x}")


def record(image: bytes, vcpu: int) -> Record:
    return Record.unpack(memory(image, modewalk.record_address(vcpu), modewalk.RECORD_SIZE))


def test_image_is_a_32_bit_executable(image: bytes) -> None:
    assert (image[:7], *unpack_from("<2H", image, 16)) == ELF32_I386_EXECUTABLE


def test_image_has_a_multiboot_header_where_loaders_look(image: bytes) -> None:
    words = [word for (word,) in iter_unpack("<I", image[:MULTIBOOT_SEARCH])]
    magic, flags, checksum = words[words.index(MULTIBOOT_MAGIC) :][:3]
    assert (magic + flags + checksum) % (1 << 32) == 0


def test_image_loads_above_the_memory_of_the_boot_loader(image: bytes) -> None:
    assert all(physical >= ONE_MIB for _, _, _, physical, *_ in segments(image))


def test_build_is_reproducible(image: bytes, tmp_path: Path) -> None:
    assert build(tmp_path) == image


def test_header_before_boot(image: bytes) -> None:
    header = Header.unpack(memory(image, modewalk.CONTROL_ADDRESS, 16))
    assert header == Header(modewalk.MAGIC, modewalk.VERSION, online=0, state=0)
    assert not header.ready


@pytest.mark.parametrize("vcpu", range(modewalk.MAX_VCPUS))
def test_record_before_boot(image: bytes, vcpu: int) -> None:
    cr3_pair = record(image, vcpu).cr3_pair
    assert record(image, vcpu) == Record(
        want=0,
        at=None,
        actions=Actions.ALL,
        uses_vmmcall=False,
        pace=modewalk.DEFAULT_PACE,
        iterations=0,
        laps=0,
        result=modewalk.HYPERCALL,
        index=vcpu,
        cr3_pair=cr3_pair,
        exception=0,
        exception_eip=0,
        visited=0,
    )


def test_both_cr3_values_are_roots_of_one_page_table(image: bytes) -> None:
    first, second = record(image, 0).cr3_pair
    assert first != second
    assert memory(image, first, 4096) == memory(image, second, 4096)


def test_addresses_of_the_fields_agree_with_the_record() -> None:
    data = bytearray(modewalk.RECORD_SIZE)
    base = modewalk.record_address(3)
    data[modewalk.want_address(3) - base] = 6
    data[modewalk.at_address(3) - base] = Station.VM86
    data[modewalk.actions_address(3) - base] = Actions.CR4
    data[modewalk.pace_address(3) - base] = 7
    data[modewalk.iterations_address(3) - base] = 8
    data[modewalk.laps_address(3) - base] = 9
    fields = Record.unpack(bytes(data))
    assert (fields.want, fields.at, fields.actions) == (6, Station.VM86, Actions.CR4)
    assert (fields.pace, fields.iterations, fields.laps) == (7, 8, 9)


@pytest.mark.parametrize("vcpu", [-1, modewalk.MAX_VCPUS])
def test_a_vcpu_without_a_record_is_an_error(vcpu: int) -> None:
    with pytest.raises(ValueError, match="records for vCPUs 0 to 15"):
        modewalk.record_address(vcpu)


def test_stations_cover_every_mode() -> None:
    assert {station.mode for station in Station} == {2, 4, 8}


def test_every_cr_action_is_two_writes() -> None:
    assert [actions.cr_writes for actions in (Actions.HYPERCALL, Actions.CR3, Actions.ALL)] == [0, 2, 6]
