# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events and replies to the byte, against vectors written by hand from the protocol's tables."""

import pytest

from kvmi_host.protocol import (
    Action,
    BreakpointHit,
    CrWrite,
    DescriptorAccess,
    Event,
    EventId,
    MsrWrite,
    PageFault,
    PageFaultReply,
    ProtocolError,
    Trap,
)
from kvmi_host.protocol.events import encode_reply

# Every field has a value of its own, so that a wrong offset cannot hide.
REGS = b"".join((0x1000 + n).to_bytes(8, "little") for n in range(18))
SEGMENTS = b"".join(
    (0x2000 + n).to_bytes(8, "little")
    + (0xFFF0 + n).to_bytes(4, "little")
    + (8 * n).to_bytes(2, "little")
    # type, present, dpl, db, s, l, g, avl, unusable, padding
    + bytes([0xB, 1, 3, 0, 1, 1, 0, 1, 0, 0])
    for n in range(8)
)
TABLES = bytes.fromhex("0030000000000000 7f00 000000000000  0040000000000000 ff0f 000000000000")
CONTROL = b"".join((0x5000 + n).to_bytes(8, "little") for n in range(7))
BITMAP = b"".join((0x6000 + n).to_bytes(8, "little") for n in range(4))
MSRS = b"".join((0x7000 + n).to_bytes(8, "little") for n in range(9))
ARCH = bytes.fromhex("04 00000000000000") + REGS + SEGMENTS + TABLES + CONTROL + BITMAP + MSRS


def body(kind, own="", size="2002", extra=b""):
    return bytes.fromhex(size + "0300" + f"{kind:02x}" + "000000") + ARCH + extra + bytes.fromhex(own)


def test_the_vector_has_the_sizes_of_the_kvm_api():
    assert (len(REGS), len(SEGMENTS + TABLES + CONTROL + BITMAP), len(MSRS), len(ARCH)) == (144, 312, 72, 536)


def test_the_common_fields_are_where_the_protocol_puts_them():
    event = Event(9, body(EventId.HYPERCALL))
    assert (event.seq, event.vcpu, event.event, event.mode) == (9, 3, EventId.HYPERCALL, 4)
    assert (event.rip, event.cr3) == (0x1010, 0x5002)
    assert event.data is None


def test_the_registers_are_those_of_kvm_regs():
    registers = Event(1, body(EventId.HYPERCALL)).registers
    names = "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags"
    assert registers._asdict() == {name: 0x1000 + n for n, name in enumerate(names.split())}


def test_the_special_registers_are_those_of_kvm_sregs():
    sregs = Event(1, body(EventId.HYPERCALL)).sregs
    for n, name in enumerate(["cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"]):
        segment = getattr(sregs, name)
        assert (segment.base, segment.limit, segment.selector) == (0x2000 + n, 0xFFF0 + n, 8 * n)
    cs = sregs.cs
    assert (cs.type, cs.present, cs.dpl, cs.db, cs.s, cs.l, cs.g, cs.avl, cs.unusable) == (11, 1, 3, 0, 1, 1, 0, 1, 0)
    assert (sregs.gdt, sregs.idt) == ((0x3000, 0x7F), (0x4000, 0xFFF))
    names = "cr0 cr2 cr3 cr4 cr8 efer apic_base"
    assert [getattr(sregs, name) for name in names.split()] == [0x5000 + n for n in range(7)]
    assert sregs.interrupt_bitmap == (0x6000, 0x6001, 0x6002, 0x6003)


def test_the_msrs_come_in_the_order_of_the_protocol():
    names = "sysenter_cs sysenter_esp sysenter_eip efer star lstar cstar pat shadow_gs"
    assert Event(1, body(5)).msrs._asdict() == {name: 0x7000 + n for n, name in enumerate(names.split())}


OWN_DATA = [
    (EventId.CR, "0300 000000000000 0010000000000000 0020000000000000", CrWrite(3, 0x1000, 0x2000)),
    (EventId.MSR, "820000c0 00000000 0100000000000000 0200000000000000", MsrWrite(0xC0000082, 1, 2)),
    (EventId.BREAKPOINT, "3412000000000000 01 00000000000000", BreakpointHit(0x1234, 1)),
    (EventId.PF, "0100000000000000 0200000000000000 04 00 0500 00000000", PageFault(1, 2, 4, 5)),
    (EventId.TRAP, "0e000000 03000000 02000000 00000000 ef00000000000000", Trap(14, 3, 2, 0xEF)),
    (EventId.DESCRIPTOR, "02 01 000000000000", DescriptorAccess(2, 1)),
]
WITHOUT_OWN_DATA = sorted(set(EventId) - {kind for kind, _, _ in OWN_DATA})


@pytest.mark.parametrize(("kind", "own", "meaning"), OWN_DATA)
def test_own_data_is_what_the_protocol_says(kind, own, meaning):
    event = Event(1, body(kind, own))
    assert event.event is kind
    assert event.data == meaning


@pytest.mark.parametrize("kind", WITHOUT_OWN_DATA)
def test_the_other_kinds_have_no_own_data(kind):
    assert Event(1, body(kind)).data is None


@pytest.mark.parametrize(("kind", "own", "meaning"), OWN_DATA)
def test_own_data_longer_than_known_is_ignored(kind, own, meaning):
    assert Event(1, body(kind, own + "ffffffff")).data == meaning


@pytest.mark.parametrize(("kind", "own", "meaning"), OWN_DATA)
def test_own_data_of_a_newer_peer_is_found_behind_its_longer_common_part(kind, own, meaning):
    event = Event(1, body(kind, own, size="2802", extra=b"\xee" * 8))
    assert event.data == meaning
    assert event.rip == 0x1010


