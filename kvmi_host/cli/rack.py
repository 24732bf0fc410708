# SPDX-License-Identifier: LGPL-2.1-or-later
"""Options of ``kvmi-host hwtest`` that choose hosts of a rack, which several share through labgrid."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kvmi_host.lab.inventory import LabHost

_COORDINATOR = "127.0.0.1:20408"  # labgrid's own default

RackCoordinator = Annotated[
    str | None,
    typer.Option(
        "--lg-coordinator",
        metavar="HOST[:PORT]",
        help="Instead: places of this coordinator of labgrid. Where it is left out, LG_COORDINATOR says which.",
        show_default=False,
    ),
]
RackPlace = Annotated[
    str | None,
    typer.Option(
        "--lg-place",
        metavar="NAME",
        help="This place of labgrid. LG_PLACE, if none is named and no tags.",
        show_default=False,
    ),
]
RackFilters = Annotated[
    list[str] | None,
    typer.Option("--lg-filter", metavar="TAG=VALUE", help="labgrid's places with this tag.", show_default=False),
]
RackCount = Annotated[
    int | None,
    typer.Option("--lg-count", min=1, help="So many of them.", show_default="all"),
]
RackWait = Annotated[float, typer.Option("--lg-wait", min=0, help="Seconds to wait for labgrid's places.")]


def rack_hosts(
    coordinator: str | None, place: str | None, filters: Sequence[str], count: int | None, wait: float
) -> AbstractContextManager[list[LabHost]]:
    """The hosts that are meant, ours while the block runs.

    :raise typer.BadParameter: nothing says which, or what does is no tag.
    """
    from kvmi_host.lab.rack import reserved

    tags = {}
    for text in filters:
        tag, there, value = text.partition("=")
        if not (tag and there and value):
            raise typer.BadParameter(
                f"{text!r}: TAG=VALUE, as `labgrid-client set-tags` takes it", param_hint="--lg-filter"
            )
        tags[tag] = value
    if place and tags:
        raise typer.BadParameter("a place has its name, or tags choose: one of the two", param_hint="--lg-place")
    if not tags:
        place = place or os.environ.get("LG_PLACE")
        if not place:
            raise typer.BadParameter(
                "which places: --lg-filter TAG=VALUE, or --lg-place NAME", param_hint="--lg-coordinator"
            )
    coordinator = coordinator or os.environ.get("LG_COORDINATOR") or _COORDINATOR
    return reserved(coordinator, tags, place, count=count, deadline=wait)
