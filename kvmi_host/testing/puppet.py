# SPDX-License-Identifier: LGPL-2.1-or-later
"""The puppet guest's driver: a vCPU runs a named snippet with the registers that a test chooses, and tells what came of
it.

The guest's README (``vm-images/guests/puppet/README.md``) says what the snippets are. A session with the guest is all
that is needed; mailboxes are guest memory::

    puppet = Puppet(session)
    result = puppet.run(0, "rdmsr", rcx=0xC0000080)
    events, result = puppet.watch(0, "wrmsr", rcx=LSTAR, rax=1)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from struct import Struct
from time import monotonic
from typing import Self

from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from kvmi_host.introspect import Session
from kvmi_host.protocol import Event, Registers
from kvmi_host.protocol.x86 import REGISTERS, unpack_registers
from kvmi_host.provision import find_image
from kvmi_host.testing.live import DEADLINE, LiveError, await_event

PAGE = 4096
LARGE_PAGE = 2 << 20
MAILBOXES = 0x10000
"""One page for each vCPU."""
STACKS = 0x20000
UD = 6
"""Vector of #UD."""
TICK = 0x20
"""Vector of the timer."""
SOFTWARE_INTERRUPT = 0x30
"""Vector of the snippet ``int_n``."""
MARK = 0x600D
"""What ``own_page`` leaves in EAX."""
STEPS = 11
"""How many single-step traps the snippet ``step`` gives itself."""
ALIAS_PAGES = 16
DATA_SELECTOR = 0x10
LDT_SELECTOR = 0x20

_ALIAS = 1 << 32
_TSS = 0x30
_DESCRIPTOR = 16
_ACCESS_BYTE = 5

_GO, _ENTRY, _STOP, _IN, _PROGRESS = 0, 8, 16, 64, 304
_DONE, _OUT = 256, 640
_U64 = Struct("<Q")
_VMMCALL = Struct("<268xI")
_RESULT = Struct("<6Q24x64I")
"""At EXCEPTIONS_SEEN: how many, the last one's vector, error code, rip, cr2, dr6; counts by vector."""
_RESULT_AT = 312


@dataclass(frozen=True, slots=True)
class Result:
    """What a snippet left behind.

    :ivar registers: the general registers at its end; ``rip`` is 0.
    :ivar exceptions: how many the guest's handlers saw; what follows describes the last one, zeros if there was none.
    :ivar counts: by vector, INT n and the timer included.
    """

    registers: Registers
    exceptions: int
    vector: int
    error_code: int
    rip: int
    cr2: int
    dr6: int
    counts: tuple[int, ...]

    @classmethod
    def unpack(cls, mailbox: bytes) -> Self:
        """Read a mailbox, of which the first 784 bytes count."""
        seen, vector, error_code, rip, cr2, dr6, *counts = _RESULT.unpack_from(mailbox, _RESULT_AT)
        return cls(unpack_registers(mailbox, _OUT), seen, vector, error_code, rip, cr2, dr6, tuple(counts))


@cache
def symbols(image: Path | None = None) -> Mapping[str, int]:
    """Addresses in the guest, physical and virtual alike.

    :param image: the guest's ELF file; by default the one that live guests are booted from.
    """
    with (image or Path(str(find_image("puppet").kernel))).open("rb") as file:
        table = ELFFile(file).get_section_by_name(".symtab")
        assert isinstance(table, SymbolTableSection)
        return {symbol.name: symbol["st_value"] for symbol in table.iter_symbols()}


def address(name: str) -> int:
    """Where a snippet, or another symbol of the guest, lies. A snippet's first instruction is what it is about."""
    known = symbols()
    return known[f"do_{name}"] if f"do_{name}" in known else known[name]


def page(index: int) -> int:
    """The address of a page for tests, which the guest leaves alone; there are 256."""
    return address("pages") + index * PAGE


def alias(index: int) -> tuple[int, int]:
    """A page for tests whose virtual address (the first) is not its physical one (the second); there are 16."""
    return _ALIAS + index * PAGE, address("alias_pages") + (ALIAS_PAGES - 1 - index) * PAGE


def tss(vcpu: int, which: int = 1) -> tuple[int, int]:
    """One of the two TSS selectors of a vCPU (the first is loaded at boot), and where the byte with its busy bit is."""
    selector = _TSS + (2 * vcpu + which) * _DESCRIPTOR
    return selector, address("gdt") + selector + _ACCESS_BYTE


