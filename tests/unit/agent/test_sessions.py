# SPDX-License-Identifier: LGPL-2.1-or-later
"""The sessions of many VMs: their handlers, and that nothing one of them does harms another, or a guest."""

import asyncio
import socket
from collections.abc import Mapping
from contextlib import asynccontextmanager
from uuid import UUID

from kvmi_host.agent import attendant, sessions
from kvmi_host.agent.config import Config, Listen, Rule
from kvmi_host.agent.metrics import Metrics
from kvmi_host.agent.plugins import Setup
from kvmi_host.agent.sessions import Sessions
from kvmi_host.introspect import CR3, HYPERCALL, XSETBV, Breakpoint, PeerInfo
from kvmi_host.protocol import Action, Command, EventId
from kvmi_host.testing.event_loop import in_a_loop
from kvmi_host.testing.peer import SimulatedKernel, next_reply

WEB = PeerInfo(UUID("00112233-4455-6677-8899-aabbccddeeff"), "webserver")
DB = PeerInfo(UUID("11112233-4455-6677-8899-aabbccddeeff"), "database")
NAMELESS = PeerInfo(UUID(int=0))


def config(handlers: Mapping[str, Setup], match: str = "*") -> Config:
    return Config(Listen(), None, "info", (Rule(match, handlers),))


def on(*interests, do=lambda event: None) -> Setup:
    """Sets up one handler."""
    return lambda vm: vm.on(*interests)(do)


class House:
    """The sessions of an agent, and simulated kernels for its VMs."""

    def __init__(self, handlers: Mapping[str, Setup], match: str = "*") -> None:
        self.metrics = Metrics()
        self.sessions = Sessions(config(handlers, match), self.metrics)
        self.kernels: list[SimulatedKernel] = []

    def errors(self) -> dict[str, int]:
        return {str(kind): count for kind, count in self.metrics.errors.items() if count}

    def come(self, peer: PeerInfo = WEB, vcpus: int = 1, **settings: object) -> SimulatedKernel:
        """A VM whose handshake is done."""
        ours, kernels = socket.socketpair()
        with kernels:
            self.kernels.append(SimulatedKernel(kernels, vcpus, **settings))
        self.sessions.admit(ours, peer)
        return self.kernels[-1]

    async def watching(self, kernel: SimulatedKernel, event: int = EventId.UNHOOK, enabled: bool = True) -> None:
        await asyncio.to_thread(kernel.await_enabled, event, 0, enabled)

    async def reply(self, kernel: SimulatedKernel, event: int = EventId.HYPERCALL, vcpu: int = 0) -> int:
        """The action that an event is answered with."""
        return (await asyncio.to_thread(next_reply, kernel.fire(event, vcpu))).action

    async def ended(self, kernel: SimulatedKernel) -> str:
        return await asyncio.to_thread(kernel.wait_ended)


@asynccontextmanager
async def house(handlers: Mapping[str, Setup] | None = None, match: str = "*"):
    house = House({} if handlers is None else handlers, match)
    try:
        yield house
    finally:
        await house.sessions.close()
        for kernel in house.kernels:
            kernel.__exit__(None, None, None)


# -- handlers


@in_a_loop
async def test_a_vm_has_the_handlers_of_its_rule():
    async with house({"a": on(HYPERCALL), "b": on(CR3)}, match="web*") as h:
        web, db = h.come(WEB), h.come(DB)
        await h.watching(web, EventId.HYPERCALL)
        await h.watching(web, EventId.CR)
        await h.watching(db)
        assert not db.enabled(EventId.HYPERCALL)


@in_a_loop
async def test_a_handler_answers_its_events():
    async with house({"a": on(HYPERCALL, do=lambda event: event.reply(Action.CRASH))}) as h:
        vm = h.come()
        await h.watching(vm, EventId.HYPERCALL)
        assert await h.reply(vm) == Action.CRASH


@in_a_loop
async def test_a_handler_that_raises_is_reported_and_counted_and_the_guest_goes_on(caplog):
    def bug(event):
        raise LookupError("a bug")

    async with house({"a": on(HYPERCALL, do=bug)}) as h:
        vm = h.come()
        await h.watching(vm, EventId.HYPERCALL)
        assert [await h.reply(vm) for _ in range(3)] == [Action.CONTINUE] * 3
        assert h.errors() == {"handler": 3}
        assert h.metrics.registry.get_sample_value("kvmi_handler_errors_total", {"vm": "webserver"}) == 3
        assert "LookupError: a bug" in caplog.text


