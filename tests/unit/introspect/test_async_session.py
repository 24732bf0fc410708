# SPDX-License-Identifier: LGPL-2.1-or-later
"""A session of asyncio with the simulated kernel: what is not as in the blocking one, and what has to be."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kvmi_host.introspect import SessionClosed, SessionTimeout
from kvmi_host.introspect.async_session import AsyncSession
from kvmi_host.introspect.session import MAX_WAITING_EVENTS
from kvmi_host.protocol import Action, Command, CommandError, ErrorCode, EventId, ProtocolError, frame, messages
from kvmi_host.testing.event_loop import DEADLINE, in_a_loop
from kvmi_host.testing.peer import SimulatedKernel, next_reply

CR3_WRITE = bytes.fromhex("0300 000000000000 0010000000000000 0020000000000000")
HYPERCALL_EVENT = bytes.fromhex("2002 0000 05 000000 08") + bytes(535)


@asynccontextmanager
async def pair(
    vcpus=1, *, timeout=5.0, on_event=None, **settings
) -> AsyncIterator[tuple[SimulatedKernel, AsyncSession]]:
    """A simulated kernel with the given settings, and a session with it."""
    ours, kernels = socket.socketpair()
    with kernels:
        kernel = SimulatedKernel(kernels, vcpus, **settings)
    with kernel:
        async with await AsyncSession.open(ours, timeout=timeout, on_event=on_event) as session:
            yield kernel, session


@asynccontextmanager
async def ends(timeout=0.1, on_event=None) -> AsyncIterator[tuple[socket.socket, AsyncSession]]:
    """A bare peer's socket, and a session with it."""
    ours, theirs = socket.socketpair()
    with theirs:
        async with await AsyncSession.open(ours, timeout=timeout, on_event=on_event) as session:
            yield theirs, session


# -- commands


@in_a_loop
async def test_a_command_gives_what_its_answer_says():
    async with pair(vcpus=2) as (_, session):
        assert (await session.ask(messages.get_version())).dialect == "v6"
        assert await session.ask(messages.guest_info()) == 2


@in_a_loop
async def test_a_refusal_is_an_error_and_the_session_goes_on():
    async with pair() as (_, session):
        with pytest.raises(CommandError) as caught:
            await session.ask(messages.raw(61))
        assert caught.value.code is ErrorCode.EOPNOTSUPP
        assert await session.ask(messages.guest_info()) == 1


@in_a_loop
async def test_tasks_that_ask_at_once_get_their_own_answers():
    async with pair(pages=50) as (kernel, session):
        for page in range(50):
            kernel.memory[4096 * page] = page
        reads = [session.ask(messages.read_physical(4096 * page, 1)) for page in range(50)]
        assert await asyncio.gather(*reads) == [bytes([page]) for page in range(50)]


@in_a_loop
async def test_answers_that_come_out_of_order_find_their_commands():
    async with ends(timeout=5.0) as (peer, session):
        asked = [asyncio.ensure_future(session.ask(messages.max_gfn())) for _ in range(2)]
        await asyncio.sleep(0)
        peer.sendall(bytes.fromhex("1d00 1000 02000000 00000000 00000000 2200000000000000"))
        peer.sendall(bytes.fromhex("1d00 1000 01000000 00000000 00000000 1100000000000000"))
        assert await asyncio.gather(*asked) == [0x11, 0x22]


@in_a_loop
async def test_more_commands_and_answers_than_the_socket_holds_go_through():
    async with pair(pages=1) as (_, session):
        writes = [messages.write_physical(0, bytes([n % 256]) * 4096) for n in range(500)]
        reads = [messages.read_physical(0, 4096) for _ in range(500)]
        assert await session.ask_all(writes + reads) == [None] * 500 + [bytes([499 % 256]) * 4096] * 500


@in_a_loop
async def test_of_many_commands_the_first_refusal_is_raised_when_all_were_answered():
    async with pair(commands=[Command.CONTROL_CR]) as (kernel, session):
        requests = [messages.control_cr(7, 3, True), messages.max_gfn(), messages.control_cr(0, 3, True)]
        with pytest.raises(CommandError) as caught:
            await session.ask_all(requests)
        assert (caught.value.command, caught.value.code) == (Command.CONTROL_CR, ErrorCode.EINVAL)
        assert kernel.watched_registers() == frozenset({3})


