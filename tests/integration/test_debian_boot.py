# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Debian guest, made by the command line in a user's own libvirt on this machine, boots with the settings it is
given.

Without KVM: a whole Debian takes too long on the CPU that the host in a box emulates for its guests. With one vCPU:
with two, emulated by threads, a boot was seen to hang in modprobe.
"""

from __future__ import annotations

import filecmp
import re
import subprocess
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from time import monotonic

import pytest
from typer.testing import CliRunner

from kvmi_host.cli import app
from kvmi_host.lab.images import debian_guest
from kvmi_host.provision import domain_xml, guests

pytestmark = pytest.mark.integration

NAME = "integration-debian"
BOOTS_WITHIN = 400  # seconds
USER_DATA = """#!/bin/sh
echo "user-data: the key is $(ssh-keygen -lf ~debian/.ssh/authorized_keys)" > /dev/ttyS0
"""

Cli = Callable[..., str]
Console = Callable[[str], str]


@pytest.fixture(scope="module")
def image() -> Path:
    """The folder of the image, built if need be."""
    return debian_guest()


@pytest.fixture(scope="module")
def cli(libvirt_home: Path, libvirt_uri: str, image: Path, without_kvm: Callable[[str], str]) -> Iterator[Cli]:
    """``kvmi-host guest`` for that libvirt, whose guests have no KVM; what it prints."""
    # For us libvirt's folders are where its user's are.
    environment = {
        "XDG_CACHE_HOME": str(libvirt_home / ".cache"),
        "XDG_DATA_HOME": str(libvirt_home / ".local/share"),
        "KVMI_IMAGES": str(image),
    }

    def run(*arguments: object) -> str:
        done = CliRunner().invoke(app, ["guest", *map(str, arguments), "-c", libvirt_uri], env=environment)
        assert done.exit_code == 0, done.output
        return done.output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guests, "domain_xml", lambda *arguments: without_kvm(domain_xml(*arguments)))
        yield run


@pytest.fixture(scope="module")
def console(
    libvirt_home: Path,
    cli: Cli,
    public_key: Path,
    tmp_path_factory: pytest.TempPathFactory,
    wait_serial: Callable[[Path, str, float], str],
) -> Iterator[Console]:
    """A Debian guest that was started; waits until its console shows a text, no longer in all than a boot may take."""
    log = libvirt_home / f".cache/libvirt/qemu/log/{NAME}-serial.log"
    # Whoever runs libvirt makes these; here that is not who runs the command.
    subprocess.run(["mkdir", "-p", log.parent], user=libvirt_home.stat().st_uid, check=True, timeout=60)
    user_data = tmp_path_factory.mktemp("settings") / "user-data"
    user_data.write_text(USER_DATA)
    cli(
        "create", NAME, "--image", "debian", "--hostname", "web9", "--ssh-key", public_key,
        "--user-data", user_data, "--start",
    )  # fmt: skip
    deadline = monotonic() + BOOTS_WITHIN
    yield lambda text: wait_serial(log, text, deadline - monotonic())
    if NAME in cli("list"):
        cli("destroy", NAME)


def test_it_boots_to_a_login_under_its_host_name(console: Console) -> None:
    console("web9 login:")


def test_its_user_data_is_run(console: Console) -> None:
    console("user-data: ")


def test_its_user_has_the_key(console: Console, public_key: Path) -> None:
    shown = subprocess.run(
        ["ssh-keygen", "-lf", public_key], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    console(f"user-data: the key is {shown.strip()}")


def test_cloud_init_ends_without_a_complaint(console: Console) -> None:
    assert not re.findall(r".*(?:WARNING|ERROR|[Ff]ailed).*", console(" finished at "))


def test_destroying_it_leaves_the_image_as_it_was(console: Console, cli: Cli, image: Path, libvirt_home: Path) -> None:
    console("user-data: ")
    pool = libvirt_home / ".local/share/libvirt/images"
    copies = {f"kvmi-{sha256(file.read_bytes()).hexdigest()[:16]}{file.suffix}": file for file in image.iterdir()}
    own = {f"{NAME}.qcow2", f"{NAME}-seed.iso"}
    assert {volume.name for volume in pool.iterdir()} == own | copies.keys()
    cli("destroy", NAME)
    assert {volume.name for volume in pool.iterdir()} == copies.keys()
    for name, file in copies.items():
        assert filecmp.cmp(pool / name, file, shallow=False)
