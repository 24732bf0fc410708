# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lab hosts of a rack that several share through labgrid: its places, ours for as long as the block lasts.

    with reserved("rack.example.org:20408", {"vendor": "amd"}) as hosts:
        ...

Places are taken one after the other, by name: whoever waits for one holds none that comes later, so that two who want
the whole rack do not wait for each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from kvmi_host.lab.errors import LabError
from kvmi_host.lab.inventory import LabHost
from kvmi_host.lab.labgrid_session import CoordinatorGone, Refused, Session
from kvmi_host.lab.places import lab_host
from kvmi_host.lab.progress import say, step

DEADLINE = 3600.0
"""Seconds to wait for places."""


@contextmanager
def reserved(
    coordinator: str,
    filters: Mapping[str, str],
    place: str | None = None,
    *,
    count: int | None = None,
    deadline: float = DEADLINE,
    tell: Callable[[str], None] = say,
) -> Iterator[list[LabHost]]:
    """Hosts that nobody else uses while the block runs. However it ends, they are given back.

    A place that cannot be had, or leads to no host, is told about, and an error after the block; the others are there.
    So is a coordinator that goes away meanwhile.

    :param coordinator: ``HOST[:PORT]``.
    :param filters: the tags that a place must have.
    :param place: one place instead, by the name that ``labgrid-client -p`` takes. It is not waited for; one that this
        user has acquired before stays acquired.
    :param count: how many places; by default all that have the tags. Two who want several of the same may each get
        some, and wait for the rest until the deadline of one has passed.
    :param deadline: seconds to wait for all of them.
    :param tell: is given what the user should know meanwhile, also from another thread.
    :raise LabError: there is no such place, or none was free in time; after the block: see above.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="kvmi-rack-")))
        session = stack.enter_context(Session(coordinator))
        try:
            problems: list[str] = []
            if place is not None:
                hosts = [_take_named(session, place, folder)]
            else:
                hosts, problems = _take(session, filters, count, deadline, folder, tell)
            session.watch([host.name for host in hosts], tell)
            yield hosts
        except BaseException:
            for problem in _give_back(session):
                tell(problem)
            raise
        problems += _give_back(session)
        if problems:
            raise LabError("\n".join(problems))


def _take_named(session: Session, pattern: str, folder: Path) -> LabHost:
    try:
        place = session.find(pattern)
    except Refused as error:
        raise LabError(f"labgrid's {error}: `labgrid-client places` lists what there is") from error
    if place.holder not in (None, session.me):
        raise LabError(
            f"labgrid's place {place.name} is in use: {_who(place.holder)} acquired it. Ask them to release it, or "
            "choose by tags (--lg-filter), which waits for a place that is free"
        )
    if place.holder is None:
        try:
            session.acquire(place.name)
        except Refused as error:
            owner = next((one.owner for one in session.reservations().values() if one.place == place.name), None)
            known = f"it is reserved for {_who(owner)}" if owner else str(error)
            raise LabError(f"labgrid's place {place.name} could not be acquired: {known}") from error
    return _host(session, place.name, folder)


def _take(
    session: Session,
    filters: Mapping[str, str],
    count: int | None,
    deadline: float,
    folder: Path,
    tell: Callable[[str], None],
) -> tuple[list[LabHost], list[str]]:
    """The hosts that could be had, and why others could not."""
    until = time.monotonic() + deadline
    places = session.places()
    fitting = [place.name for place in places if filters.items() <= place.tags.items()]
    if len(fitting) < (count or 1):
        there = "; ".join(f"{place.name}: {_tags(place.tags)}" for place in places) or "none at all"
        raise LabError(
            f"{count or 'places'} with {_tags(filters)} wanted, and labgrid at {session.coordinator} has "
            f"{len(fitting) or 'none'}. There are {there}"
        )
    wanted = [dict(filters)] * count if count else [{"name": name} for name in fitting]
    hosts, problems = [], []
    for each in wanted:
        try:
            hosts.append(_take_one(session, each, until, folder, tell))
        except CoordinatorGone:
            raise
        except LabError as error:
            problems.append(str(error))
            tell(str(error))
    if not hosts:
        raise LabError("no host to run on: " + "\n".join(problems))
    return hosts, problems


def _take_one(
    session: Session, filters: Mapping[str, str], until: float, folder: Path, tell: Callable[[str], None]
) -> LabHost:
    what = f"labgrid's place {filters['name']}" if "name" in filters else f"a place with {_tags(filters)}"
    began = time.monotonic()
    token = session.reserve(filters)
    name = None
    try:
        name = session.await_allocation(token, 0)
        if name is None:
            users = _users(session, filters)
            tell(f"{what} is in use ({users}): waiting for up to {max(0, until - began):.0f} s")
            with step(f"waiting for {what}") as detail:
                detail(users)
                name = session.await_allocation(token, until - time.monotonic())
        if name is None:
            waited = time.monotonic() - began
            raise LabError(f"{what} was not free within {waited:.0f} s: in use are {_users(session, filters)}")
        try:
            session.acquire(name)
        except Refused as error:
            raise LabError(f"labgrid's place {name} could not be acquired: {error}") from error
        return _host(session, name, folder)
    except LabError:
        session.give_back(name if name in session.acquired else None, token)
        raise


def _host(session: Session, name: str, folder: Path) -> LabHost:
    place = next(place for place in session.places() if place.name == name)
    return lab_host(name, place.tags, place.services, folder)


def _users(session: Session, filters: Mapping[str, str]) -> str:
    """Who has the places that are waited for."""
    reserved_for = {one.place: one.owner for one in session.reservations().values()}
    users = []
    for place in session.places():
        user = place.holder or reserved_for.get(place.name)
        if user and filters.items() <= {**place.tags, "name": place.name}.items():
            users.append(f"{place.name} by {_who(user)}")
    return ", ".join(users) or "nobody has one now"


def _who(user: str | None) -> str:
    """labgrid's HOST/USER, as people say it."""
    host, _, name = (user or "").partition("/")
    return f"{name} on {host}"


def _tags(tags: Mapping[str, str]) -> str:
    return " ".join(f"{tag}={value}" for tag, value in sorted(tags.items())) or "no tags"


def _give_back(session: Session) -> list[str]:
    """Give back all that the session has; what went wrong with it."""
    places, tokens = list(session.acquired), list(session.tokens)
    try:
        if session.alive:
            _return(session, places, tokens)
        else:
            with Session(session.coordinator) as again:
                # One that was started again knows of no reservation, and who has a place now has it rightly.
                if not tokens or again.reservations().keys() & set(tokens):
                    _return(again, places, tokens)
    except LabError as error:
        if not places:
            return []
        how = "; ".join(f"labgrid-client -x {session.coordinator} -p {place} release" for place in places)
        return [f"{', '.join(places)} may still be acquired for {session.me} ({error}). To release: {how}"]
    return []


def _return(session: Session, places: list[str], tokens: list[str]) -> None:
    for place in places:
        session.give_back(place, None)
    for token in tokens:
        session.give_back(None, token)
