# SPDX-License-Identifier: LGPL-2.1-or-later
"""Commands: each function makes a :class:`Request`, which knows its bytes and how to read its answer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from struct import Struct
from types import MappingProxyType
from typing import Generic, NamedTuple, TypeVar

from kvmi_host.protocol.dialects import Version, read_version
from kvmi_host.protocol.errors import ProtocolError
from kvmi_host.protocol.framing import MAX_PAYLOAD
from kvmi_host.protocol.ids import VM_EVENTS, Access, Command, command_name
from kvmi_host.protocol.x86 import (
    REGISTERS,
    SREGS_SIZE,
    XSAVE_SIZE,
    MemoryType,
    Registers,
    SpecialRegisters,
    unpack_registers,
    unpack_sregs,
)

T_co = TypeVar("T_co", covariant=True)

PAGE_SIZE = 4096

VCPU_HEADER = Struct("<H6x")
_PAUSE = Struct("<B7x")
_CHECK = Struct("<H6x")
_CONTROL_EVENT = Struct("<HB5x")
_CONTROL_REGISTER = Struct("<B3xI")
_RESPONSE = Struct("<BB6x")
_MSR_COUNT = Struct("<H6x")
_CPUID = Struct("<II")
_CPUID_ANSWER = Struct("<4I")
_EXCEPTION = Struct("<BB2xIQ")
_PAGES = Struct("<2xH4x")
_PAGE_ACCESS = Struct("<QB7x")
_RANGE = Struct("<QQ")
_U32 = Struct("<I")
_U64 = Struct("<Q")
_MSR_ENTRY = Struct("<I4xQ")


class Request(NamedTuple, Generic[T_co]):
    """A command that was not sent yet.

    :ivar command: the message id.
    :ivar payload: what follows the message header, the vCPU header included.
    :ivar decode: makes the result from what follows the error code of a good answer.
    """

    command: int
    payload: bytes
    decode: Callable[[bytes], T_co]


class VcpuState(NamedTuple):
    """Answer of GET_REGISTERS. ``mode`` is the operand size in bytes; ``msrs`` maps MSR index to value."""

    mode: int
    registers: Registers
    sregs: SpecialRegisters
    msrs: Mapping[int, int]


class Cpuid(NamedTuple):
    """Answer of GET_CPUID: what the CPUID instruction gives in these registers."""

    eax: int
    ebx: int
    ecx: int
    edx: int


def get_version() -> Request[Version]:
    """The interface's version and dialect."""
    return Request(Command.GET_VERSION, b"", read_version)


def check_command(command: int) -> Request[None]:
    """May this session send `command`? -EPERM if not."""
    return Request(Command.CHECK_COMMAND, _CHECK.pack(command), _nothing)


def check_event(event: int) -> Request[None]:
    """May this session enable `event`? -EPERM if not."""
    return Request(Command.CHECK_EVENT, _CHECK.pack(event), _nothing)


def guest_info() -> Request[int]:
    """How many vCPUs the VM has now."""
    return Request(Command.GET_GUEST_INFO, b"", _reader(Command.GET_GUEST_INFO, "vcpu_count", _U32))


def vcpu_info(vcpu: int) -> Request[int]:
    """The vCPU's TSC frequency in Hz; 0 if the host does not know it."""
    return Request(Command.GET_VCPU_INFO, VCPU_HEADER.pack(vcpu), _reader(Command.GET_VCPU_INFO, "tsc_speed", _U64))


def pause_vcpu(vcpu: int, wait: bool = False) -> Request[None]:
    """One PAUSE_VCPU event, after all other events of that vCPU. `wait`: answer once the vCPU left guest mode."""
    return Request(Command.PAUSE_VCPU, VCPU_HEADER.pack(vcpu) + _PAUSE.pack(wait), _nothing)


def control_vm_events(event: int, enable: bool) -> Request[None]:
    """Switch an event of the VM: UNHOOK or CREATE_VCPU.

    :raise ValueError: the event is a vCPU's: use :func:`control_events`.
    """
    if event not in VM_EVENTS:
        raise ValueError(f"event {event} is switched per vCPU")
    return Request(Command.CONTROL_VM_EVENTS, _CONTROL_EVENT.pack(event, enable), _nothing)


