# SPDX-License-Identifier: LGPL-2.1-or-later
"""A VM of this very process, with one vCPU and no VMM around it: what KVM keeps of the vCPU is set and read through its
ioctls, which it serves for nobody else.

They are served between two runs only: KVM holds the vCPU while it runs, and that is also while it waits for an
introspector. So a run is ended by a signal, which KVM looks at before it enters the guest again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fcntl import ioctl
from struct import Struct
from types import TracebackType
from typing import Self

from kvmi_host.protocol import Cpuid, Registers
from kvmi_host.protocol.x86 import (
    CONTROL,
    REGISTERS,
    SEGMENT,
    SREGS_SIZE,
    TABLE,
    XSAVE_SIZE,
    SpecialRegisters,
    unpack_registers,
    unpack_sregs,
)

# <linux/kvm.h>
_CREATE_VM, _VCPU_MMAP_SIZE, _SUPPORTED_CPUID = 0xAE01, 0xAE04, 0xC008AE05
_CREATE_VCPU, _SET_MEMORY, _SET_TSS_ADDR = 0xAE41, 0x4020AE46, 0xAE47
_RUN, _GET_REGS, _SET_REGS, _GET_SREGS, _SET_SREGS = 0xAE80, 0x8090AE81, 0x4090AE82, 0x8138AE83, 0x4138AE84
_GET_MSRS, _SET_MSRS, _SET_CPUID, _GET_CPUID, _GET_XSAVE = 0xC008AE88, 0x4008AE89, 0x4008AE90, 0xC008AE91, 0x9000AEA4
_EXIT_IO = 2
_IMMEDIATE_EXIT, _EXIT_REASON, _CR8 = 1, slice(8, 12), slice(16, 24)  # of struct kvm_run
_TSS = 0x70000000  # where Intel's CPUs keep what real mode needs: no memory of the guest's
_MEMORY = Struct("<IIQQQ")  # slot, flags, guest address, size, host address
_COUNT = Struct("<II")  # heads struct kvm_msrs and struct kvm_cpuid2
_MSR = Struct("<IIQ")
_CPUID = Struct("<3I4I12x")  # function, index, flags; eax to edx
_NO_CPUID = _COUNT.pack(256, 0) + bytes(256 * _CPUID.size)  # more entries than KVM has
_INDEX_COUNTS = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX
_KICK = signal.SIGUSR1
_STOPS_WITHIN = 60.0
"""Seconds that a vCPU has to leave KVM_RUN."""


class BareVm:
    """The VM. As a context manager, it is gone at the end.

    :ivar fd: of the VM, for ioctls.
    :ivar memory: the guest's physical memory, from address 0.
    """

    def __init__(self, size: int = 1 << 20) -> None:
        """
        :param size: of the memory, in bytes.
        """
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        try:
            self.fd = ioctl(kvm, _CREATE_VM, 0)
            ioctl(self.fd, _SET_TSS_ADDR, _TSS)
            self.memory = mmap.mmap(-1, size)
            address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
            ioctl(self.fd, _SET_MEMORY, _MEMORY.pack(0, 0, 0, size, address))
            self._vcpu = ioctl(self.fd, _CREATE_VCPU, 0)
            self._run = mmap.mmap(self._vcpu, ioctl(kvm, _VCPU_MMAP_SIZE, 0))
            cpuid = bytearray(_NO_CPUID)
            ioctl(kvm, _SUPPORTED_CPUID, cpuid)
            ioctl(self._vcpu, _SET_CPUID, cpuid)
            self._cpuids, _ = _COUNT.unpack_from(cpuid)
        finally:
            os.close(kvm)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._run.close()
        os.close(self._vcpu)
        os.close(self.fd)

    # -- what KVM keeps of the vCPU

    @property
    def registers(self) -> Registers:
        """KVM_GET_REGS."""
        data = bytearray(REGISTERS.size)
        ioctl(self._vcpu, _GET_REGS, data)
        return unpack_registers(bytes(data))

    @registers.setter
    def registers(self, registers: Registers) -> None:
        ioctl(self._vcpu, _SET_REGS, REGISTERS.pack(*registers))

    @property
    def sregs(self) -> SpecialRegisters:
        """KVM_GET_SREGS."""
        data = bytearray(SREGS_SIZE)
        ioctl(self._vcpu, _GET_SREGS, data)
        return unpack_sregs(bytes(data))

    @sregs.setter
    def sregs(self, sregs: SpecialRegisters) -> None:
        ioctl(self._vcpu, _SET_SREGS, pack_sregs(sregs))
        self._run[_CR8] = sregs.cr8.to_bytes(8, "little")  # with which KVM begins each run

    def msrs(self, indices: Sequence[int]) -> dict[int, int]:
        """KVM_GET_MSRS.

        :raise OSError: KVM does not know one of them.
        """
        data = bytearray(_COUNT.pack(len(indices), 0) + b"".join(_MSR.pack(index, 0, 0) for index in indices))
        got = ioctl(self._vcpu, _GET_MSRS, data)
        if got != len(indices):
            raise OSError(f"KVM_GET_MSRS does not know {indices[got]:#x}")
        return {index: value for index, _, value in _MSR.iter_unpack(data[_COUNT.size :])}

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """KVM_SET_MSRS.

        :raise OSError: one of them does not take its value.
        """
        entries = b"".join(_MSR.pack(index, 0, value) for index, value in values.items())
        done = ioctl(self._vcpu, _SET_MSRS, bytearray(_COUNT.pack(len(values), 0) + entries))
        if done != len(values):
            raise OSError(f"KVM_SET_MSRS: {list(values)[done]:#x} does not take its value")

    @property
    def xsave(self) -> bytes:
        """KVM_GET_XSAVE."""
        data = bytearray(XSAVE_SIZE)
        ioctl(self._vcpu, _GET_XSAVE, data)
        return bytes(data)

    @property
    def cpuid(self) -> dict[tuple[int, int], Cpuid]:
        """KVM_GET_CPUID2: by function, and by index where that counts, else 0."""
        data = bytearray(_NO_CPUID)
        ioctl(self._vcpu, _GET_CPUID, data)
        entries = _CPUID.iter_unpack(data[_COUNT.size :][: self._cpuids * _CPUID.size])
        return {
            (function, index if flags & _INDEX_COUNTS else 0): Cpuid(*values)
            for function, index, flags, *values in entries
        }

    # -- its runs

    def run(self) -> bool:
        """Run the guest until it has written to a port, which is passed over. False: :meth:`kick` came before that.

        :raise RuntimeError: it left for another reason.
        """
        try:
            ioctl(self._vcpu, _RUN, 0)
        except InterruptedError:
            return False
        reason = int.from_bytes(self._run[_EXIT_REASON], "little")
        if reason != _EXIT_IO:
            raise RuntimeError(f"the guest left with reason {reason}")
        return True

    @contextmanager
    def running(self) -> Iterator[None]:
        """The vCPU runs while the block does, in a thread of its own.

        A block that has it wait for an introspector calls :meth:`kick` before the reply: it runs no further than that.

        :raise RuntimeError: it cannot be stopped, or the guest has left for another reason than a port.
        """

        def go() -> None:
            try:
                while self.run():
                    pass
            except RuntimeError as error:
                left.append(error)

        left: list[RuntimeError] = []
        self._run[_IMMEDIATE_EXIT] = 0
        before = signal.signal(_KICK, lambda *_: None)
        self._thread = threading.Thread(target=go, name="vcpu", daemon=True)
        self._thread.start()
        try:
            yield
        finally:
            self.kick()
            self._thread.join(_STOPS_WITHIN)
            signal.signal(_KICK, before)
        if left:
            raise left[0]
        if self._thread.is_alive():
            raise RuntimeError("the vCPU does not stop")

    def kick(self) -> None:
        """Have the vCPU stop before it enters the guest again; one that waits for an introspector waits on."""
        self._run[_IMMEDIATE_EXIT] = 1  # for a thread that is about to call KVM; for one that has, the signal
        if self._thread.ident is not None and self._thread.is_alive():
            signal.pthread_kill(self._thread.ident, _KICK)


def pack_sregs(sregs: SpecialRegisters) -> bytes:
    """``struct kvm_sregs``."""
    *segments, gdt, idt, cr0, cr2, cr3, cr4, cr8, efer, apic_base, interrupts = sregs
    tables = b"".join(TABLE.pack(*table) for table in (gdt, idt))
    control = CONTROL.pack(cr0, cr2, cr3, cr4, cr8, efer, apic_base, *interrupts)
    return b"".join(SEGMENT.pack(*segment) for segment in segments) + tables + control