@in_a_loop
async def test_with_answers_off_commands_wait_for_none():
    async with pair() as (kernel, session):
        await session.ask(messages.control_cmd_response(False, now=True))
        await session.ask_all([messages.control_cr(0, register, True) for register in (0, 3)])
        await session.ask(messages.control_cmd_response(True, now=True))
        assert kernel.watched_registers() == frozenset({0, 3})


@in_a_loop
async def test_an_answer_that_comes_after_its_task_was_cancelled_is_passed_over():
    async with ends(timeout=5.0) as (peer, session):
        given_up = asyncio.ensure_future(session.ask(messages.max_gfn()))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait([given_up])
        peer.sendall(bytes.fromhex("1d00 1000 01000000 00000000 00000000 1100000000000000"))
        peer.sendall(bytes.fromhex("1d00 1000 02000000 00000000 00000000 2200000000000000"))
        assert await session.ask(messages.max_gfn()) == 0x22


# -- events


@in_a_loop
async def test_an_event_waits_for_its_reply():
    async with pair(vcpus=2) as (kernel, session):
        replies = kernel.fire(EventId.CR, vcpu=1, own=CR3_WRITE)
        event = await session.next_event()
        assert (event.vcpu, event.event, event.data.new) == (1, EventId.CR, 0x2000)
        session.reply(event, new_val=0x3000)
        assert next_reply(replies).own == bytes.fromhex("0030000000000000")


@in_a_loop
async def test_no_event_in_time_is_none_and_not_an_error():
    async with pair() as (_, session):
        assert await session.next_event(0) is None
        assert await session.next_event(0.01) is None
        assert await session.ask(messages.guest_info()) == 1


@in_a_loop
async def test_each_wait_has_its_own_deadline():
    async with pair(timeout=DEADLINE * 10) as (kernel, session):
        for timeout in (0.1, None):
            replies = kernel.fire(EventId.HYPERCALL)
            session.reply(await session.next_event(timeout))
            next_reply(replies)
        assert await session.next_event(0.01) is None
        assert await session.next_event(0.02) is None


@in_a_loop
async def test_an_event_that_is_there_is_seen_by_who_only_looks():
    async with pair() as (kernel, session):
        kernel.fire(EventId.HYPERCALL)
        assert (await session.next_event(0)).event is EventId.HYPERCALL


@in_a_loop
async def test_events_are_kept_in_order_while_answers_are_awaited():
    async with pair(vcpus=4) as (kernel, session):
        for vcpu in (2, 0, 3, 1):
            kernel.fire(EventId.HYPERCALL, vcpu=vcpu)
        assert await session.ask(messages.guest_info()) == 4
        assert session.waiting == 4
        assert [(await session.next_event()).vcpu for _ in range(4)] == [2, 0, 3, 1]


@in_a_loop
async def test_only_one_task_may_wait_for_the_next_event():
    async with pair() as (kernel, session):
        first = asyncio.ensure_future(session.next_event())
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="another task"):
            await session.next_event()
        kernel.fire(EventId.HYPERCALL)
        assert (await first).event is EventId.HYPERCALL


@in_a_loop
async def test_on_event_is_called_with_each_event_and_may_reply():
    seen = []

    def on_event(session, event):
        seen.append((event.vcpu, event.event))
        session.reply(event, Action.CRASH)

    async with pair(vcpus=2, on_event=on_event) as (kernel, session):
        replies = [kernel.fire(EventId.HYPERCALL, vcpu=vcpu) for vcpu in (1, 0)]
        assert await session.ask(messages.guest_info()) == 2
        assert [next_reply(reply).action for reply in replies] == [Action.CRASH] * 2
        assert seen == [(1, EventId.HYPERCALL), (0, EventId.HYPERCALL)]
        with pytest.raises(ValueError, match="on_event"):
            await session.next_event(0)


@in_a_loop
async def test_a_handler_that_raises_ends_its_session_and_the_loop_is_told():
    told = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
    failure = RuntimeError("a bug of the handler")

    def on_event(session, event):
        raise failure

    async with pair(on_event=on_event) as (kernel, session):
        replies = kernel.fire(EventId.HYPERCALL)
        await session.wait_closed()
        assert next_reply(replies) is None
        with pytest.raises(SessionClosed, match="on_event raised"):
            await session.ask(messages.guest_info())
    assert told == [failure]


# -- the end


@in_a_loop
async def test_the_end_of_the_session_is_told_after_its_last_event():
    async with pair() as (kernel, session):
        kernel.fire(EventId.HYPERCALL)
        kernel.end("the VM died")
        event = await session.next_event()
        assert event.event is EventId.HYPERCALL
        with pytest.raises(SessionClosed):
            await session.next_event()
        with pytest.raises(SessionClosed):
            await session.ask(messages.guest_info())
        with pytest.raises(SessionClosed):
            session.reply(event)


