# SPDX-License-Identifier: LGPL-2.1-or-later
"""``kvmi-host guest``: guests through libvirt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

import typer

from kvmi_host import provision
from kvmi_host.cli.completion import guests, images
from kvmi_host.cli.options import Connect, Json
from kvmi_host.provision import Firmware, Method

if TYPE_CHECKING:
    import libvirt

app = typer.Typer(
    help="Guests through libvirt: define, start, stop, save, list.", no_args_is_help=True, add_completion=False
)

Name = Annotated[str, typer.Argument(metavar="GUEST", help="Name or UUID.", autocompletion=guests)]


@app.command()
def create(
    name: Annotated[str, typer.Argument(metavar="GUEST", help="Its name.")],
    image: Annotated[
        str,
        typer.Option(
            metavar="modewalk|linux|debian|PATH",
            help="What it boots: an image of ours, a kernel file, or a qcow2, which is never written.",
            autocompletion=images,
        ),
    ] = "linux",
    vcpus: Annotated[int, typer.Option(min=1, max=255, help="Virtual CPUs.")] = 1,
    memory: Annotated[
        int | None,
        typer.Option(min=16, metavar="MIB", help="Memory in MiB. [default: 128; 1024 with a disk]", show_default=False),
    ] = None,
    network: Annotated[
        str, typer.Option(metavar="none|NETWORK|bridge=BR", help="libvirt's network, or a bridge of the host.")
    ] = "none",
    firmware: Annotated[Firmware, typer.Option(help="What starts it.")] = Firmware.BIOS,
    hostname: Annotated[
        str | None, typer.Option(metavar="H", help="For cloud-init: its host name. [default for debian: its name]")
    ] = None,
    ssh_key: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="For cloud-init: a public key that opens it. Repeatable.")
    ] = None,
    user_data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For cloud-init: its user-data, passed on as it is.")
    ] = None,
    introspection: Annotated[
        Method, typer.Option(help="vm-fd: attached while it runs. qemu-object: KVM-VMI's QEMU connects.")
    ] = Method.VM_FD,
    introspector: Annotated[
        str | None, typer.Option(metavar="SOCKET", help="With qemu-object: where QEMU connects to, on the VM's host.")
    ] = None,
    cookie_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="With qemu-object: the shared secret, on the VM's host.")
    ] = None,
    emulator: Annotated[
        str | None, typer.Option(metavar="FILE", help="The QEMU to run, on the VM's host. [default: libvirt's choice]")
    ] = None,
    image_dir: Annotated[
        str | None, typer.Option(metavar="DIR", envvar="KVMI_IMAGES", help="Where our images are, on the VM's host.")
    ] = None,
    start: Annotated[bool, typer.Option("--start", help="Start it as well.")] = False,
    connect: Connect = None,
    as_json: Json = False,
) -> None:
    """Define a guest."""
    if (introspection is Method.QEMU_OBJECT) != bool(introspector):
        raise typer.BadParameter(
            "it goes with --introspection qemu-object, and that with it", param_hint="--introspector"
        )
    if cookie_file and not introspector:
        raise typer.BadParameter("it goes with --introspection qemu-object", param_hint="--cookie-file")
    boots = _find_image(image, image_dir)
    settings = _settings(image == "debian", name, hostname, ssh_key or [], user_data)
    guest = provision.Guest(
        name,
        boots,
        vcpus,
        memory or (1024 if boots.disk else 128),
        network=None if network == "none" else network,
        firmware=firmware,
        settings=settings,
        introspection=provision.Introspection(introspection, _path(introspector), _path(cookie_file)),
        emulator=_path(emulator),
    )
    with _libvirt(connect) as connection:
        uuid = provision.define(connection, guest, lambda text: typer.echo(f"{text} ...", err=True))
        if start:
            provision.start(connection, name)
        log = provision.serial_log(connection.getURI(), name)
    facts = {"name": name, "uuid": str(uuid), "serial_log": str(log) if log else None}
    typer.echo(json.dumps(facts) if as_json else f"{name} {uuid}")


@app.command("start")
def start_guest(guest: Name, connect: Connect = None) -> None:
    """Start a guest, or have one that was saved go on."""
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
def save(guest: Name, connect: Connect = None) -> None:
    """Save a guest to the host's disk and switch it off; start has it go on."""
    with _libvirt(connect) as connection:
        provision.save(connection, guest)


@app.command()
def destroy(guest: Name, connect: Connect = None) -> None:
    """Switch a guest off at once, and forget it, with the disks that were made for it."""
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
            "introspection": guest.introspection,
        }
        for guest in guests
    ]
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row))
    else:
        from kvmi_host.cli.view import show_table

        show_table(("name", "uuid", "state", "vcpus", "memory", "image", "introspection"), rows)


@contextmanager
def _libvirt(uri: str | None) -> Iterator[libvirt.virConnect]:
    connection = provision.connect(uri)
    try:
        yield connection
    finally:
        connection.close()


def _find_image(name: str, directory: str | None) -> provision.Image:
    """The image; ours with Debian is built if it is in no folder."""
    image = provision.find_image(name, directory)
    if name != "debian" or directory or Path(str(image.disk)).exists():
        return image
    from kvmi_host.lab.images import debian_guest

    return provision.find_image(name, str(debian_guest()))


def _settings(
    always: bool, name: str, hostname: str | None, key_files: list[Path], user_data: Path | None
) -> provision.Settings | None:
    """What cloud-init is told; None when nobody asked for anything."""
    if not (always or hostname or key_files or user_data):
        return None
    keys = [key for file in key_files for key in provision.public_keys(_read(file).decode(errors="replace"), str(file))]
    hostname = hostname or (name if always else None)
    return provision.Settings(hostname, tuple(keys), _read(user_data) if user_data else None)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise provision.ProvisionError(f"{file} cannot be read: {error.strerror}") from error


def _path(text: str | None) -> PurePosixPath | None:
    return PurePosixPath(text) if text else None