class Puppet:
    """The vCPUs of a puppet guest, on a session with it."""

    def __init__(self, session: Session) -> None:
        self.session = session

    # -- a snippet, from start to finish

    def start(self, vcpu: int, snippet: str | int, **registers: int) -> None:
        """Have a vCPU run a snippet; it begins within 10 ms.

        :param snippet: its name, or an address.
        :param registers: by name, without RSP; the others are zero.
        """
        mailbox = self._mailbox(vcpu)
        go = _U64.unpack_from(mailbox, _GO)[0]
        if go != _U64.unpack_from(mailbox, _DONE)[0]:
            raise LiveError(f"vCPU {vcpu} has not finished its last snippet")
        entry = snippet if isinstance(snippet, int) else address(snippet)
        values = Registers._make([0] * len(Registers._fields))._replace(**registers)
        at = MAILBOXES + vcpu * PAGE
        self.session.write_physical(at + _ENTRY, _U64.pack(entry) + _U64.pack(0))
        self.session.write_physical(at + _PROGRESS, _U64.pack(0))  # what is read before it begins is not the last one's
        self.session.write_physical(at + _IN, REGISTERS.pack(*values)[: 16 * _U64.size])
        self.session.write_physical(at + _GO, _U64.pack(go + 1))

    def finish(self, vcpu: int) -> Result:
        """Wait until a vCPU is through with its snippet.

        :raise LiveError: it is not, in time, or an event came that nobody waits for.
        """
        deadline = monotonic() + DEADLINE
        while (result := self.result(vcpu)) is None:
            if self.session.waiting:
                raise LiveError(f"an event that nobody waits for: {self.session.next_event(0)}")
            self._check(deadline, vcpu)
        return result

    def run(self, vcpu: int, snippet: str | int, **registers: int) -> Result:
        """Both: no event may come of it."""
        self.start(vcpu, snippet, **registers)
        return self.finish(vcpu)

    def watch(
        self, vcpu: int, snippet: str | int, answer: Callable[[Event], None] | None = None, **registers: int
    ) -> tuple[list[Event], Result]:
        """Run a snippet and answer the events that come meanwhile.

        :param answer: what replies to an event; by default each is answered CONTINUE.
        :return: the events, in their order, and what came of the snippet.
        """
        self.start(vcpu, snippet, **registers)
        return self.watch_on(vcpu, answer)

    def watch_on(self, vcpu: int, answer: Callable[[Event], None] | None = None) -> tuple[list[Event], Result]:
        """The same for a snippet that was started before."""
        events = []
        deadline = monotonic() + DEADLINE
        while True:
            while (event := self.session.next_event(0)) is not None:
                events.append(event)
                (answer or self.session.reply)(event)
                self._check(deadline, vcpu)
            if (result := self.result(vcpu)) is not None:
                return events, result
            self._check(deadline, vcpu)

    def result(self, vcpu: int) -> Result | None:
        """What a vCPU's last snippet left behind; None while it runs."""
        mailbox = self._mailbox(vcpu)
        return Result.unpack(mailbox) if mailbox[_GO : _GO + 8] == mailbox[_DONE : _DONE + 8] else None

    # -- snippets that go on until they are told to stop

    def stop(self, vcpu: int) -> None:
        """Tell a snippet that goes on (``spin``, ``storm``) to end."""
        self.session.write_physical(MAILBOXES + vcpu * PAGE + _STOP, _U64.pack(1))

    def progress(self, vcpu: int) -> int:
        """How many rounds such a snippet, or one that loops, has done."""
        (rounds,) = _U64.unpack_from(self._mailbox(vcpu), _PROGRESS)
        return int(rounds)

    def advances(self, vcpu: int, rounds: int = 1) -> None:
        """Wait until it has done so many more.

        :raise LiveError: it has not, in time.
        """
        deadline = monotonic() + DEADLINE
        wanted = self.progress(vcpu) + rounds
        while self.progress(vcpu) < wanted:
            self._check(deadline, vcpu)

    # -- a vCPU that nothing wakes up

    def sleep(self, vcpu: int, **registers: int) -> None:
        """Send a vCPU to sleep with its interrupts off: only :meth:`wake` ends it.

        :param registers: as in :meth:`start`.
        :raise LiveError: it does not come to its HLT, in time.
        """
        self.start(vcpu, "sleep", **registers)
        deadline = monotonic() + DEADLINE
        while self.session.get_registers(vcpu).registers.rip != address("asleep"):
            self._check(deadline, vcpu)

    def wake(self, vcpu: int) -> Result:
        """Wake it up, by an exception (#UD), and wait until it is at home."""
        self.session.inject_exception(vcpu, UD)
        return self.finish(vcpu)

    # -- what else a test asks for

    def event(self) -> Event:
        """The next event; see :func:`await_event`."""
        return await_event(self.session)

    def hypercall(self, vcpu: int = 0) -> str:
        """The snippet with the hypercall instruction of this CPU's vendor."""
        return "vmmcall" if _VMMCALL.unpack_from(self._mailbox(vcpu))[0] else "vmcall"

    def settle(self, vcpus: int) -> None:
        """Bring every vCPU home.

        :raise LiveError: one is stuck.
        """
        for vcpu in range(vcpus):
            self.stop(vcpu)
            self.finish(vcpu)

    def _mailbox(self, vcpu: int) -> bytes:
        return self.session.read_physical(MAILBOXES + vcpu * PAGE, PAGE)

    def _check(self, deadline: float, vcpu: int) -> None:
        if monotonic() > deadline:
            raise LiveError(f"vCPU {vcpu} is not through with its snippet: {Result.unpack(self._mailbox(vcpu))}")
