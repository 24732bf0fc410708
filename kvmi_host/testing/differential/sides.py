# SPDX-License-Identifier: LGPL-2.1-or-later
"""The two sides of the differential test: a simulated kernel with a guest that is a table, and the live one with the
puppet guest, whose memory is shared, so that it takes no session to make it do something."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from struct import Struct
from time import monotonic
from typing import Protocol, cast

from kvmi_host.attach.policy import Policy
from kvmi_host.introspect import Session
from kvmi_host.protocol import Access, Action, msr_index
from kvmi_host.testing.differential.steps import Deed, Driver
from kvmi_host.testing.live import DEADLINE, LiveError, LiveGuest, hook_socket
from kvmi_host.testing.memory import SharedMemory
from kvmi_host.testing.peer import SimulatedKernel
from kvmi_host.testing.puppet import Puppet, address, page
from kvmi_host.testing.vm_state import Reply

VCPUS = 2
_MIB = 1 << 20
_MEMORY = 32 * _MIB
_SIMULATED_DEADLINE = 10.0
_LSTAR = msr_index("lstar")
_HYPERCALL, _HYPERCALL_EVENT = 34, 24  # kvmi-abi: hypercall number, sub-operation
_TABLE = Struct("<H6xQQ")
_MSR = Struct("<I4xQQ")
_PLAIN_OWN = {Deed.HYPERCALL: 0, Deed.BREAKPOINT: 16, Deed.IDT: 8, Deed.WRITE: 24}
"""The sizes of own data that a reply has nothing to do with."""


class Side(Protocol):
    """A kernel, and a guest with :data:`VCPUS` vCPUs."""

    def session(self, policy: Policy) -> AbstractContextManager[Driver]:
        """A session with the guest, within these rules."""


class SimulatedSide:
    """The simulated kernel. Each session has a guest of its own."""

    def __init__(self, scratch: int) -> None:
        """
        :param scratch: the address of the page that :attr:`Deed.WRITE` writes to.
        """
        self._scratch = scratch

    @contextmanager
    def session(self, policy: Policy) -> Iterator[Driver]:
        """See :class:`Side`."""
        ours, kernels = socket.socketpair()
        with kernels, ours:
            kernel = SimulatedKernel(
                kernels,
                VCPUS,
                commands=policy.commands,
                events=policy.events,
                observe=policy.observe,
                announce=True,
                pages=_MEMORY // 4096,
            )
            with kernel:
                yield Driver(ours, _SimulatedGuest(kernel, self._scratch), _SIMULATED_DEADLINE)


class _SimulatedGuest:
    """What the puppet guest does, as far as events tell. A deed is over when its event was answered, but for RETRY."""

    def __init__(self, kernel: SimulatedKernel, scratch: int) -> None:
        self._kernel = kernel
        self._scratch = scratch
        self._deeds: dict[int, Deed] = {}
        self._replies: dict[int, SimpleQueue[Reply | None]] = {}
        self._value = 0

    def act(self, vcpu: int, deed: Deed) -> None:
        """See :class:`~kvmi_host.testing.differential.steps.Guest`."""
        self._deeds[vcpu] = deed
        self._try(vcpu)

    def at_rest(self, vcpu: int) -> bool:
        """See :class:`~kvmi_host.testing.differential.steps.Guest`."""
        return vcpu not in self._deeds

    def go_on(self) -> None:
        """See :class:`~kvmi_host.testing.differential.steps.Guest`."""
        for vcpu, replies in tuple(self._replies.items()):
            try:
                reply = replies.get_nowait()
            except Empty:
                continue
            del self._replies[vcpu]
            if reply is None or reply.action != Action.RETRY:
                del self._deeds[vcpu]
        for vcpu in range(VCPUS):
            if self._kernel.waiting_for(vcpu) is None:
                self._kernel.take_exception(vcpu)
                self._try(vcpu)

    def _try(self, vcpu: int) -> None:
        deed = self._deeds.get(vcpu)
        if deed is None or self._kernel.waiting_for(vcpu) is not None:
            return
        if self._told(vcpu, deed):
            self._replies[vcpu] = self._kernel.fire(deed.value, vcpu, self._own(deed))
        else:
            del self._deeds[vcpu]

    def _told(self, vcpu: int, deed: Deed) -> bool:
        kernel = self._kernel
        watched = {
            Deed.CR3: 3 in kernel.watched_registers(vcpu),
            Deed.LSTAR: _LSTAR in kernel.watched_msrs(vcpu),
            Deed.WRITE: not kernel.access_to(self._scratch) & Access.W,
        }
        return kernel.enabled(deed.value, vcpu) and watched.get(deed, True)

    def _own(self, deed: Deed) -> bytes:
        self._value += 0x1000
        if deed is Deed.CR3:
            return _TABLE.pack(3, self._value - 0x1000, self._value)
        if deed is Deed.LSTAR:
            return _MSR.pack(_LSTAR, self._value - 0x1000, self._value)
        return bytes(_PLAIN_OWN[deed])


class LiveSide:
    """The kernel part of this host, with a puppet guest. As a context manager, the guest is killed at the end."""

    def __init__(self, memory: Path) -> None:
        """
        :param memory: the file that is to be the guest's memory; best on a tmpfs.
        """
        ram = f"memory-backend-file,id=ram,size={_MEMORY // _MIB}M,mem-path={memory},share=on"
        options = ("-object", ram, "-machine", "memory-backend=ram")
        self._memory = memory
        self._live = LiveGuest(VCPUS, "puppet", memory=str(_MEMORY // _MIB), options=options)

    def __enter__(self) -> LiveSide:
        self._live.booted()
        self._guest = _PuppetGuest(Puppet(cast(Session, SharedMemory(self._memory))))
        return self

    def __exit__(self, *_: object) -> None:
        self._live.kill()

    @contextmanager
    def session(self, policy: Policy) -> Iterator[Driver]:
        """See :class:`Side`.

        :raise LiveError: the last session has left a vCPU stuck.
        """
        with hook_socket(self._live, policy) as sock:
            yield Driver(sock, self._guest, DEADLINE)
        deadline = monotonic() + DEADLINE
        while not all(map(self._guest.at_rest, range(VCPUS))):
            if monotonic() > deadline:
                raise LiveError("a vCPU does not go on, though its session has ended")


class _PuppetGuest:
    """What a deed takes: a snippet, with registers that make it a change."""

    def __init__(self, puppet: Puppet) -> None:
        self._puppet = puppet
        self._turns: Counter[tuple[int, Deed]] = Counter()
        self._value = 1 << 32

    def act(self, vcpu: int, deed: Deed) -> None:
        """See :class:`~kvmi_host.testing.differential.steps.Guest`."""
        self._turns[vcpu, deed] += 1
        self._value += 0x1000
        other = self._turns[vcpu, deed] % 2
        start = self._puppet.start
        if deed is Deed.HYPERCALL:
            start(vcpu, self._puppet.hypercall(vcpu), rax=_HYPERCALL, rdi=_HYPERCALL_EVENT)
        elif deed is Deed.BREAKPOINT:
            start(vcpu, "int3")
        elif deed is Deed.CR3:
            start(vcpu, "mov_to_cr3", rax=address("other_root" if other else "root"))
        elif deed is Deed.LSTAR:
            start(vcpu, "wrmsr", rcx=_LSTAR, rax=self._value & 0xFFFFFFFF, rdx=self._value >> 32)
        elif deed is Deed.IDT:
            start(vcpu, "lidt", rsi=address("other_idtr" if other else "idtr"))
        else:
            start(vcpu, "write64", rsi=page(0), rax=self._value)

    def at_rest(self, vcpu: int) -> bool:
        """See :class:`~kvmi_host.testing.differential.steps.Guest`."""
        return self._puppet.result(vcpu) is not None

    def go_on(self) -> None:
        """See :class:`~kvmi_host.testing.differential.steps.Guest`. It does so by itself."""