def control_events(vcpu: int, event: int, enable: bool) -> Request[None]:
    """Switch an event of one vCPU. PAUSE_VCPU cannot be switched off."""
    payload = VCPU_HEADER.pack(vcpu) + _CONTROL_EVENT.pack(event, enable)
    return Request(Command.CONTROL_EVENTS, payload, _nothing)


def control_cr(vcpu: int, cr: int, enable: bool) -> Request[None]:
    """Watch writes to control register 0, 3 or 4 (the CR event must be enabled as well)."""
    payload = VCPU_HEADER.pack(vcpu) + _CONTROL_REGISTER.pack(enable, cr)
    return Request(Command.CONTROL_CR, payload, _nothing)


def control_msr(vcpu: int, msr: int, enable: bool) -> Request[None]:
    """Watch writes to an MSR: 0 to 0x1fff, 0xc0000000 to 0xc0001fff (the MSR event must be enabled as well)."""
    payload = VCPU_HEADER.pack(vcpu) + _CONTROL_REGISTER.pack(enable, msr)
    return Request(Command.CONTROL_MSR, payload, _nothing)


def control_cmd_response(enable: bool, now: bool) -> Request[None]:
    """Switch the answers off or on, from this command on (`now`) or from the next."""
    return Request(Command.CONTROL_CMD_RESPONSE, _RESPONSE.pack(enable, now), _nothing)


def get_registers(vcpu: int, msrs: Iterable[int] = ()) -> Request[VcpuState]:
    """A vCPU's registers, and the MSRs with these indices."""
    indices = tuple(msrs)
    wanted = b"".join(map(_U32.pack, indices))
    return Request(Command.GET_REGISTERS, VCPU_HEADER.pack(vcpu) + _MSR_COUNT.pack(len(indices)) + wanted, _vcpu_state)


def set_registers(vcpu: int, registers: Registers) -> Request[None]:
    """Set them when the pending event is replied to; with no event pending the kernel drops them and says success."""
    return Request(Command.SET_REGISTERS, VCPU_HEADER.pack(vcpu) + REGISTERS.pack(*registers), _nothing)


def cpuid(vcpu: int, function: int, index: int = 0) -> Request[Cpuid]:
    """What the guest's CPUID instruction gives for EAX = `function` and ECX = `index`. -ENOENT: nothing."""

    def decode(data: bytes) -> Cpuid:
        _require(Command.GET_CPUID, data, _CPUID_ANSWER.size, "edx")
        return Cpuid._make(_CPUID_ANSWER.unpack_from(data))

    return Request(Command.GET_CPUID, VCPU_HEADER.pack(vcpu) + _CPUID.pack(function, index), decode)


def xsave(vcpu: int) -> Request[bytes]:
    """A vCPU's extended state: ``struct kvm_xsave``, in the standard format of the XSAVE instruction."""

    def decode(data: bytes) -> bytes:
        _require(Command.GET_XSAVE, data, XSAVE_SIZE, "region")
        return data

    return Request(Command.GET_XSAVE, VCPU_HEADER.pack(vcpu), decode)


def inject_exception(vcpu: int, vector: int, error_code: int | None = None, address: int = 0) -> Request[None]:
    """Have the guest take an exception.

    :param error_code: None: the exception comes without one.
    :param address: for a page fault (14), the address that goes to CR2.
    """
    payload = _EXCEPTION.pack(vector, error_code is not None, error_code or 0, address)
    return Request(Command.INJECT_EXCEPTION, VCPU_HEADER.pack(vcpu) + payload, _nothing)


def page_access(gpas: Iterable[int]) -> Request[tuple[Access, ...]]:
    """What the guest may do with the pages at these physical addresses, in their order.

    :raise ValueError: more than a message holds.
    """
    pages = tuple(gpas)

    def decode(data: bytes) -> tuple[Access, ...]:
        _require(Command.GET_PAGE_ACCESS, data, len(pages), f"access[{len(pages)}]")
        return tuple(map(Access, data[: len(pages)]))

    payload = _pages(pages, [_U64.pack(gpa) for gpa in pages])
    return Request(Command.GET_PAGE_ACCESS, payload, decode)


def set_page_access(access: Mapping[int, int]) -> Request[None]:
    """Say what the guest may do with pages, by physical address. :attr:`Access.ALL` forgets the page.

    :raise ValueError: more than a message holds.
    """
    payload = _pages(access, [_PAGE_ACCESS.pack(gpa, allowed) for gpa, allowed in access.items()])
    return Request(Command.SET_PAGE_ACCESS, payload, _nothing)


