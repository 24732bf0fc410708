# SPDX-License-Identifier: LGPL-2.1-or-later
"""PF events: what the guest may not do with a page, before it is done."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from time import monotonic

import pytest

from kvmi_host.host.debug_kernel import KMEMLEAK
from kvmi_host.introspect import Session
from kvmi_host.protocol import Access, Action, Event, EventId, PageFault, PageFaultReply
from kvmi_host.testing.live import DEADLINE, LiveGuest, SharedGuests, await_end
from kvmi_host.testing.modules import Paging, paging
from kvmi_host.testing.puppet import MARK, PAGE, Puppet, address, alias, page

pytestmark = pytest.mark.hardware

NO_WRITE = Access.R | Access.X
NO_EXECUTE = Access.R | Access.W
VALUE = 0x1122334455667788
SINGLESTEP = PageFaultReply(singlestep=True)
either_way = pytest.mark.parametrize("reply", [None, SINGLESTEP], ids=["emulated", "stepped"])
PTE_ACCESSED = 1 << 5
PTE_DIRTY = 1 << 6


@pytest.fixture
def puppet(puppet: Puppet) -> Puppet:
    """Both vCPUs tell of page faults; the first pages for tests are zero."""
    for vcpu in (0, 1):
        puppet.session.control_events(vcpu, EventId.PF, True)
    for index in range(4):
        puppet.session.write_physical(page(index), bytes(PAGE))
    return puppet


def value_at(puppet: Puppet, gpa: int, size: int = 8) -> int:
    return int.from_bytes(puppet.session.read_physical(gpa, size), "little")


def lift(puppet: Puppet) -> Callable[[Event], None]:
    """Gives the page free and has the guest try again."""

    def answer(event: Event) -> None:
        puppet.session.set_page_access({event.data.gpa & -PAGE: Access.ALL})
        puppet.session.reply(event, Action.RETRY)

    return answer


def made(puppet: Puppet, reply: PageFaultReply | None) -> Callable[[Event], None]:
    """Has the access made, with the page watched as before: emulated, or by a single step."""
    return lambda event: puppet.session.reply(event, page_fault=reply)


ACCESSES = {
    # snippet: its registers besides RSI, what it tries, what the page may then not do
    "read8": ({}, Access.R, Access.NONE),
    "read64": ({}, Access.R, Access.NONE),
    "read_sse": ({}, Access.R, Access.NONE),
    "write8": ({"rax": 0x55}, Access.W, NO_WRITE),
    "write64": ({"rax": VALUE}, Access.W, NO_WRITE),
    "write_sse": ({}, Access.W, NO_WRITE),
}


@pytest.mark.rule("4.16", "4.74")
@pytest.mark.parametrize("snippet", ACCESSES)
def test_an_access_that_is_not_allowed_is_an_event(puppet: Puppet, snippet: str) -> None:
    registers, access, allowed = ACCESSES[snippet]
    puppet.session.set_page_access({page(0): allowed})
    (event,), result = puppet.watch(0, snippet, rsi=page(0) + 0x120, **registers)
    assert (event.event, event.vcpu, event.rip) == (EventId.PF, 0, address(snippet))
    assert event.data == PageFault(gva=page(0) + 0x120, gpa=page(0) + 0x120, access=access, view=0)
    assert result.exceptions == 0


@pytest.mark.rule("4.16")
def test_gva_and_gpa_are_two_things(puppet: Puppet) -> None:
    gva, gpa = alias(5)
    puppet.session.set_page_access({gpa: NO_WRITE})
    (event,), _ = puppet.watch(0, "write8", rsi=gva + 0xFFF)
    assert (event.data.gva, event.data.gpa) == (gva + 0xFFF, gpa + 0xFFF)


@pytest.mark.rule("4.16")
@pytest.mark.parametrize("allowed", [Access.NONE, Access.R, NO_EXECUTE], ids=["none", "r", "rw"])
def test_running_a_page_that_is_not_executable_is_an_event(puppet: Puppet, allowed: Access) -> None:
    own_page = address("own_page")
    puppet.session.set_page_access({own_page: allowed})
    (event,), result = puppet.watch(0, "call", lift(puppet), rsi=own_page)
    assert event.rip == own_page
    assert (event.data.gva, event.data.gpa, event.data.view) == (own_page, own_page, 0)
    assert event.data.access & Access.X
    assert (result.registers.rax, result.exceptions) == (MARK, 0)


@pytest.mark.rule("4.17")
@pytest.mark.parametrize(
    ("allowed", "snippets"),
    [(NO_WRITE, ["read8", "read64"]), (NO_EXECUTE, ["read8", "write8", "lock_add"]), (Access.R, ["read8"])],
    ids=["rx", "rw", "r"],
)
def test_what_is_allowed_is_no_event(puppet: Puppet, allowed: Access, snippets: list[str]) -> None:
    puppet.session.set_page_access({page(0): allowed})
    for snippet in snippets:
        puppet.run(0, snippet, rsi=page(0))


# -- what the reply does


@pytest.mark.rule("4.19", "3.35")
def test_retry_after_lifting_the_access_makes_it(puppet: Puppet) -> None:
    puppet.session.set_page_access({page(0): NO_WRITE})
    events, _ = puppet.watch(0, "write64", lift(puppet), rsi=page(0), rax=VALUE)
    assert len(events) == 1
    assert value_at(puppet, page(0)) == VALUE


@pytest.mark.rule("4.19")
def test_retry_alone_meets_the_page_again(puppet: Puppet) -> None:
    puppet.session.set_page_access({page(0): NO_WRITE})
    actions = iter([Action.RETRY, Action.RETRY, Action.CONTINUE])
    events, _ = puppet.watch(
        0, "lock_add", lambda event: puppet.session.reply(event, next(actions)), rsi=page(0), rax=1
    )
    assert [event.data.gpa for event in events] == [page(0)] * 3
    assert value_at(puppet, page(0)) == 1


EFFECTS = {
    # snippet: registers besides RSI, what the page holds before, and after
    "write8": ({"rax": 0x55}, 0x0102, 0x0155),
    "write64": ({"rax": VALUE}, 1, VALUE),
    "lock_add": ({"rax": 3}, 4, 7),
    "lock_cmpxchg": ({"rax": 4, "rcx": 9}, 4, 9),
    "xchg": ({"rax": 6}, 5, 6),
}


@pytest.mark.rule("4.18", "4.21")
@either_way
@pytest.mark.parametrize("snippet", EFFECTS)
@pytest.mark.parametrize("allowed", [Access.NONE, NO_WRITE], ids=["none", "rx"])
def test_continue_makes_the_access_once_and_the_page_stays_watched(
    puppet: Puppet, snippet: str, reply: PageFaultReply | None, allowed: Access
) -> None:
    registers, before, after = EFFECTS[snippet]
    for _ in range(2):
        puppet.session.write_physical(page(0), before.to_bytes(8, "little"))
        puppet.session.set_page_access({page(0): allowed})
        events, result = puppet.watch(0, snippet, made(puppet, reply), rsi=page(0), **registers)
        assert events
        assert {event.rip for event in events} == {address(snippet)}
        assert value_at(puppet, page(0)) == after
        assert result.exceptions == 0
        assert puppet.session.page_access(page(0)) == (allowed,)


@pytest.mark.rule("4.18", "4.21")
@either_way
def test_continue_reads_what_is_there(puppet: Puppet, reply: PageFaultReply | None) -> None:
    puppet.session.write_physical(page(0), VALUE.to_bytes(8, "little"))
    puppet.session.set_page_access({page(0): Access.NONE})
    for _ in range(2):
        events, result = puppet.watch(0, "read64", made(puppet, reply), rsi=page(0))
        assert len(events) == 1
        assert result.registers.rax == VALUE


@pytest.mark.rule("4.18", "4.21")
@either_way
def test_continue_on_a_page_that_is_not_executable_runs_one_instruction(
    puppet: Puppet, reply: PageFaultReply | None
) -> None:
    own_page = address("own_page")
    ret = own_page + 5
    puppet.session.set_page_access({own_page: NO_EXECUTE})
    events, result = puppet.watch(0, "call", made(puppet, reply), rsi=own_page)
    assert [event.rip for event in events] == [own_page, ret]
    assert (result.registers.rax, result.exceptions) == (MARK, 0)


@pytest.mark.rule("4.16")
def test_an_instruction_that_lies_in_two_pages_meets_both(puppet: Puppet) -> None:
    first, second = address("straddle") & -PAGE, (address("straddle") & -PAGE) + PAGE
    puppet.session.set_page_access({first: NO_EXECUTE, second: NO_EXECUTE})
    events, result = puppet.watch(0, "straddle", lift(puppet))
    assert [event.data.gpa & -PAGE for event in events] == [first, second]
    assert result.registers.rax == VALUE


@pytest.mark.rule("4.19", "3.18")
def test_set_registers_moves_on_past_the_access(puppet: Puppet) -> None:
    write_size = 2

    def skip(event: Event) -> None:
        puppet.session.set_registers(0, event.registers._replace(rip=event.rip + write_size))
        puppet.session.reply(event, Action.RETRY)

    puppet.session.set_page_access({page(0): NO_WRITE})
    events, _ = puppet.watch(0, "write8", skip, rsi=page(0), rax=0x55)
    assert len(events) == 1
    assert value_at(puppet, page(0), 1) == 0


# -- which pages


@pytest.mark.rule("4.17")
@pytest.mark.parametrize("base", ["pages", "large"])
def test_pages_next_to_it_are_free(puppet: Puppet, base: str) -> None:
    watched = address(base) + 7 * PAGE
    for index in range(16):
        puppet.run(0, "write8", rsi=address(base) + index * PAGE)
    puppet.session.set_page_access({watched: NO_WRITE})
    for neighbour in (watched - 1, watched + PAGE, address(base)):
        puppet.run(0, "write8", rsi=neighbour)
    events, _ = puppet.watch(0, "write8", rsi=watched)
    assert [event.data.gpa for event in events] == [watched]


@pytest.mark.rule("4.16", "3.34", "3.35")
def test_every_page_of_many_is_watched(puppet: Puppet) -> None:
    large = address("large")
    watched = [large + index * PAGE for index in range(0, 1024, 37)]
    puppet.session.set_page_access(dict.fromkeys(watched, NO_WRITE))
    for gpa in watched:
        (event,), _ = puppet.watch(0, "write8", rsi=gpa)
        assert event.data.gpa == gpa
    puppet.session.set_page_access(dict.fromkeys(watched, Access.ALL))
    for gpa in watched:
        puppet.run(0, "write8", rsi=gpa)


@pytest.mark.rule("4.16", "4.18")
@either_way
def test_a_string_that_crosses_into_a_watched_page_is_copied_whole(
    puppet: Puppet, reply: PageFaultReply | None
) -> None:
    data = bytes(range(1, 41))
    puppet.session.write_physical(page(3), data)
    puppet.session.set_page_access({page(1): NO_WRITE})
    events, result = puppet.watch(0, "rep_movsb", made(puppet, reply), rsi=page(3), rdi=page(1) - 20, rcx=len(data))
    assert events
    assert {event.rip for event in events} == {address("rep_movsb")}
    assert {event.data.gpa & -PAGE for event in events} == {page(1)}
    assert events[0].data.gpa == page(1)
    assert puppet.session.read_physical(page(0) + PAGE - 20, 20) == data[:20]
    assert puppet.session.read_physical(page(1), 20) == data[20:]
    assert (result.registers.rcx, result.registers.rdi) == (0, page(1) + 20)


@pytest.mark.rule("4.20")
@pytest.mark.parametrize("size", [8, 256])
def test_the_reply_says_what_the_guest_reads(puppet: Puppet, size: int) -> None:
    puppet.session.set_page_access({page(0): Access.NONE})
    custom = PageFaultReply(ctx_addr=page(0), ctx_data=VALUE.to_bytes(8, "little") * (size // 8))
    _, result = puppet.watch(0, "read64", made(puppet, custom), rsi=page(0) + size - 8)
    assert result.registers.rax == VALUE
    assert value_at(puppet, page(0) + size - 8) == 0


@pytest.mark.rule("4.20")
def test_what_the_reply_does_not_cover_is_read_from_memory(puppet: Puppet) -> None:
    puppet.session.write_physical(page(0), VALUE.to_bytes(8, "little"))
    puppet.session.set_page_access({page(0): Access.NONE})
    custom = PageFaultReply(ctx_addr=page(0) + 4, ctx_data=bytes(16))
    _, result = puppet.watch(0, "read64", made(puppet, custom), rsi=page(0))
    assert result.registers.rax == VALUE


@pytest.mark.rule("4.22")
def test_a_long_string_is_asked_about_less_often_if_the_reply_completes_it(puppet: Puppet) -> None:
    def asked(reply: PageFaultReply) -> int:
        puppet.session.set_page_access({page(1): NO_WRITE})
        events, result = puppet.watch(0, "rep_movsb", made(puppet, reply), rsi=page(3), rdi=page(1), rcx=PAGE)
        assert result.registers.rcx == 0
        return len(events)

    # An interrupt of the guest may come in between. Where the kernel checks itself, one does each time.
    often, less_often = (
        min(asked(reply) for _ in range(5)) for reply in (PageFaultReply(), PageFaultReply(rep_complete=True))
    )
    assert less_often < often or (KMEMLEAK.exists() and less_often == often)


@pytest.mark.rule("4.51")
@pytest.mark.parametrize(
    "own",
    [
        struct.pack("<QIBB2x256x", 0, 257, 0, 0),
        struct.pack("<QIBB2x256x", 0, 0, 2, 0),
        struct.pack("<QIBB2x256x", 0, 0, 0, 2),
        struct.pack("<QIBBH256x", 0, 0, 0, 0, 1),
        bytes(273),
    ],
    ids=["ctx_size", "singlestep", "rep_complete", "padding", "a byte too many"],
)
def test_an_invalid_reply_ends_the_session_and_the_access_is_made(
    own_puppet: LiveGuest, hooked: Callable[..., Session], own: bytes
) -> None:
    puppet = Puppet(hooked(own_puppet))
    puppet.session.control_events(0, EventId.PF, True)
    puppet.session.write_physical(page(0), bytes(8))
    puppet.session.set_page_access({page(0): NO_WRITE})
    puppet.start(0, "write64", rsi=page(0), rax=VALUE)
    event = puppet.session.next_event(DEADLINE)
    assert event
    body = struct.pack("<HHIBBHI", 0, 0, 0, Action.CONTINUE, EventId.PF, 0, 0) + own
    puppet.session.send_raw(struct.pack("<HHI", 0, len(body), event.seq) + body)
    await_end(puppet.session)
    again = Puppet(hooked(own_puppet))
    again.finish(0)
    assert value_at(again, page(0)) == VALUE


@pytest.mark.rule("4.16")
def test_an_access_that_crosses_into_a_watched_page_is_an_event(puppet: Puppet) -> None:
    puppet.session.set_page_access({page(1): NO_WRITE})
    events, _ = puppet.watch(0, "write64", rsi=page(1) - 4, rax=VALUE)
    assert [event.data.gpa for event in events] == [page(1)]
    assert value_at(puppet, page(1) - 4, 4) | value_at(puppet, page(1), 4) << 32 == VALUE


@pytest.mark.rule("4.23", "4.24", either=True)
@either_way
def test_the_guests_page_walk_into_a_watched_page_table_goes_through(
    puppet: Puppet, reply: PageFaultReply | None
) -> None:
    gva, gpa = alias(3)
    entry = address("alias_table") + 3 * 8
    puppet.session.write_physical(gpa, b"\x42")
    puppet.session.write_physical(entry, (gpa | 3).to_bytes(8, "little"))
    puppet.run(0, "invlpg", rsi=gva)
    puppet.session.set_page_access({address("alias_table"): NO_WRITE})
    events, result = puppet.watch(0, "read8", made(puppet, reply), rsi=gva)
    # Where KVM walks the tables itself, to shadow them, nothing of the guest's touches them.
    walked = {address("alias_table")} if paging() is Paging.NESTED else set()
    assert {event.data.gpa & -PAGE for event in events} == walked
    assert all(event.data.access & Access.W for event in events)
    assert (result.registers.rax, result.exceptions) == (0x42, 0)
    assert value_at(puppet, entry) & PTE_ACCESSED
    puppet.watch(0, "write8", made(puppet, reply), rsi=gva, rax=0x43)
    assert value_at(puppet, entry) & PTE_DIRTY
    assert value_at(puppet, gpa, 1) == 0x43


# -- which vCPUs, and for how long


@pytest.mark.rule("4.16")
def test_each_vcpu_tells_of_its_own_accesses(puppet: Puppet) -> None:
    puppet.session.set_page_access({page(0): NO_WRITE})
    for vcpu in (1, 0, 1):
        (event,), _ = puppet.watch(vcpu, "lock_add", rsi=page(0), rax=1)
        assert event.vcpu == vcpu
    assert value_at(puppet, page(0)) == 3


@pytest.mark.rule("4.18")
def test_while_one_vcpu_waits_the_page_stays_watched_for_the_other(puppet: Puppet) -> None:
    puppet.session.set_page_access({page(0): NO_WRITE})
    puppet.start(0, "lock_add", rsi=page(0), rax=1)
    first = puppet.event()
    puppet.start(1, "lock_add", rsi=page(0), rax=1)
    second = puppet.event()
    assert (first.vcpu, second.vcpu) == (0, 1)
    puppet.session.reply(second)
    puppet.finish(1)
    assert value_at(puppet, page(0)) == 1
    puppet.session.reply(first)
    puppet.finish(0)
    assert value_at(puppet, page(0)) == 2


@pytest.mark.rule("4.21")
def test_a_step_of_one_vcpu_does_not_open_the_page_to_the_other(puppet: Puppet) -> None:
    rounds = 30
    puppet.session.set_page_access({page(0): NO_WRITE})
    for vcpu in (0, 1):
        puppet.start(vcpu, "loop_write64", rsi=page(0), r15=rounds)
    events = [event for vcpu in (0, 1) for event in puppet.watch_on(vcpu, made(puppet, SINGLESTEP))[0]]
    # A step that is interrupted before its access is begun again, with an event.
    missed = {(vcpu, left) for vcpu in (0, 1) for left in range(1, rounds + 1)}
    assert not missed - {(event.vcpu, event.registers.r15) for event in events}


@pytest.mark.rule("4.34", "4.35")
def test_a_vcpu_whose_event_is_off_makes_its_accesses(puppet: Puppet) -> None:
    puppet.session.control_events(1, EventId.PF, False)
    puppet.session.set_page_access({page(0): NO_WRITE})
    puppet.run(1, "write64", rsi=page(0), rax=VALUE)
    assert value_at(puppet, page(0)) == VALUE
    assert len(puppet.watch(0, "write8", rsi=page(0))[0]) == 1


@pytest.mark.rule("4.25")
def test_the_introspectors_own_accesses_are_none_of_the_guests(puppet: Puppet) -> None:
    puppet.session.set_page_access({page(0): Access.NONE})
    puppet.session.write_physical(page(0), b"x")
    assert puppet.session.read_physical(page(0), 1) == b"x"
    assert puppet.session.waiting == 0
    assert len(puppet.watch(0, "read8", rsi=page(0))[0]) == 1


@pytest.mark.rule("2.23", "5.19")
@pytest.mark.parametrize("waiting", [False, True], ids=["at home", "waiting for a reply"])
def test_the_end_of_the_session_gives_all_access_back(
    puppet_guest: LiveGuest, puppet: Puppet, hooked: Callable[..., Session], waiting: bool
) -> None:
    puppet.session.set_page_access({page(0): NO_WRITE, page(1): Access.NONE, address("own_page"): NO_EXECUTE})
    if waiting:
        puppet.start(0, "write64", rsi=page(0), rax=VALUE)
        puppet.event()
    puppet.session.close()
    again = Puppet(hooked(puppet_guest))
    again.finish(0)
    assert value_at(again, page(0)) == (VALUE if waiting else 0)
    again.session.control_events(0, EventId.PF, True)
    again.run(0, "write64", rsi=page(0), rax=1)
    again.run(0, "read64", rsi=page(1))
    again.run(0, "call", rsi=address("own_page"))


# -- what else changes the VM's mapping of guest memory


@pytest.fixture
def own_puppet(shared: SharedGuests) -> Iterator[LiveGuest]:
    """A puppet guest whose QEMU the test may tell to do things; it has room for more memory."""
    shared.stand_aside()
    with LiveGuest(1, "puppet", memory="32,slots=2,maxmem=256M") as guest:
        yield guest.booted()


def tells_of_writes(puppet: Puppet) -> bool:
    events = [*puppet.watch(0, "write8", rsi=page(0))[0], *puppet.watch(0, "write8", rsi=page(1))[0]]
    return [event.data.gpa for event in events] == [page(0)]


@pytest.mark.rule("4.26")
def test_pages_stay_watched_while_qemu_logs_writes_and_afterwards(
    own_puppet: LiveGuest, hooked: Callable[..., Session]
) -> None:
    puppet = Puppet(hooked(own_puppet))
    puppet.session.control_events(0, EventId.PF, True)
    puppet.session.set_page_access({page(0): NO_WRITE})
    assert tells_of_writes(puppet)
    monitor = own_puppet.monitor
    monitor.command("calc-dirty-rate", calc_time=4, mode="dirty-bitmap")
    assert tells_of_writes(puppet)
    assert monitor.command("query-dirty-rate")["status"] == "measuring"
    deadline = monotonic() + DEADLINE
    while monitor.command("query-dirty-rate")["status"] == "measuring":
        assert tells_of_writes(puppet)
        assert monotonic() < deadline
    assert tells_of_writes(puppet)
    assert puppet.session.page_access(page(0), page(1)) == (NO_WRITE, Access.ALL)


@pytest.mark.rule("4.26")
def test_pages_stay_watched_when_memory_is_plugged_in(own_puppet: LiveGuest, hooked: Callable[..., Session]) -> None:
    puppet = Puppet(hooked(own_puppet))
    puppet.session.control_events(0, EventId.PF, True)
    puppet.session.set_page_access({page(0): NO_WRITE})
    before = puppet.session.max_gfn()
    monitor = own_puppet.monitor
    monitor.command("object-add", qom_type="memory-backend-ram", id="more", size=64 << 20)
    monitor.command("device_add", driver="pc-dimm", id="dimm", memdev="more")
    assert puppet.session.max_gfn() > before
    assert tells_of_writes(puppet)
    added = puppet.session.max_gfn() * PAGE
    assert puppet.session.page_access(page(0), added) == (NO_WRITE, Access.ALL)
    puppet.session.set_page_access({added: Access.NONE})
    assert puppet.session.page_access(added) == (Access.NONE,)
