# SPDX-License-Identifier: LGPL-2.1-or-later
"""A VMM that is no QEMU: one vCPU in real mode that counts, through KVM's ioctls and nothing else.

``python -m kvmi_host.testing.vmm`` prints ``running`` when the guest has counted to one, and runs until it is killed.
"""

from __future__ import annotations

import os

from kvmi_host.protocol import Registers
from kvmi_host.testing.bare_vm import BareVm

CODE, COUNTER = 0x1000, 0x2000
"""Guest physical addresses. The counter has 32 bits."""

MEMORY = 0x10000

# inc dword [COUNTER]; out 0x80, al; jmp to the first: an exit each time round, where the VMM can be stopped.
_PROGRAM = b"\x66\xff\x06" + COUNTER.to_bytes(2, "little") + b"\xe6\x80" + b"\xeb\xf7"


def main() -> None:
    """Run the guest."""
    with BareVm(MEMORY) as vm:
        vm.memory[CODE : CODE + len(_PROGRAM)] = _PROGRAM
        sregs = vm.sregs
        vm.sregs = sregs._replace(cs=sregs.cs._replace(base=0, selector=0))
        vm.registers = Registers._make([*[0] * 16, CODE, 2])
        vm.run()
        os.write(1, b"running\n")
        while vm.run():
            pass


if __name__ == "__main__":
    main()