def mtrr_type(gpa: int) -> Request[MemoryType]:
    """The memory type that the guest's MTRRs give a physical address."""

    def decode(data: bytes) -> MemoryType:
        _require(Command.GET_MTRR_TYPE, data, 1, "type")
        try:
            return MemoryType(data[0])
        except ValueError:
            raise ProtocolError(f"{command_name(Command.GET_MTRR_TYPE)}: there is no memory type {data[0]}") from None

    return Request(Command.GET_MTRR_TYPE, _U64.pack(gpa), decode)


def read_physical(gpa: int, size: int) -> Request[bytes]:
    """`size` bytes at guest-physical address `gpa`.

    :raise ValueError: the range leaves its 4096-byte page; the kernel would end the session for that.
    """
    _require_one_page(gpa, size)

    def decode(data: bytes) -> bytes:
        _require(Command.READ_PHYSICAL, data, size, "the bytes")
        return data[:size]

    return Request(Command.READ_PHYSICAL, _RANGE.pack(gpa, size), decode)


def write_physical(gpa: int, data: bytes) -> Request[None]:
    """Write `data` at guest-physical address `gpa`.

    :raise ValueError: the range leaves its 4096-byte page; the kernel would end the session for that.
    """
    _require_one_page(gpa, len(data))
    return Request(Command.WRITE_PHYSICAL, _RANGE.pack(gpa, len(data)) + data, _nothing)


def max_gfn() -> Request[int]:
    """The highest guest frame number (guest-physical address / 4096)."""
    return Request(Command.GET_MAX_GFN, b"", _reader(Command.GET_MAX_GFN, "gfn", _U64))


def raw(command: int, payload: bytes = b"", vcpu: int | None = None) -> Request[bytes]:
    """Any command; its answer's data as it came. `vcpu` puts the vCPU header before the payload.

    :raise ValueError: too long for a message.
    """
    if vcpu is not None:
        payload = VCPU_HEADER.pack(vcpu) + payload
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"{len(payload)} bytes do not fit in a message, which holds {MAX_PAYLOAD}")
    return Request(command, payload, bytes)


def _nothing(_data: bytes) -> None:
    return None


def _reader(command: int, field: str, struct: Struct) -> Callable[[bytes], int]:
    def decode(data: bytes) -> int:
        _require(command, data, struct.size, field)
        value: int = struct.unpack_from(data)[0]
        return value

    return decode


def _vcpu_state(data: bytes) -> VcpuState:
    registers_at = _U64.size
    sregs_at = registers_at + REGISTERS.size
    msrs_at = sregs_at + SREGS_SIZE
    entries_at = msrs_at + _U64.size
    for end, field in ((4, "mode"), (sregs_at, "regs"), (msrs_at, "sregs"), (entries_at, "msrs.nmsrs")):
        _require(Command.GET_REGISTERS, data, end, field)
    count: int = _U32.unpack_from(data, msrs_at)[0]
    entries_end = entries_at + count * _MSR_ENTRY.size
    _require(Command.GET_REGISTERS, data, entries_end, f"msrs.entries[{count}]")
    return VcpuState(
        mode=_U32.unpack_from(data)[0],
        registers=unpack_registers(data, registers_at),
        sregs=unpack_sregs(data, sregs_at),
        msrs=MappingProxyType(dict(_MSR_ENTRY.iter_unpack(data[entries_at:entries_end]))),
    )


def _pages(pages: Collection[int], items: Iterable[bytes]) -> bytes:
    payload = _PAGES.pack(len(pages)) + b"".join(items)
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"{len(pages)} pages do not fit in a message, which holds {MAX_PAYLOAD} bytes")
    return payload


def _require(command: int, data: bytes, size: int, field: str) -> None:
    if len(data) < size:
        raise ProtocolError(f"{command_name(command)}: the answer's {len(data)} bytes end before {field!r}")


def _require_one_page(gpa: int, size: int) -> None:
    if not 1 <= size <= PAGE_SIZE or gpa % PAGE_SIZE + size > PAGE_SIZE:
        raise ValueError(f"{size} bytes at {gpa:#x} are not within one page of {PAGE_SIZE}")