@pytest.mark.parametrize(
    ("kind", "own", "field"),
    [
        (EventId.CR, "", "cr"),
        (EventId.CR, "0300 000000000000 00100000000000", "old"),
        (EventId.CR, "0300 000000000000 0010000000000000 00", "new"),
        (EventId.MSR, "8200", "msr"),
        (EventId.BREAKPOINT, "0000000000000000", "insn_len"),
        (EventId.PF, "0000000000000000 0000000000000000 00", "view"),
        (EventId.TRAP, "00000000 00000000", "error_code"),
        (EventId.DESCRIPTOR, "01", "write"),
    ],
)
def test_short_own_data_is_an_error_that_names_the_missing_field(kind, own, field):
    with pytest.raises(ProtocolError, match=f"before its field '{field}'"):
        Event(1, body(kind, own))


@pytest.mark.parametrize(
    ("length", "field"),
    [(0, "size"), (1, "size"), (2, "vcpu"), (4, "event"), (7, "mode"), (100, "regs"), (543, "msrs")],
)
def test_a_truncated_event_is_an_error_that_names_the_missing_field(length, field):
    with pytest.raises(ProtocolError, match=f"'{field}'"):
        Event(1, body(5)[:length])


@pytest.mark.parametrize("size", ["0000", "1f02", "ffff"])
def test_a_common_part_whose_size_lies_is_an_error(size):
    with pytest.raises(ProtocolError):
        Event(1, body(5, size=size))


def test_an_event_that_is_newer_than_the_library_has_its_number_and_its_vcpu():
    event = Event(1, body(14, "0011223344"))
    assert (event.event, event.vcpu, event.data) == (14, 3, None)
    assert "event-14" in repr(event)


def test_an_event_cannot_be_changed_by_accident():
    with pytest.raises(AttributeError):
        Event(1, body(5)).rip = 0


CR3_WRITE = "0300 000000000000 0010000000000000 0020000000000000"
LSTAR_WRITE = "820000c0 00000000 0100000000000000 0200000000000000"


@pytest.mark.parametrize(
    ("kind", "own", "action", "new_val", "reply"),
    [
        (3, "", Action.CONTINUE, None, "0300 0000 00000000  00 03 0000 00000000"),
        (5, "", Action.CONTINUE, None, "0300 0000 00000000  00 05 0000 00000000"),
        (7, "00" * 24, Action.CONTINUE, None, "0300 0000 00000000  00 07 0000 00000000"),
        (8, "0201" + "00" * 6, Action.RETRY, None, "0300 0000 00000000  01 08 0000 00000000"),
        (9, "", Action.CONTINUE, None, "0300 0000 00000000  00 09 0000 00000000"),
        (11, "", Action.CONTINUE, None, "0300 0000 00000000  00 0b 0000 00000000"),
        (10, "", Action.CRASH, None, "0300 0000 00000000  02 0a 0000 00000000"),
        (4, "00" * 16, Action.RETRY, None, "0300 0000 00000000  01 04 0000 00000000"),
        (1, CR3_WRITE, Action.CONTINUE, None, "0300 0000 00000000  00 01 0000 00000000  0020000000000000"),
        (1, CR3_WRITE, Action.CONTINUE, 0x1000, "0300 0000 00000000  00 01 0000 00000000  0010000000000000"),
        (2, LSTAR_WRITE, Action.CONTINUE, None, "0300 0000 00000000  00 02 0000 00000000  0200000000000000"),
    ],
)
def test_a_reply_has_the_bytes_of_the_protocol(kind, own, action, new_val, reply):
    assert encode_reply(Event(1, body(kind, own)), action, new_val) == bytes.fromhex(reply)


PAGE_FAULT = "0010007f00000000 0010000000000000 02 00 0000 00000000"


@pytest.mark.parametrize(
    ("page_fault", "own"),
    [
        (None, ""),
        (PageFaultReply(), "0000000000000000 00000000 00 00 0000" + "00" * 256),
        (PageFaultReply(singlestep=True), "0000000000000000 00000000 01 00 0000" + "00" * 256),
        (PageFaultReply(rep_complete=True), "0000000000000000 00000000 00 01 0000" + "00" * 256),
        (PageFaultReply(0x7F001000, b"\xab\xcd"), "0010007f00000000 02000000 00 00 0000 abcd" + "00" * 254),
        (PageFaultReply(1, bytes([7]) * 256), "0100000000000000 00010000 00 00 0000" + "07" * 256),
    ],
)
def test_the_reply_to_a_page_fault_has_the_bytes_of_the_protocol(page_fault, own):
    reply = encode_reply(Event(1, body(EventId.PF, PAGE_FAULT)), page_fault=page_fault)
    assert reply == bytes.fromhex("0300 0000 00000000  00 06 0000 00000000" + own)


def test_a_page_faults_own_data_is_for_page_faults_and_has_a_limit():
    with pytest.raises(ValueError, match="hypercall event is no page fault"):
        encode_reply(Event(1, body(EventId.HYPERCALL)), page_fault=PageFaultReply())
    with pytest.raises(ValueError, match="257 bytes of context are more than the 256"):
        encode_reply(Event(1, body(EventId.PF, PAGE_FAULT)), page_fault=PageFaultReply(0, bytes(257)))


def test_unhook_has_no_reply():
    with pytest.raises(ValueError, match="no reply"):
        encode_reply(Event(1, body(EventId.UNHOOK)))


def test_a_new_value_is_only_for_events_that_take_one():
    with pytest.raises(ValueError, match="takes no new value"):
        encode_reply(Event(1, body(EventId.HYPERCALL)), new_val=1)
