# SPDX-License-Identifier: LGPL-2.1-or-later
"""A connection to labgrid's coordinator, on a thread of its own: labgrid speaks asyncio, and the suite does not.

What labgrid 26 does (``remote/coordinator.py``): a place is held for a user of a machine, ``HOST/USER``, and not for a
connection, so it stays acquired when that ends, until it is released or the coordinator is started again. A reservation
is for one place, has its turn by age, and lapses 60 s after it was asked about last, unless its place is acquired.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from kvmi_host.host.printable import printable
from kvmi_host.lab.errors import LabError, LabHostError

_PORT = 20408
"""Of a coordinator that says none: labgrid's own default."""
_CONNECTS_WITHIN = 20.0
_ANSWERS_WITHIN = 60.0
"""Seconds. To acquire a place, the coordinator waits up to 10 s for each of its resources' exporters."""
_LOOKS_EVERY = 1.0

T = TypeVar("T")


class CoordinatorGone(LabError):
    """The coordinator does not answer, or no longer: what it holds for us, it holds on."""


class Refused(LabError):
    """The coordinator answered, and would not do it."""


@dataclass(frozen=True)
class Place:
    """A place, as the coordinator has it now.

    :ivar holder: ``HOST/USER`` who acquired it; None: nobody.
    :ivar services: the parameters of its NetworkServices, by the name that the place has for them, ``extra`` among
        them; none as long as nobody has acquired it.
    """

    name: str
    tags: Mapping[str, str]
    holder: str | None
    services: Mapping[str, Mapping[str, object]]


@dataclass(frozen=True)
class Reservation:
    """A turn that somebody waits for, or has.

    :ivar owner: ``HOST/USER``.
    :ivar place: the one it was given; None: it waits.
    """

    owner: str
    place: str | None


