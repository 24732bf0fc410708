# SPDX-License-Identifier: LGPL-2.1-or-later
"""Steps that a seed draws: what either side has to make the same of, well-formed and not.

Left out is what the guest would not survive, and what depends on the CPU or on the moment: single steps, injected
exceptions, page access that not every CPU can say, MSRs that not every CPU has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from struct import pack

from kvmi_host.attach.policy import FULL, Policy
from kvmi_host.protocol import Action, Command, Event, EventId, msr_index
from kvmi_host.protocol.framing import MAX_PAYLOAD
from kvmi_host.protocol.ids import ALWAYS_ALLOWED
from kvmi_host.testing.differential.sides import VCPUS
from kvmi_host.testing.differential.steps import VCPU, Act, Ask, Deed, Raw, Reply, Step
from kvmi_host.testing.vm_state import VCPU_COMMANDS

_PAGE = 4096
_NO_MEMORY = (1 << 27, 1 << 40, (1 << 64) - _PAGE)
_UNKNOWN = (12, 22, 24, 25, 26, 28, 30, 63, 255, 65534)
_MSRS = tuple(map(msr_index, ("efer", "star", "lstar", "pat", "sysenter-cs", "sysenter-eip", "kernel-gs-base")))
_NO_MSR = 0xDEAD
_MOST_MSRS = 481
"""More do not fit in an answer: of its 8184 bytes 8 are the error code, 472 the rest, and each takes 16."""
_ODD_FLAGS = ((2, 0), (1, 1), (255, 0))
_ACCESS = (0, 1, 3, 5, 7)
_NO_ACCESS = (2, 8, 255)


class Drawing:
    """Draws steps for one session."""

    def __init__(self, random: Random, policy: Policy, scratch: Sequence[int], waiting: Mapping[int, Event]) -> None:
        """
        :param scratch: addresses of pages that the guest makes no use of.
        :param waiting: the event that each vCPU waits with, kept up to date by whoever carries the steps out.
        """
        self._random = random
        self._full = policy == FULL
        self._allowed = tuple(
            command
            for command in _COMMANDS
            if policy.commands is None or command in policy.commands or command in ALWAYS_ALLOWED
        )
        self._scratch = scratch
        self._waiting = waiting
        self._answers = True

    def opening(self) -> list[Step]:
        """What has the vCPUs tell of most of what they do; now and then nothing."""
        random = self._random
        if not self._full or random.random() < 0.2:
            return []
        steps: list[Step] = [Ask(Command.SET_PAGE_ACCESS, pack("<HHIQQ", 0, 1, 0, self._scratch[0], 1))]
        for vcpu in range(VCPUS):
            header = VCPU.pack(vcpu, 0, 0)
            steps += [
                Ask(Command.CONTROL_EVENTS, header + pack("<HBBI", deed.value, 1, 0, 0))
                for deed in Deed
                if random.random() < 0.8
            ]
            steps.append(Ask(Command.CONTROL_CR, header + pack("<BBHI", 1, 0, 0, 3)))
            steps.append(Ask(Command.CONTROL_MSR, header + pack("<BBHI", 1, 0, 0, msr_index("lstar"))))
        return steps

    def step(self) -> Step:
        """The next one."""
        random = self._random
        if self._waiting and random.random() < 0.35:
            return self._reply(random.choice(sorted(self._waiting)))
        idle = sorted(set(range(VCPUS)) - set(self._waiting))
        if self._full and self._answers and idle and random.random() < 0.3:
            return Act(random.choice(idle), random.choice(tuple(Deed)))
        if not self._answers and random.random() < 0.4:
            return self._switch_answers(True)
        if random.random() < 0.02:
            return self._fatal()
        return self._ask()

    # -- replies

    def _reply(self, vcpu: int) -> Reply:
        random = self._random
        event = self._waiting[vcpu].event
        if random.random() < 0.06:
            return random.choice(
                (
                    Reply(vcpu, seq=random.choice((-1, 1, 1000, 1 << 31))),
                    Reply(vcpu, header_padding=random.choice(((1, 0), (0, 1)))),
                    Reply(vcpu, padding=random.choice(((1, 0), (0, 1 << 31)))),
                    Reply(vcpu, to=random.choice((1 - vcpu, VCPUS, 65535))),
                    Reply(vcpu, common=random.randrange(2)),
                    Reply(vcpu, own=bytes(273)),
                )
            )
        action = random.choice((Action.CONTINUE,) * 8 + (Action.RETRY, 3, 255))
        # A CR3 of which bytes are missing would be the guest's end.
        cut = random.randrange(9) if event == EventId.MSR and random.random() < 0.3 else None
        own_data = event in (EventId.CR, EventId.MSR, EventId.PF)
        common = 8 if own_data or random.random() < 0.8 else random.randrange(2, 8)
        return Reply(vcpu, action, common=common, cut=cut)

    # -- commands

    def _ask(self) -> Ask:
        random = self._random
        if random.random() < 0.06:
            return Ask(random.choice(_UNKNOWN), random.randbytes(random.choice((0, 5, 64))))
        # Those that are refused, too, but not all the time.
        of = self._allowed if random.random() < 0.9 else tuple(_COMMANDS)
        command = random.choice(of)
        if command == Command.CONTROL_CMD_RESPONSE and self._answers and random.random() < 0.7:
            command = Command.GET_VERSION
        if command == Command.CONTROL_CMD_RESPONSE:
            return self._switch_answers(random.random() < 0.5)
        good, odd = _COMMANDS[command]
        spoilt = random.random() < 0.25
        payload = (odd if spoilt and odd else good)(self)
        if command in VCPU_COMMANDS:
            payload = VCPU.pack(self._index(), 0, 0) + payload
        least = VCPU.size if command in VCPU_COMMANDS else 0
        how = random.random()
        if how < 0.04 and len(payload) > least:
            # Not so short that a write lacks a part of its data: that ends the session.
            longest = 16 if command == Command.WRITE_PHYSICAL else len(payload)
            payload = payload[: random.randrange(least, longest)]
        elif how < 0.08:
            payload += random.randbytes(min(random.choice((1, 8, 100)), MAX_PAYLOAD - len(payload)))
        pieces = (random.randrange(1, 8), random.randrange(8, 24)) if random.random() < 0.1 else ()
        return Ask(command, payload, pieces)

    def _switch_answers(self, on: bool) -> Ask:
        random = self._random
        if random.random() < 0.1:
            return Ask(Command.CONTROL_CMD_RESPONSE, pack("<BBHI", *random.choice(((2, 0), (1, 2))), 0, 0))
        # A session that may not do so goes on as before.
        if Command.CONTROL_CMD_RESPONSE in self._allowed:
            self._answers = on
        return Ask(Command.CONTROL_CMD_RESPONSE, pack("<BBHI", on, random.randrange(2), 0, 0))

    def _fatal(self) -> Raw | Ask:
        page = self._scratch[-1]
        return self._random.choice(
            (
                Raw(pack("<HHI", Command.GET_VERSION, 8185, 1)),
                Raw(pack("<HHI", 63, 65535, 1)),
                Ask(Command.GET_VCPU_INFO, VCPU.pack(0, 1, 0)),
                Ask(Command.GET_VCPU_INFO, bytes(7)),
                Ask(Command.READ_PHYSICAL, pack("<QQ", page + 1, _PAGE)),
                Ask(Command.READ_PHYSICAL, pack("<QQ", page, 0)),
                Ask(Command.WRITE_PHYSICAL, pack("<QQ", page, 2) + b"x"),
                Ask(Command.EVENT_REPLY, bytes(16)),
            )
        )

    def _index(self) -> int:
        return self._random.choice((0, 0, 0, 1, 1, 1, VCPUS, 65535) if self._random.random() < 0.2 else (0, 1))

    # -- payloads: as they should be, and with a field that is not

    def _nothing(self) -> bytes:
        return b""

    def _number(self) -> bytes:
        return pack("<HHI", self._random.choice((*range(32), 63, 65535)), 0, 0)

    def _padded_number(self) -> bytes:
        return pack("<HHI", 2, *self._random.choice(((1, 0), (0, 1))))

    def _pause(self) -> bytes:
        return pack("<BBHI", self._random.randrange(2), 0, 0, 0)

    def _bad_pause(self) -> bytes:
        return pack("<BBHI", *self._random.choice(((2, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (1, 0, 0, 1))))

    def _vm_event(self) -> bytes:
        return pack("<HBBI", self._random.choice((0, 9, 1, 12)), self._random.randrange(2), 0, 0)

    def _event(self) -> bytes:
        event = self._random.choice([event for event in EventId if event != EventId.SINGLESTEP])
        return pack("<HBBI", event, self._random.random() < 0.8, 0, 0)

    def _bad_event(self) -> bytes:
        return pack("<HBBI", *self._random.choice(((5, 2, 0, 0), (5, 1, 1, 0), (5, 1, 0, 1), (12, 1, 0, 0))))

    def _cr(self) -> bytes:
        return pack("<BBHI", self._random.random() < 0.8, 0, 0, 3)

    def _bad_cr(self) -> bytes:
        return pack("<BBHI", 1, 0, 0, self._random.choice((1, 2, 8, 0xFFFFFFFF)))

    def _msr(self) -> bytes:
        return pack("<BBHI", self._random.random() < 0.8, 0, 0, msr_index("lstar"))

    def _bad_msr(self) -> bytes:
        index = self._random.choice((0x2000, 0xBFFFFFFF, 0xC0002000, 0xFFFFFFFF))
        return pack("<BBHI", *self._random.choice((*_ODD_FLAGS, (1, 0))), 0, index)

    def _msrs(self) -> bytes:
        return self._msr_list([self._random.choice(_MSRS) for _ in range(self._random.choice((0, 1, 7, _MOST_MSRS)))])

    def _bad_msrs(self) -> bytes:
        many = [_MSRS[0]] * (_MOST_MSRS + 1)
        return self._random.choice((self._msr_list([_NO_MSR]), self._msr_list(many), pack("<HHI", 2, 0, 0) + bytes(4)))

    def _msr_list(self, indices: Sequence[int]) -> bytes:
        return pack(f"<HHI{len(indices)}I", len(indices), 0, 0, *indices)

    def _registers(self) -> bytes:
        return bytes(143)  # too short: what a vCPU that waits would take over

    def _cpuid(self) -> bytes:
        return pack("<II", self._random.choice((0, 1)), self._random.randrange(4))

    def _no_cpuid(self) -> bytes:
        return pack("<II", 0x12345678, 0)

    def _range(self) -> bytes:
        return pack("<QQ", self._random.choice(self._scratch), self._random.choice((1, 8, _PAGE)))

    def _no_range(self) -> bytes:
        return pack("<QQ", self._random.choice(_NO_MEMORY), 16)

    def _data(self) -> bytes:
        size = self._random.choice((1, 8, _PAGE))
        return pack("<QQ", self._random.choice(self._scratch), size) + self._random.randbytes(size)

    def _no_data(self) -> bytes:
        return pack("<QQ", self._random.choice(_NO_MEMORY), 4) + b"data"

    def _bad_exception(self) -> bytes:
        return pack("<BBHIQ", *self._random.choice(((32, 0, 0), (2, 0, 0), (6, 1, 0), (13, 0, 0), (6, 0, 1))), 0, 0)

    def _pages(self) -> bytes:
        pages = self._random.choices(self._scratch, k=self._random.choice((0, 1, 3, 1022)))
        return pack(f"<HHI{len(pages)}Q", 0, len(pages), 0, *pages)

    def _bad_pages(self) -> bytes:
        view, count, padding = self._random.choice(((1, 1, 0), (0, 1, 1), (0, 2, 0)))
        return pack("<HHIQ", view, count, padding, self._scratch[0])

    def _accesses(self) -> bytes:
        pages = self._random.sample(list(self._scratch), k=self._random.randrange(len(self._scratch) + 1))
        entries = b"".join(pack("<QB7x", page, self._random.choice(_ACCESS)) for page in pages)
        return pack("<HHI", 0, len(pages), 0) + entries

    def _bad_accesses(self) -> bytes:
        random = self._random
        gpa, access, padding = random.choice(
            (
                (self._scratch[0], random.choice(_NO_ACCESS), 0),
                (self._scratch[0], 1, 1),
                (random.choice(_NO_MEMORY), 1, 0),
            )
        )
        return pack("<HHIQBBHI", 0, 1, 0, gpa, access, padding, 0, 0)

    def _address(self) -> bytes:
        return pack("<Q", self._random.choice(self._scratch))

    def _no_address(self) -> bytes:
        return pack("<Q", 1 << 60)


_Payload = Callable[[Drawing], bytes]
_COMMANDS: Mapping[Command, tuple[_Payload, _Payload | None]] = {
    Command.GET_VERSION: (Drawing._nothing, None),
    Command.CHECK_COMMAND: (Drawing._number, Drawing._padded_number),
    Command.CHECK_EVENT: (Drawing._number, Drawing._padded_number),
    Command.GET_GUEST_INFO: (Drawing._nothing, None),
    Command.GET_VCPU_INFO: (Drawing._nothing, None),
    Command.PAUSE_VCPU: (Drawing._pause, Drawing._bad_pause),
    Command.CONTROL_VM_EVENTS: (Drawing._vm_event, Drawing._bad_event),
    Command.CONTROL_EVENTS: (Drawing._event, Drawing._bad_event),
    Command.CONTROL_CR: (Drawing._cr, Drawing._bad_cr),
    Command.CONTROL_MSR: (Drawing._msr, Drawing._bad_msr),
    Command.GET_REGISTERS: (Drawing._msrs, Drawing._bad_msrs),
    Command.SET_REGISTERS: (Drawing._registers, None),
    Command.GET_CPUID: (Drawing._cpuid, Drawing._no_cpuid),
    Command.GET_XSAVE: (Drawing._nothing, None),
    Command.READ_PHYSICAL: (Drawing._range, Drawing._no_range),
    Command.WRITE_PHYSICAL: (Drawing._data, Drawing._no_data),
    Command.INJECT_EXCEPTION: (Drawing._bad_exception, None),
    Command.GET_PAGE_ACCESS: (Drawing._pages, Drawing._bad_pages),
    Command.SET_PAGE_ACCESS: (Drawing._accesses, Drawing._bad_accesses),
    Command.GET_MTRR_TYPE: (Drawing._address, Drawing._no_address),
    Command.CONTROL_CMD_RESPONSE: (Drawing._nothing, None),
    Command.GET_MAX_GFN: (Drawing._nothing, None),
}
"""How each payload is drawn, without the vCPU header: as it should be, and with a field that is not."""
