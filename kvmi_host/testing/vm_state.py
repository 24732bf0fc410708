# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a simulated kernel keeps of a VM, and what each command does with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from queue import SimpleQueue
from struct import Struct
from typing import NamedTuple

from kvmi_host.protocol import Access, Command, ErrorCode, EventId, MemoryType
from kvmi_host.protocol.framing import MAX_PAYLOAD
from kvmi_host.protocol.ids import ALWAYS_ALLOWED, CHANGES_THE_GUEST, KVMI_VERSION, VM_EVENTS
from kvmi_host.protocol.msrs import WATCHABLE
from kvmi_host.protocol.x86 import XSAVE_SIZE

PAGE = 4096
NO_STATE = bytes(144 + 312)
"""``kvm_regs`` and ``kvm_sregs``."""

_MAX_PAUSES = 1000


class Violation(Exception):
    """The introspector broke a rule for which the kernel ends the session."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A valid reply. ``own`` has the event's whole own data: what was not sent is zero."""

    action: int
    own: bytes


class Injected(NamedTuple):
    """An exception that a vCPU will take. ``error_code``: None if it comes without one."""

    vector: int
    error_code: int | None
    address: int


class Waiting(NamedTuple):
    """An event that its vCPU waits for the reply to."""

    seq: int
    event: int
    own: bytes
    replies: SimpleQueue[Reply | None]


@dataclass(slots=True)
class Vcpu:
    """What is kept of a vCPU."""

    started: bool = True
    announced: bool = False
    events: set[int] = field(default_factory=set)
    registers: set[int] = field(default_factory=set)
    msrs: set[int] = field(default_factory=set)
    injected: Injected | None = None
    pauses: int = 0
    waiting: Waiting | None = None