@in_a_loop
async def test_a_handler_that_cannot_be_set_up_is_left_out():
    def bug(vm):
        raise LookupError("a bug")

    async with house({"a": bug, "b": on(HYPERCALL)}) as h:
        await h.watching(h.come(), EventId.HYPERCALL)
        assert h.errors() == {"handler": 1}


@in_a_loop
async def test_a_handler_whose_events_are_not_allowed_is_left_out(monkeypatch, caplog):
    monkeypatch.setattr(attendant, "_SETTLING_SECONDS", 0.0)
    async with house({"a": on(XSETBV, HYPERCALL), "b": on(CR3)}) as h:
        vm = h.come(events=[EventId.UNHOOK, EventId.HYPERCALL, EventId.CR])
        await h.watching(vm, EventId.CR)
        assert not vm.enabled(EventId.HYPERCALL)
        assert "handler a is left out: its events are not allowed for this session: xsetbv" in caplog.text
        assert h.errors() == {"refused": 1}


@in_a_loop
async def test_where_handlers_cannot_be_had_the_session_goes_on_without_and_may_have_others():
    async with house({"a": on(HYPERCALL, Breakpoint(0x1000))}) as h:
        vm = h.come(observe=True)
        await asyncio.to_thread(vm.await_carried_out, Command.CONTROL_EVENTS)
        await h.watching(vm, EventId.HYPERCALL, enabled=False)
        assert await h.reply(vm) == Action.CONTINUE
        h.sessions.configure(config({"b": on(CR3)}))
        await h.watching(vm, EventId.CR)
        assert h.errors() == {"refused": 1}


@in_a_loop
async def test_what_is_allowed_a_moment_later_is_waited_for():
    async with house({"a": on(HYPERCALL)}) as h:
        vm = h.come(commands=[], events=[])
        await asyncio.to_thread(vm.await_carried_out, Command.CHECK_COMMAND)
        vm.allow_all()
        await h.watching(vm, EventId.HYPERCALL)
        assert vm.enabled(EventId.UNHOOK)


@in_a_loop
async def test_a_session_that_may_do_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(attendant, "_SETTLING_SECONDS", 0.0)
    async with house({"a": on(HYPERCALL)}) as h:
        vm = h.come(commands=[], events=[])
        assert await h.ended(vm) == "the introspector closed"
        await h.sessions.close()
        assert h.errors() == {"session": 1}


# -- other handlers while the VM is attached


@in_a_loop
async def test_other_handlers_take_over_within_the_same_session():
    async with house({"a": on(HYPERCALL)}) as h:
        vm = h.come()
        await h.watching(vm, EventId.HYPERCALL)
        h.sessions.configure(config({"b": on(CR3)}))
        await h.watching(vm, EventId.CR)
        assert not vm.enabled(EventId.HYPERCALL)
        assert vm.why is None


@in_a_loop
async def test_the_event_that_is_handled_is_handled_to_the_end_before():
    handling, go_on = asyncio.Event(), asyncio.Event()

    async def slow(event):
        handling.set()
        await go_on.wait()
        event.reply(Action.CRASH)

    async with house({"a": on(HYPERCALL, do=slow)}) as h:
        vm = h.come()
        await h.watching(vm, EventId.HYPERCALL)
        reply = asyncio.ensure_future(h.reply(vm))
        await handling.wait()
        h.sessions.configure(config({"b": on(CR3)}))
        go_on.set()
        assert await reply == Action.CRASH
        await h.watching(vm, EventId.CR)


@in_a_loop
async def test_a_change_that_comes_while_handlers_are_set_up_is_not_lost():
    async with house() as h:
        h.sessions.configure(config({"b": on(CR3)}))

        def change(vm):
            h.sessions.configure(config({"b": on(CR3)}))

        h.sessions.configure(config({"a": change}))
        await h.watching(h.come(), EventId.CR)


@in_a_loop
async def test_a_handler_can_end_the_session():
    async with house() as h:

        def once(vm):
            vm.on(HYPERCALL)(lambda event: vm.stop())

        h.sessions.configure(config({"a": once}))
        vm = h.come()
        await h.watching(vm, EventId.HYPERCALL)
        assert await h.reply(vm) == Action.CONTINUE
        assert await h.ended(vm) == "the introspector closed"


# -- the end


@in_a_loop
async def test_unhook_undoes_what_was_done_and_closes():
    async with house({"a": on(HYPERCALL)}) as h:
        vm = h.come(vcpus=2)
        await h.watching(vm, EventId.HYPERCALL)
        vm.fire(EventId.UNHOOK)
        assert await h.ended(vm) == "the introspector closed"
        assert not any(vm.enabled(EventId.HYPERCALL, vcpu) for vcpu in range(2))
        assert h.errors() == {}


