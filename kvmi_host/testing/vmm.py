# SPDX-License-Identifier: LGPL-2.1-or-later
"""A VMM that is no QEMU: one vCPU in real mode that counts, through KVM's ioctls and nothing else.

``python -m kvmi_host.testing.vmm`` prints ``running`` when the guest has counted to one, and runs until it is killed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from fcntl import ioctl
from struct import Struct

CODE, COUNTER = 0x1000, 0x2000
"""Guest physical addresses. The counter has 32 bits."""

MEMORY = 0x10000

# <linux/kvm.h>
_CREATE_VM, _VCPU_MMAP_SIZE = 0xAE01, 0xAE04
_CREATE_VCPU, _SET_TSS_ADDR, _SET_MEMORY = 0xAE41, 0xAE47, 0x4020AE46
_RUN, _SET_REGS, _GET_SREGS, _SET_SREGS = 0xAE80, 0x4090AE82, 0x8138AE83, 0x4138AE84
_EXIT_IO = 2
_MEMORY = Struct("<IIQQQ")  # slot, flags, guest address, size, host address
_REGS = Struct("<18Q")  # rip and rflags are the last two
_SREGS_SIZE, _CS_BASE, _CS_SELECTOR = 312, 0, 12  # cs comes first: base, limit, selector
_EXIT_REASON = 8  # in struct kvm_run

# inc dword [COUNTER]; out 0x80, al; jmp to the first: an exit each time round, where the VMM can be stopped.
_PROGRAM = b"\x66\xff\x06" + COUNTER.to_bytes(2, "little") + b"\xe6\x80" + b"\xeb\xf7"


def main() -> None:
    """Run the guest."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    vm = ioctl(kvm, _CREATE_VM, 0)
    ioctl(vm, _SET_TSS_ADDR, 0x70000000)  # where Intel's CPUs keep what real mode needs: no memory of the guest's
    memory = mmap.mmap(-1, MEMORY)
    memory[CODE : CODE + len(_PROGRAM)] = _PROGRAM
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ioctl(vm, _SET_MEMORY, _MEMORY.pack(0, 0, 0, MEMORY, address))
    vcpu = ioctl(vm, _CREATE_VCPU, 0)
    run = mmap.mmap(vcpu, ioctl(kvm, _VCPU_MMAP_SIZE, 0))
    sregs = bytearray(_SREGS_SIZE)
    ioctl(vcpu, _GET_SREGS, sregs)
    sregs[_CS_BASE : _CS_BASE + 8] = bytes(8)
    sregs[_CS_SELECTOR : _CS_SELECTOR + 2] = bytes(2)
    ioctl(vcpu, _SET_SREGS, bytes(sregs))
    ioctl(vcpu, _SET_REGS, _REGS.pack(*[0] * 16, CODE, 2))
    told = False
    while True:
        ioctl(vcpu, _RUN, 0)
        reason = int.from_bytes(run[_EXIT_REASON : _EXIT_REASON + 4], "little")
        if reason != _EXIT_IO:
            raise SystemExit(f"the guest left with reason {reason}")
        if not told:
            told = True
            os.write(1, b"running\n")


if __name__ == "__main__":
    main()
