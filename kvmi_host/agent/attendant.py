# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is done with one VM, from its announcement to the end of its session."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from time import monotonic, perf_counter

from kvmi_host.agent import logs
from kvmi_host.agent.metered import MeteredSession
from kvmi_host.agent.metrics import Metrics, Trouble, VmCounts
from kvmi_host.agent.plugins import Setup
from kvmi_host.introspect import PeerInfo, SessionClosed, SessionError
from kvmi_host.introspect.async_vm import AsyncHandler, AsyncVm
from kvmi_host.introspect.handlers import Handlers
from kvmi_host.protocol import CommandError, Event, EventId, KvmiError, ProtocolError, Request, event_name, messages

_SETTLING_SECONDS = 1.0
_LOOK_AGAIN_SECONDS = 0.02

_log = logging.getLogger(__name__)


class Attendant:
    """Sets up a VM's handlers and runs them until the VM, its host or the agent ends the session.

    :ivar peer: which VM it is.
    """

    def __init__(self, peer: PeerInfo, setups: Mapping[str, Setup], metrics: Metrics) -> None:
        """
        :param setups: by the plugins' names.
        """
        self.peer = peer
        self._setups = setups
        self._metrics = metrics
        self._counts: VmCounts | None = None
        self._vm: AsyncVm | None = None
        self._changed = False
        self._leaving = False

    async def run(self, session: MeteredSession) -> None:
        """Serve the VM. Raises nothing: what goes wrong is logged and counted.

        The guest goes on whatever happens, for the session is closed in the end.
        """
        name = self.peer.name or str(self.peer.uuid)
        logs.VM.set(name)
        self._counts = self._metrics.session_begins(name)
        try:
            session.handling = self._metrics.handling
            async with AsyncVm(session) as self._vm:
                await self._serve(self._vm)
            _log.info("detached", extra={"why": "the host asked for it" if self._vm.unhooked else "the agent is done"})
        except SessionClosed as error:
            _log.info("detached", extra={"why": str(error)})
        except KvmiError as error:
            self._metrics.errors[Trouble.SESSION] += 1
            _log.error("the session was given up, the guest goes on: %s", error)
        except Exception:
            self._metrics.errors[Trouble.INTERNAL] += 1
            _log.exception("the session was given up, the guest goes on")
        finally:
            self._metrics.session_ends(self._counts)

    def change(self, setups: Mapping[str, Setup]) -> None:
        """Put other handlers in the place of those there are, when they are done with the event that they handle."""
        self._setups = setups
        self._changed = True
        if self._vm:
            self._vm.stop()

    def leave(self) -> None:
        """End the session, when the handlers are done with the event that they handle, and undo what was done."""
        self._leaving = True
        if self._vm:
            self._vm.stop()

    def cut(self) -> None:
        """End the session now. The kernel undoes what it can."""
        if self._vm:
            self._vm.session.close()

    async def measure(self) -> None:
        """Measure a round trip of GET_VERSION."""
        if self._vm is None or self._vm.session.closed:
            return
        start = perf_counter()
        try:
            await self._vm.session.ask(messages.get_version())
        except KvmiError as error:
            _log.warning("%s: no round trip: %s", self.peer.name or self.peer.uuid, error)
        else:
            self._metrics.round_trips.observe(perf_counter() - start)

    # -- below

    async def _serve(self, vm: AsyncVm) -> None:
        version = await vm.session.ask(messages.get_version())
        # The VM's side says what the session may do a moment after KVM has begun to speak.
        settled_at = monotonic() + _SETTLING_SECONDS
        for request in (messages.check_command(messages.guest_info().command), messages.check_event(EventId.UNHOOK)):
            await _allowed(vm, request, settled_at)
        vcpus = await vm.session.ask(messages.guest_info())
        about = {"uuid": str(self.peer.uuid), "dialect": version.dialect, "vcpus": vcpus}
        _log.info("attached", extra={**about, "handlers": list(self._setups)})
        setups, ended = self._setups, False
        while not (self._leaving or vm.unhooked or ended):
            self._changed = False
            vm.handlers = await self._handlers(vm, setups, settled_at)
            if not (self._changed or self._leaving):
                watched = await self._watch(vm)
                ended = watched and not self._changed  # by a handler, if not by the host or us
                setups = {}
            if self._changed:
                setups = self._setups

    async def _handlers(self, vm: AsyncVm, setups: Mapping[str, Setup], settled_at: float) -> Handlers[AsyncHandler]:
        """What the plugins register, without those that want what the session may not see."""
        together = self._none()
        for name, set_up in setups.items():
            vm.handlers = its = self._none()
            try:
                set_up(vm)
            except Exception:
                self._metrics.errors[Trouble.HANDLER] += 1
                _log.exception("handler %s is left out", name)
                continue
            kinds = sorted({interest.event for interest in its.interests})
            refused = [kind for kind in kinds if not await _allowed(vm, messages.check_event(kind), settled_at)]
            if refused:
                self._metrics.errors[Trouble.REFUSED] += 1
                names = ", ".join(map(event_name, refused))
                _log.error("handler %s is left out: its events are not allowed for this session: %s", name, names)
            else:
                together.include(its)
        return together

    async def _watch(self, vm: AsyncVm) -> bool:
        """Run the handlers until someone ends it; False if what they want cannot be watched."""
        try:
            await vm.run()
        except (SessionError, ProtocolError):
            raise
        except Exception as error:  # a handler's interest may be of its own making
            if not vm.handlers.interests:
                raise  # nothing at all can be watched
            self._metrics.errors[Trouble.REFUSED if isinstance(error, KvmiError) else Trouble.HANDLER] += 1
            _log.exception("nothing is watched until the configuration is read again")
            return False
        return True

    def _none(self) -> Handlers[AsyncHandler]:
        assert self._counts is not None
        return _CountedHandlers(self._metrics, self._counts)


class _CountedHandlers(Handlers[AsyncHandler]):
    """Handlers whose events and exceptions are counted."""

    def __init__(self, metrics: Metrics, counts: VmCounts) -> None:
        super().__init__()
        self._metrics = metrics
        self._counts = counts

    def of(self, event: Event) -> Sequence[AsyncHandler]:
        """The functions for an event, in the order they were added."""
        self._counts.events[event.event] += 1
        return super().of(event)

    def failed(self, handler: AsyncHandler, event: Event) -> None:
        """Report the exception that a handler raises, in its except clause."""
        super().failed(handler, event)
        self._counts.handler_errors += 1
        self._metrics.errors[Trouble.HANDLER] += 1


async def _allowed(vm: AsyncVm, check: Request[None], settled_at: float) -> bool:
    """Whether the kernel says yes to a check, if need be not until the session has settled."""
    while True:
        try:
            await vm.session.ask(check)
        except CommandError:
            if monotonic() >= settled_at:
                return False
        else:
            return True
        await asyncio.sleep(_LOOK_AGAIN_SECONDS)