@in_a_loop
async def test_the_agents_end_undoes_what_was_done_for_every_vm():
    async with house({"a": on(HYPERCALL)}) as h:
        vms = [h.come(PeerInfo(UUID(int=number), f"vm{number}")) for number in range(1, 9)]
        for vm in vms:
            await h.watching(vm, EventId.HYPERCALL)
        await h.sessions.close()
        assert len(h.sessions) == 0
        for vm in vms:
            assert await h.ended(vm) == "the introspector closed"
            assert not vm.enabled(EventId.HYPERCALL)


@in_a_loop
async def test_a_handler_that_does_not_end_does_not_keep_the_agent(monkeypatch):
    monkeypatch.setattr(sessions, "CLEAN_UP_SECONDS", 0.05)

    async def for_ever(event):
        await asyncio.Event().wait()

    async with house({"a": on(HYPERCALL, do=for_ever)}) as h:
        vm = h.come()
        await h.watching(vm, EventId.HYPERCALL)
        vm.fire(EventId.HYPERCALL)
        await h.sessions.close()
        assert await h.ended(vm) == "the introspector closed"


@in_a_loop
async def test_a_kernel_that_breaks_the_protocol_ends_its_own_session_only():
    async with house({"a": on(HYPERCALL)}) as h:
        bad, good = h.come(WEB), h.come(DB)
        await h.watching(bad, EventId.HYPERCALL)
        await h.watching(good, EventId.HYPERCALL)
        bad.send_raw(b"\xff" * 100)
        await h.ended(bad)
        assert await h.reply(good) == Action.CONTINUE
        assert h.errors() == {"session": 1}


@in_a_loop
async def test_a_vm_that_ends_is_no_error():
    async with house({"a": on(HYPERCALL)}) as h:
        vm, other = h.come(WEB), h.come(DB)
        await h.watching(vm, EventId.HYPERCALL)
        await h.watching(other, EventId.HYPERCALL)
        vm.end("the VM is dead")
        while len(h.sessions) > 1:
            await h.reply(other)
        assert h.errors() == {}


@in_a_loop
async def test_a_kernel_that_says_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(sessions, "COMMAND_SECONDS", 0.05)
    async with house() as h:
        ours, kernels = socket.socketpair()
        with kernels:
            h.sessions.admit(ours, WEB)
            kernels.setblocking(False)
            while await asyncio.get_running_loop().sock_recv(kernels, 4096):
                pass
        await h.sessions.close()
        assert h.errors() == {"session": 1}


# -- a VM that comes again


@in_a_loop
async def test_a_vm_that_announces_itself_again_has_its_old_session_ended_first():
    async with house({"a": on(HYPERCALL)}) as h:
        old = h.come()
        await h.watching(old, EventId.HYPERCALL)
        await h.sessions.make_room(WEB)
        assert await h.ended(old) == "the introspector closed"
        assert not old.enabled(EventId.HYPERCALL)
        await h.watching(h.come(), EventId.HYPERCALL)


@in_a_loop
async def test_of_two_that_came_at_once_the_later_one_stays():
    async with house({"a": on(HYPERCALL)}) as h:
        first, second = h.come(), h.come()
        await h.watching(second, EventId.HYPERCALL)
        assert await h.ended(first) == "the introspector closed"
        assert len(h.sessions) == 1


@in_a_loop
async def test_vms_that_do_not_know_their_uuid_are_not_taken_for_each_other():
    async with house({"a": on(HYPERCALL)}) as h:
        vms = [h.come(NAMELESS), h.come(NAMELESS)]
        for vm in vms:
            await h.watching(vm, EventId.HYPERCALL)
        await h.sessions.make_room(NAMELESS)
        assert len(h.sessions) == 2


# -- measuring


@in_a_loop
async def test_the_round_trip_is_measured_of_one_vm_after_the_other():
    async with house({"a": on(HYPERCALL)}) as h:
        await h.sessions.measure()
        vms = [h.come(WEB), h.come(DB)]
        for vm in vms:
            await h.watching(vm, EventId.HYPERCALL)
        before = [vm.carried_out.count(Command.GET_VERSION) for vm in vms]
        for _ in range(4):
            await h.sessions.measure()
        asked = [vm.carried_out.count(Command.GET_VERSION) for vm in vms]
        assert [now - then for now, then in zip(asked, before, strict=True)] == [2, 2]
        assert h.metrics.registry.get_sample_value("kvmi_round_trip_seconds_count") == 4