class Session:
    """A connection to a coordinator, for as long as the block lasts.

    A call that is interrupted (Ctrl-C) ends what it is at before it raises: so it is known what we were given.

    :param coordinator: ``HOST[:PORT]``. LG_PROXY, a host to go through by SSH, counts as it does for labgrid.
    :ivar tokens: the reservations that were made, and not given back.
    :ivar acquired: the places that were taken, and not given back.
    :raise CoordinatorGone: there is none.
    :raise LabHostError: labgrid is not installed.
    """

    def __init__(self, coordinator: str) -> None:
        try:
            # Here, not above: it takes its time, and most have no rack.
            import grpc
            from labgrid.remote import client
            from labgrid.remote.generated import labgrid_coordinator_pb2
            from labgrid.util.proxy import proxymanager
        except ImportError as error:
            raise LabHostError(
                f"labgrid is needed to ask {coordinator} for hosts, and it is not installed ({error}): "
                "pip install 'kvmi-host[lab]'"
            ) from error
        try:
            self._address = proxymanager.get_grpc_address(coordinator, default_port=_PORT)
        except Exception as error:  # of several trees: no such address, no way through LG_PROXY
            raise LabError(f"{coordinator}: no address of a labgrid coordinator: {error}") from error
        self.coordinator = coordinator
        self.tokens: list[str] = []
        self.acquired: list[str] = []
        self._grpc, self._labgrid, self._messages = grpc, client, labgrid_coordinator_pb2
        self._interrupted = asyncio.Event()
        self._client: Any = None
        self._watching: Future[None] | None = None
        # It logs what is raised here; where nobody configured logging, that would be shown as well.
        self._quiet = logging.NullHandler()

    def __enter__(self) -> Self:
        logging.getLogger().addHandler(self._quiet)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="labgrid", daemon=True)
        self._thread.start()
        try:
            self._call(self._connect())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        if self._watching is not None:
            self._watching.cancel()
        try:
            self._call(self._disconnect())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            logging.getLogger().removeHandler(self._quiet)

    @property
    def me(self) -> str:
        """Whom places are acquired for: ``HOST/USER``. LG_HOSTNAME and LG_USERNAME say otherwise."""
        return f"{self._client.gethostname()}/{self._client.getuser()}"

    @property
    def alive(self) -> bool:
        """Whether the coordinator is still there."""
        return not self._client.stopping.is_set()

    def places(self) -> list[Place]:
        """All there are, by name."""
        return self._call(self._places())

    def find(self, pattern: str) -> Place:
        """The place that labgrid would take for a name: whole or a part of it, an alias, or ``+TOKEN``.

        :raise Refused: it is none, or more than one.
        """
        return self._call(self._find(pattern))

    def reserve(self, filters: Mapping[str, str]) -> str:
        """Queue up for a place with these tags; the tag ``name`` is its name. The reservation's token."""
        return self._call(self._reserve(filters))

    def await_allocation(self, token: str, deadline: float) -> str | None:
        """Wait for a reservation's turn.

        :param deadline: seconds.
        :return: the place's name; None: its turn did not come within that time.
        :raise Refused: the reservation is no more.
        """
        return self._call(self._await_allocation(token, deadline))

    def acquire(self, place: str) -> None:
        """Take a place.

        :raise Refused: it is somebody else's, or an exporter does not give its resource.
        """
        self._call(self._acquire(place))

    def give_back(self, place: str | None, token: str | None) -> None:
        """Release a place, if it is ours still, and cancel a reservation, if there still is one."""
        self._call(self._give_back(place, token))

    def reservations(self) -> dict[str, Reservation]:
        """All there are, by token."""
        return self._call(self._reservations())

    def watch(self, places: list[str], tell: Callable[[str], None]) -> None:
        """Have it told, from now on and from another thread, when the coordinator goes or somebody takes a place."""
        self._watching = asyncio.run_coroutine_threadsafe(self._watch(places, tell), self._loop)

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            if not future.done():
                self._loop.call_soon_threadsafe(self._interrupted.set)
                future.exception()
            raise

    async def _connect(self) -> None:
        self._client = self._labgrid.ClientSession(self._address, self._loop)
        try:
            await asyncio.wait_for(self._client.start(), _CONNECTS_WITHIN)
        except (TimeoutError, self._labgrid.ServerError) as error:
            raise CoordinatorGone(
                f"no labgrid coordinator answers at {self._address}: is that the right address "
                "(--lg-coordinator, LG_COORDINATOR, LG_PROXY), and does it run?"
            ) from error

    async def _disconnect(self) -> None:
        if self._client is not None:
            await self._client.stop()
            await self._client.close()

    async def _ask(self, method: str, request: Any) -> Any:
        try:
            return await getattr(self._client.stub, method)(request, timeout=_ANSWERS_WITHIN)
        except self._grpc.aio.AioRpcError as error:
            said = printable(error.details() or error.code().name)
            if error.code() in (self._grpc.StatusCode.UNAVAILABLE, self._grpc.StatusCode.DEADLINE_EXCEEDED):
                raise CoordinatorGone(f"labgrid's coordinator {self.coordinator} went away: {said}") from error
            raise Refused(said) from error

    async def _reserve(self, filters: Mapping[str, str]) -> str:
        request = self._messages.CreateReservationRequest()
        request.filters["main"].filter.update(filters)
        token = str((await self._ask("CreateReservation", request)).reservation.token)
        self.tokens.append(token)
        return token

    async def _acquire(self, place: str) -> None:
        await self._ask("AcquirePlace", self._messages.AcquirePlaceRequest(placename=place))
        self.acquired.append(place)

    async def _give_back(self, place: str | None, token: str | None) -> None:
        if place is not None:
            request = self._messages.ReleasePlaceRequest(placename=place, fromuser=self.me)
            with suppress(Refused):  # it was deleted
                await self._ask("ReleasePlace", request)
            self.acquired = [other for other in self.acquired if other != place]
        if token is not None:
            with suppress(Refused):  # it lapsed
                await self._ask("CancelReservation", self._messages.CancelReservationRequest(token=token))
            self.tokens = [other for other in self.tokens if other != token]

    async def _reservations(self) -> dict[str, Reservation]:
        answer = await self._ask("GetReservations", self._messages.GetReservationsRequest())
        return {
            one.token: Reservation(one.owner, next(iter(one.allocations.values()), None)) for one in answer.reservations
        }

    async def _places(self) -> list[Place]:
        # What it told us about so far is what there was before this.
        synced = False
        if self.alive:
            with suppress(TimeoutError):
                synced = await asyncio.wait_for(self._client.sync_with_coordinator(), _ANSWERS_WITHIN)
        if not synced:
            raise CoordinatorGone(f"labgrid's coordinator {self.coordinator} went away")
        return [self._place(place) for _, place in sorted(self._client.places.items())]

    async def _find(self, pattern: str) -> Place:
        try:
            return self._place(self._client.get_place(pattern))
        except self._labgrid.UserError as error:
            raise Refused(printable(" ".join(error.args))) from error

    def _place(self, place: Any) -> Place:
        services: dict[str, Mapping[str, object]] = {}
        for exporter, group, kind, name in place.acquired_resources:
            resource = self._client.resources.get(exporter, {}).get(group, {}).get(name)
            if kind == "NetworkService" and resource is not None and "params" in resource.data:
                match = place.getmatch((exporter, group, kind, name))
                services[(match and match.rename) or name] = resource.params
        return Place(place.name, dict(place.tags), place.acquired, services)

    async def _await_allocation(self, token: str, deadline: float) -> str | None:
        until = self._loop.time() + deadline
        while True:
            found = await self._ask("PollReservation", self._messages.PollReservationRequest(token=token))
            state = self._labgrid.ReservationState(found.reservation.state)
            if state is self._labgrid.ReservationState.allocated:
                return str(found.reservation.allocations["main"])
            if state is not self._labgrid.ReservationState.waiting:
                raise Refused(f"the reservation {token} is {state.name}")
            left = until - self._loop.time()
            if left <= 0 or self._interrupted.is_set():
                return None
            try:
                await asyncio.wait_for(self._interrupted.wait(), min(left, _LOOKS_EVERY))
            except TimeoutError:
                continue

    async def _watch(self, places: list[str], tell: Callable[[str], None]) -> None:
        ours = set(places)
        while ours:
            try:
                await asyncio.wait_for(self._client.stopping.wait(), _LOOKS_EVERY)
            except TimeoutError:
                for name in sorted(ours):
                    place = self._client.places.get(name)
                    holder = place and place.acquired
                    if holder != self.me:
                        ours.remove(name)
                        tell(
                            f"labgrid's place {name} is no longer ours: {holder or 'nobody'} has it. The suite goes on"
                        )
            else:
                ours_are = ", ".join(sorted(ours))
                tell(f"labgrid's coordinator {self.coordinator} is gone: the suite goes on on {ours_are}")
                return