@in_a_loop
async def test_who_waits_is_told_of_the_end():
    async with ends(timeout=60.0) as (peer, session):
        waiting = [asyncio.ensure_future(one) for one in (session.next_event(), session.ask(messages.max_gfn()))]
        await asyncio.sleep(0)
        peer.close()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [SessionClosed, SessionClosed]


@in_a_loop
async def test_a_closed_session_says_so():
    async with pair() as (kernel, session):
        session.close()
        assert session.closed
        session.close()
        for use in (session.ask(messages.guest_info()), session.next_event()):
            with pytest.raises(SessionClosed):
                await use
        await session.wait_closed()
        assert kernel.wait_ended() == "the introspector closed"


# -- bad peers


@in_a_loop
async def test_a_peer_that_does_not_answer_is_a_timeout_and_a_late_answer_is_not_taken_for_the_next():
    async with ends() as (peer, session):
        with pytest.raises(SessionTimeout, match=r"1 of 1 commands: no answer in 0\.1 s"):
            await session.ask(messages.max_gfn())
        peer.sendall(bytes.fromhex("1d00 1000 01000000 00000000 00000000 1100000000000000"))
        peer.sendall(bytes.fromhex("1d00 1000 02000000 00000000 00000000 2200000000000000"))
        assert await session.ask(messages.max_gfn()) == 0x22


@in_a_loop
async def test_commands_to_a_peer_that_does_not_read_are_a_timeout():
    async with ends() as (_, session):
        with pytest.raises(SessionTimeout, match="has not read"):
            await session.ask_all([messages.write_physical(0, bytes(4096))] * 1000)


@in_a_loop
async def test_replies_to_a_peer_that_does_not_read_end_the_session_before_they_fill_our_memory():
    def send_on(session):
        for _ in range(1000):
            session.send_raw(bytes(8192))

    async with ends() as (_, session):
        with pytest.raises(SessionClosed, match="does not read"):
            send_on(session)


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "announces"),
        (bytes.fromhex("0100 f91f 01000000"), "8185"),
        (frame(1, 1, HYPERCALL_EVENT[:100]), "regs"),
        (bytes.fromhex("0200 1000 05000000 00000000 00000000 01000000 00000000"), "nobody asked"),
    ],
)
@in_a_loop
async def test_what_a_kernel_does_not_send_is_a_protocol_error_for_all(sent, why):
    async with ends(timeout=5.0) as (peer, session):
        peer.sendall(sent)
        for use in (session.next_event(), session.ask(messages.max_gfn())):
            with pytest.raises(ProtocolError, match=why):
                await use
        assert session.closed


@in_a_loop
async def test_a_peer_that_dies_in_the_middle_of_a_message_is_a_protocol_error():
    async with ends(timeout=5.0) as (peer, session):
        peer.sendall(frame(1, 1, HYPERCALL_EVENT)[:-1])
        peer.close()
        with pytest.raises(ProtocolError, match="middle of a message"):
            await session.next_event()


@in_a_loop
async def test_a_peer_that_sends_events_without_end_does_not_fill_our_memory():
    async with ends(timeout=5.0) as (peer, session):
        peer.setblocking(False)
        flood = b"".join(frame(1, seq, HYPERCALL_EVENT) for seq in range(1, MAX_WAITING_EVENTS + 200))
        sending = asyncio.ensure_future(asyncio.get_running_loop().sock_sendall(peer, flood))
        await session.wait_closed()
        await asyncio.gather(sending, return_exceptions=True)  # the connection may have ended before all was sent
        assert session.waiting == MAX_WAITING_EVENTS
        with pytest.raises(ProtocolError, match="without waiting for a reply"):
            await session.ask(messages.guest_info())


@in_a_loop
async def test_sessions_of_one_loop_do_not_mix_what_they_receive():
    async with pair(vcpus=1) as (one_kernel, one), pair(vcpus=2) as (other_kernel, other):
        asked = [session.ask(messages.guest_info()) for session in (one, other) * 20]
        assert await asyncio.gather(*asked) == [1, 2] * 20
        one_kernel.fire(EventId.HYPERCALL)
        other_kernel.fire(EventId.HYPERCALL, vcpu=1)
        assert ((await one.next_event()).vcpu, (await other.next_event()).vcpu) == (0, 1)