class VmState:
    """A VM, as its session sees it.

    :ivar memory: the guest's physical memory.
    """

    def __init__(
        self,
        vcpus: int,
        not_started: Collection[int],
        commands: Iterable[int] | None,
        events: Iterable[int] | None,
        observe: bool,
        pages: int,
    ) -> None:
        """As :class:`~kvmi_host.testing.peer.SimulatedKernel` has them."""
        self.memory = bytearray(pages * PAGE)
        known = frozenset(COMMANDS)
        forbidden = CHANGES_THE_GUEST if observe else frozenset()
        self._commands: frozenset[int] = (
            known if commands is None else known & frozenset(commands)
        ) - forbidden | ALWAYS_ALLOWED
        self._events: frozenset[int] = frozenset(EventId if events is None else events)
        self._vcpus = [Vcpu(started=index not in not_started) for index in range(vcpus)]
        self._vm_events: set[int] = set()
        self._access: dict[int, int] = {}
        self._answers = True
        self._answer_this = True

    # -- what a test asks for, and does in the guest's place

    def enabled(self, event: int, vcpu: int = 0) -> bool:
        """Whether the introspector has switched an event on."""
        return event in (self._vm_events if event in VM_EVENTS else self._vcpus[vcpu].events)

    def watched_registers(self, vcpu: int = 0) -> frozenset[int]:
        """The control registers whose writes the introspector watches."""
        return frozenset(self._vcpus[vcpu].registers)

    def access_to(self, gpa: int) -> Access:
        """What the guest may do with the page at a physical address."""
        return Access(self._access.get(gpa // PAGE, Access.ALL))

    def watched_msrs(self, vcpu: int = 0) -> frozenset[int]:
        """The MSRs whose writes the introspector watches."""
        return frozenset(self._vcpus[vcpu].msrs)

    def take_exception(self, vcpu: int = 0) -> Injected | None:
        """The guest takes the exception that the introspector asked for."""
        injected, self._vcpus[vcpu].injected = self._vcpus[vcpu].injected, None
        return injected

    def allow_all(self) -> None:
        """Who made the connection allows everything, which it does a moment after the session has begun."""
        self._commands = frozenset(COMMANDS)
        self._events = frozenset(EventId)

    def start_vcpu(self, vcpu: int) -> None:
        """The guest starts a vCPU."""
        self._vcpus[vcpu].started = True

    # -- the commands; each gives its answer's data, or an error code

    def _get_version(self, _vcpu: Vcpu, _payload: bytes) -> bytes | int:
        return _U32.pack(KVMI_VERSION) + bytes(4)

    def _check_command(self, _vcpu: Vcpu, payload: bytes) -> bytes | int:
        return _check(payload, self._commands)

    def _check_event(self, _vcpu: Vcpu, payload: bytes) -> bytes | int:
        return _check(payload, self._events)

    def _guest_info(self, _vcpu: Vcpu, _payload: bytes) -> bytes | int:
        return _U32.pack(len(self._vcpus)) + bytes(12)

    def _vcpu_info(self, _vcpu: Vcpu, _payload: bytes) -> bytes | int:
        return _U64.pack(2_000_000_000)

    def _pause(self, vcpu: Vcpu, payload: bytes) -> bytes | int:
        if payload[0] > 1 or any(payload[1:8]):
            return ErrorCode.EINVAL
        if EventId.PAUSE_VCPU not in self._events:
            return ErrorCode.EPERM
        if vcpu.pauses >= _MAX_PAUSES:
            return ErrorCode.EBUSY
        vcpu.pauses += 1
        return 0

    def _control_vm_events(self, _vcpu: Vcpu, payload: bytes) -> bytes | int:
        return self._switch(self._vm_events, payload, VM_EVENTS)

    def _control_events(self, vcpu: Vcpu, payload: bytes) -> bytes | int:
        return self._switch(vcpu.events, payload, frozenset(EventId) - VM_EVENTS)

    def _switch(self, enabled: set[int], payload: bytes, kinds: frozenset[EventId]) -> int:
        event, enable, *padding = _EVENT_SWITCH.unpack_from(payload)
        if event not in kinds or enable > 1 or any(padding):
            return ErrorCode.EINVAL
        if event == EventId.PAUSE_VCPU and not enable:
            return ErrorCode.EINVAL
        if event not in self._events:
            return ErrorCode.EPERM
        (enabled.add if enable else enabled.discard)(event)
        return 0

    def _control_cr(self, vcpu: Vcpu, payload: bytes) -> bytes | int:
        enable, *padding, register = _REGISTER_SWITCH.unpack_from(payload)
        if register not in (0, 3, 4) or enable > 1 or any(padding):
            return ErrorCode.EINVAL
        (vcpu.registers.add if enable else vcpu.registers.discard)(register)
        return 0

    def _control_msr(self, vcpu: Vcpu, payload: bytes) -> bytes | int:
        enable, *padding, msr = _REGISTER_SWITCH.unpack_from(payload)
        if not any(msr in watchable for watchable in WATCHABLE) or enable > 1 or any(padding):
            return ErrorCode.EINVAL
        (vcpu.msrs.add if enable else vcpu.msrs.discard)(msr)
        return 0

    def _cpuid(self, _vcpu: Vcpu, payload: bytes) -> bytes | int:
        function, index = _CPUID.unpack_from(payload)
        return _CPUID_ANSWER.pack(function, index, 0, 0) if function <= _HIGHEST_CPUID else ErrorCode.ENOENT

    def _xsave(self, _vcpu: Vcpu, _payload: bytes) -> bytes | int:
        return bytes(XSAVE_SIZE)

    def _inject(self, vcpu: Vcpu, payload: bytes) -> bytes | int:
        vector, has_error, padding, error_code, address = _EXCEPTION.unpack_from(payload)
        if vector > _HIGHEST_EXCEPTION or vector == _NMI or has_error != (vector in _WITH_ERROR_CODE) or padding:
            return ErrorCode.EINVAL
        if vcpu.injected:
            return ErrorCode.EBUSY
        vcpu.injected = Injected(vector, error_code if has_error else None, address)
        return 0

    def _get_page_access(self, _vcpu: Vcpu, payload: bytes) -> bytes | int:
        gpas = self._pages(payload, _U64)
        if gpas is None:
            return ErrorCode.EINVAL
        return bytes(self._access.get(gpa // PAGE, Access.ALL) for (gpa,) in gpas)

    def _set_page_access(self, _vcpu: Vcpu, payload: bytes) -> bytes | int:
        entries = self._pages(payload, _PAGE_ACCESS)
        if entries is None or any(access not in _ACCESS or any(padding) for _, access, *padding in entries):
            return ErrorCode.EINVAL
        for gpa, access, *_ in entries:
            self._access[gpa // PAGE] = access
        return 0

    def _pages(self, payload: bytes, entry: Struct) -> list[tuple[int, ...]] | None:
        """The entries of a command about pages, each with its address first; None if they are not as they have to."""
        view, count, padding = _PAGES.unpack_from(payload)
        entries = payload[_PAGES.size :][: count * entry.size]
        if view or padding or len(entries) < count * entry.size:
            return None
        unpacked = list(entry.iter_unpack(entries))
        return unpacked if all(gpa < len(self.memory) for gpa, *_ in unpacked) else None

    def _mtrr_type(self, _vcpu: Vcpu, payload: bytes) -> bytes | int:
        if _U64.unpack_from(payload)[0] >> _ADDRESS_BITS:
            return ErrorCode.EINVAL
        return bytes([MemoryType.WRITE_BACK]) + bytes(7)

    def _get_registers(self, _vcpu: Vcpu, payload: bytes) -> bytes | int:
        count = u16(payload)
        if any(payload[2:8]) or len(payload) < 8 + 4 * count:
            return ErrorCode.EINVAL
        indices = [int.from_bytes(payload[8 + 4 * i : 12 + 4 * i], "little") for i in range(count)]
        if not all(any(index in there for there in WATCHABLE) for index in indices):
            return ErrorCode.EINVAL
        entries = b"".join(_MSR.pack(index, index + 1) for index in indices)
        answer = _U32.pack(8) + bytes(4) + NO_STATE + _U32.pack(count) + bytes(4) + entries
        return answer if len(answer) <= MAX_PAYLOAD - _ERROR.size else ErrorCode.EINVAL

    def _set_registers(self, _vcpu: Vcpu, _payload: bytes) -> bytes | int:
        return 0

    def _read_physical(self, _vcpu: Vcpu, payload: bytes) -> bytes | int:
        gpa, size = self._range(payload)
        return bytes(self.memory[gpa : gpa + size]) if gpa < len(self.memory) else ErrorCode.EINVAL

    def _write_physical(self, _vcpu: Vcpu, payload: bytes) -> bytes | int:
        gpa, size = self._range(payload)
        if len(payload) < 16 + size:
            raise Violation(f"a write of {size} bytes with {len(payload) - 16}")
        if gpa >= len(self.memory):
            return ErrorCode.EINVAL
        self.memory[gpa : gpa + size] = payload[16 : 16 + size]
        return 0

    def _range(self, payload: bytes) -> tuple[int, int]:
        gpa, size = _RANGE.unpack_from(payload)
        if not 1 <= size <= PAGE or gpa % PAGE + size > PAGE:
            raise Violation(f"{size} bytes at {gpa:#x} leave the page")
        return gpa, size

    def _control_cmd_response(self, _vcpu: Vcpu, payload: bytes) -> bytes | int:
        enable, now, *padding = payload[:8]
        if enable > 1 or now > 1 or any(padding):
            return ErrorCode.EINVAL
        self._answers = bool(enable)
        if now:
            self._answer_this = bool(enable)
        return 0

    def _max_gfn(self, _vcpu: Vcpu, _payload: bytes) -> bytes | int:
        return _U64.pack(len(self.memory) // PAGE - 1)


_ERROR = Struct("<i4x")
_U32 = Struct("<I")
_U64 = Struct("<Q")
_CHECKED = Struct("<HHI")
_EVENT_SWITCH = Struct("<HBBI")
_REGISTER_SWITCH = Struct("<BBHI")
_RANGE = Struct("<QQ")
_MSR = Struct("<I4xQ")
_CPUID = Struct("<II")
_CPUID_ANSWER = Struct("<4I")
_EXCEPTION = Struct("<BBHIQ")
_PAGES = Struct("<HHI")
_PAGE_ACCESS = Struct("<QBBHI")
_HIGHEST_CPUID = 0x10
_HIGHEST_EXCEPTION = 31
_NMI = 2
_WITH_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17})
_ADDRESS_BITS = 52  # the most that x86 has
_ACCESS = frozenset(access for access in range(Access.ALL + 1) if access & Access.R or access in (0, Access.X))
"""What page tables can say: who may write may read."""

COMMANDS: dict[int, tuple[Callable[[VmState, Vcpu, bytes], bytes | int], int]] = {
    Command.GET_VERSION: (VmState._get_version, 0),
    Command.CHECK_COMMAND: (VmState._check_command, 8),
    Command.CHECK_EVENT: (VmState._check_event, 8),
    Command.GET_GUEST_INFO: (VmState._guest_info, 0),
    Command.GET_VCPU_INFO: (VmState._vcpu_info, 0),
    Command.PAUSE_VCPU: (VmState._pause, 8),
    Command.CONTROL_VM_EVENTS: (VmState._control_vm_events, 8),
    Command.CONTROL_EVENTS: (VmState._control_events, 8),
    Command.CONTROL_CR: (VmState._control_cr, 8),
    Command.CONTROL_MSR: (VmState._control_msr, 8),
    Command.GET_REGISTERS: (VmState._get_registers, 8),
    Command.SET_REGISTERS: (VmState._set_registers, 144),
    Command.GET_CPUID: (VmState._cpuid, 8),
    Command.GET_XSAVE: (VmState._xsave, 0),
    Command.READ_PHYSICAL: (VmState._read_physical, 16),
    Command.WRITE_PHYSICAL: (VmState._write_physical, 16),
    Command.INJECT_EXCEPTION: (VmState._inject, 16),
    Command.GET_PAGE_ACCESS: (VmState._get_page_access, 8),
    Command.SET_PAGE_ACCESS: (VmState._set_page_access, 8),
    Command.GET_MTRR_TYPE: (VmState._mtrr_type, 8),
    Command.CONTROL_CMD_RESPONSE: (VmState._control_cmd_response, 8),
    Command.GET_MAX_GFN: (VmState._max_gfn, 0),
}
"""How each is carried out, and the least payload that it takes, without the vCPU header."""

VCPU_COMMANDS = frozenset(
    {
        Command.GET_VCPU_INFO,
        Command.PAUSE_VCPU,
        Command.CONTROL_EVENTS,
        Command.CONTROL_CR,
        Command.CONTROL_MSR,
        Command.GET_REGISTERS,
        Command.SET_REGISTERS,
        Command.GET_CPUID,
        Command.GET_XSAVE,
        Command.INJECT_EXCEPTION,
    }
)
"""Those that a vCPU carries out: they have its header."""


def _check(payload: bytes, allowed: frozenset[int]) -> int:
    number, *padding = _CHECKED.unpack_from(payload)
    if any(padding):
        return ErrorCode.EINVAL
    return 0 if number in allowed else ErrorCode.EPERM


def u16(payload: bytes) -> int:
    """The number that a payload begins with."""
    return int.from_bytes(payload[:2], "little")
