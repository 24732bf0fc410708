# SPDX-License-Identifier: LGPL-2.1-or-later
"""The asyncio twin of a VM does what the other does: each kind of plan is carried out once."""

from __future__ import annotations

import asyncio
import inspect
import logging
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest

from kvmi_host.introspect import CR3, HYPERCALL, Breakpoint, Memory, Vcpu, Vm
from kvmi_host.introspect.async_session import AsyncSession
from kvmi_host.introspect.async_vm import AsyncMemory, AsyncVcpu, AsyncVm
from kvmi_host.protocol import Action, EventId, messages
from kvmi_host.testing.event_loop import in_a_loop
from kvmi_host.testing.peer import SimulatedKernel, next_reply


@asynccontextmanager
async def simulated(vcpus: int = 1, **settings: object) -> AsyncIterator[tuple[SimulatedKernel, AsyncVm]]:
    """A simulated kernel with the given settings, and its VM."""
    ours, kernels = socket.socketpair()
    with kernels:
        kernel = SimulatedKernel(kernels, vcpus, **settings)
    with kernel:
        async with AsyncVm(await AsyncSession.open(ours, timeout=5.0)) as vm:
            yield kernel, vm


@pytest.mark.parametrize(("blocking", "twin"), [(Vm, AsyncVm), (Vcpu, AsyncVcpu), (Memory, AsyncMemory)])
def test_the_names_and_parameters_are_the_same(blocking, twin):
    def public(cls):
        return {name: value for name, value in vars(cls).items() if not name.startswith("_")}

    assert set(public(blocking)) == set(public(twin))
    for name, method in public(blocking).items():
        if inspect.isfunction(method):
            assert list(inspect.signature(method).parameters) == list(inspect.signature(public(twin)[name]).parameters)


@in_a_loop
async def test_vcpus_and_memory_are_awaited():
    async with simulated(2) as (kernel, vm):
        await vm.memory.write(0xFFE, b"abcd")
        assert kernel.memory[0xFFE:0x1002] == b"abcd"
        assert await vm.memory[0xFFE:0x1002] == b"abcd"
        vcpu = (await vm.vcpus)[1]
        assert await vcpu.memory[0xFFE:0x1002] == b"abcd"
        assert (await vcpu.registers).rip == 0
        assert await vcpu.msr(0x174) == 0x175
        assert (await vm.facts).vcpus == 2


@in_a_loop
async def test_vcpus_are_paused_within_the_block_and_no_longer():
    async with simulated(2) as (kernel, vm):
        async with vm.paused():
            assert kernel.waiting_for(0) is not None
            assert kernel.waiting_for(1) is not None
        await vm.session.ask(messages.get_version())
        assert kernel.waiting_for(0) is None
        assert kernel.waiting_for(1) is None


@in_a_loop
async def test_events_are_answered_as_they_were_told():
    async with simulated() as (kernel, vm):
        replies = kernel.fire(EventId.CR, own=struct.pack("<H6xQQ", 3, 0, 1))
        async with aclosing(vm.events(CR3)) as events:
            async for event in events:
                assert kernel.watched_registers() == {3}
                event.reply(new_val=0)
                break
        assert not kernel.watched_registers()
        assert (await asyncio.to_thread(next_reply, replies)).own == bytes(8)


@in_a_loop
async def test_leaving_the_block_undoes_what_was_done():
    async with simulated() as (kernel, vm):
        replies = kernel.fire(EventId.HYPERCALL)
        async for _ in vm.events(HYPERCALL, Breakpoint(0x1234)):
            assert kernel.memory[0x1234:0x1235] == b"\xcc"
            break
        await vm.close()
        assert kernel.memory[0x1234:0x1235] == b"\x00"
        assert (await asyncio.to_thread(next_reply, replies)).action == Action.CONTINUE


@in_a_loop
async def test_handlers_may_be_coroutines_and_may_raise():
    async with simulated(2) as (kernel, vm):
        kernel.fire(EventId.HYPERCALL)
        kernel.fire(EventId.HYPERCALL, vcpu=1)
        handled = []

        @vm.on(HYPERCALL)
        async def coroutine(event):
            handled.append(await vm.session.ask(messages.guest_info()))

        @vm.on(HYPERCALL)
        def function(event):
            raise LookupError("a bug")

        logging.disable()
        try:
            await vm.run(duration=0.2)
        finally:
            logging.disable(logging.NOTSET)
        assert handled == [2, 2]
        assert vm.handlers.errors == 2


@in_a_loop
async def test_another_task_ends_the_watching_at_once():
    async with simulated(2) as (kernel, vm):
        running = asyncio.create_task(vm.run())
        kernel.fire(EventId.HYPERCALL)
        await asyncio.to_thread(kernel.await_running)  # it is past the beginning: what nobody watches goes on
        vm.stop()
        await running
        assert not kernel.enabled(EventId.UNHOOK)
        assert not vm.session.closed


@in_a_loop
async def test_the_event_that_is_handled_is_answered_before_the_watching_ends():
    async with simulated() as (kernel, vm):
        replies = kernel.fire(EventId.HYPERCALL)
        handling, go_on = asyncio.Event(), asyncio.Event()

        @vm.on(HYPERCALL)
        async def slow(event):
            handling.set()
            await go_on.wait()
            event.reply(Action.CRASH)

        running = asyncio.create_task(vm.run())
        await handling.wait()
        vm.stop()
        go_on.set()
        await running
        assert (await asyncio.to_thread(next_reply, replies)).action == Action.CRASH
