# SPDX-License-Identifier: LGPL-2.1-or-later
"""``kvmi-host guest``: guests through libvirt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmi_host import provision
from kvmi_host.cli.completion import guests, images
from kvmi_host.cli.options import Connect, Json

if TYPE_CHECKING:
    import libvirt

app = typer.Typer(help="Guests through libvirt: define, start, stop, list.", no_args_is_help=True, add_completion=False)

Name = Annotated[str, typer.Argument(metavar="GUEST", help="Name or UUID.", autocompletion=guests)]


@app.command()
def create(
    name: Annotated[str, typer.Argument(metavar="GUEST", help="Its name.")],
    image: Annotated[
        str,
        typer.Option(
            metavar="modewalk|linux|PATH",
            help="What it boots: an image of ours, or a kernel file.",
            autocompletion=images,
        ),
    ] = "linux",
    vcpus: Annotated[int, typer.Option(min=1, max=255, help="Virtual CPUs.")] = 1,
    memory: Annotated[int, typer.Option(min=16, metavar="MIB", help="Memory in MiB.")] = 128,
    image_dir: Annotated[
        str | None, typer.Option(metavar="DIR", envvar="KVMI_IMAGES", help="Where our images are, on the VM's host.")
    ] = None,
    start: Annotated[bool, typer.Option("--start", help="Start it as well.")] = False,
    connect: Connect = None,
    as_json: Json = False,
) -> None:
    """Define a guest."""
    guest = provision.Guest(name, provision.find_image(image, image_dir), vcpus, memory)
    with _libvirt(connect) as connection:
        uuid = provision.define(connection, guest)
        if start:
            provision.start(connection, name)
    _tell(as_json, {"name": name, "uuid": str(uuid), "serial_log": str(guest.serial_log)}, f"{name} {uuid}")


@app.command("start")
def start_guest(guest: Name, connect: Connect = None) -> None:
    """Start a guest."""
    with _libvirt(connect) as connection:
        provision.start(connection, guest)


@app.command()
def stop(
    guest: Name,
    timeout: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="How long to wait for the guest.")] = 10.0,
    connect: Connect = None,
) -> None:
    """Ask a guest to shut down, and switch it off when it does not."""
    with _libvirt(connect) as connection:
        provision.stop(connection, guest, timeout)


@app.command()
def destroy(guest: Name, connect: Connect = None) -> None:
    """Switch a guest off at once, and forget it."""
    with _libvirt(connect) as connection:
        provision.destroy(connection, guest)


@app.command("list")
def list_all(connect: Connect = None, as_json: Json = False) -> None:
    """List the guests."""
    with _libvirt(connect) as connection:
        guests = provision.list_guests(connection)
    rows = [
        {
            "name": guest.name,
            "uuid": str(guest.uuid),
            "state": guest.state,
            "vcpus": guest.vcpus,
            "memory": guest.memory,
            "image": guest.image,
        }
        for guest in guests
    ]
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row))
    else:
        from kvmi_host.cli.view import show_table

        show_table(("name", "uuid", "state", "vcpus", "memory", "image"), rows)


@contextmanager
def _libvirt(uri: str | None) -> Iterator[libvirt.virConnect]:
    connection = provision.connect(uri)
    try:
        yield connection
    finally:
        connection.close()


def _tell(as_json: bool, facts: dict[str, Any], line: str) -> None:
    typer.echo(json.dumps(facts) if as_json else line)
