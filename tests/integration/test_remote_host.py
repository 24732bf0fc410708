# SPDX-License-Identifier: LGPL-2.1-or-later
"""A KVM host over SSH, as an operator has it: its libvirt through qemu+ssh, its VMs through kvmi-host there.

The host is the one in a box: a real libvirtd, and a real QEMU under KVM.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import libvirt
import pytest

from kvmi_host.host.doctor import examine, machine_behind
from kvmi_host.host.remote import connect as connect_by_ssh
from kvmi_host.lab import Box
from kvmi_host.provision import (
    Guest,
    GuestExists,
    NoSuchGuest,
    connect,
    define,
    destroy,
    find_domain,
    find_image,
    list_guests,
    start,
)

pytestmark = pytest.mark.integration

NAME = "integration"


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    with Box("integration") as box:
        box.deploy()
        yield box


@pytest.fixture(scope="module")
def connection(box: Box) -> Iterator[libvirt.virConnect]:
    connection = connect(box.libvirt_uri)
    yield connection
    connection.close()


@pytest.fixture
def guest(connection: libvirt.virConnect) -> Iterator[Guest]:
    """A modewalk guest that runs."""
    guest = Guest(name=NAME, image=find_image("modewalk"), vcpus=2)
    define(connection, guest)
    try:
        start(connection, NAME)
        yield guest
    finally:
        destroy(connection, NAME)


def attach(box: Box, *arguments: str) -> list[dict[str, Any]]:
    run = box.run(["kvmi-host", "attach", NAME, "--json", *arguments])
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_a_guest_is_defined_listed_and_destroyed(connection: libvirt.virConnect, guest: Guest) -> None:
    assert find_domain(connection, NAME).isActive()
    (mine,) = [info for info in list_guests(connection) if info.name == NAME]
    assert (mine.image, mine.state) == ("modewalk", "running")
    with pytest.raises(GuestExists):
        define(connection, guest)


def test_what_was_destroyed_is_gone(connection: libvirt.virConnect) -> None:
    define(connection, Guest(name="gone", image=find_image("modewalk")))
    destroy(connection, "gone")
    with pytest.raises(NoSuchGuest, match="gone"):
        find_domain(connection, "gone")


def test_attach_shows_every_mode_without_a_gap(box: Box, guest: Guest) -> None:
    session, *events, summary = attach(box, "--count", "150", "--events", "cr0,cr3,cr4,hypercall")
    assert session["session"]["name"] == NAME
    assert session["session"]["dialect"] == "v6"
    assert {event["mode"] for event in events} == {2, 4, 8}
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert {"vm", "vcpu", "seq", "event", "mode", "rip", "time_ns"} <= set(events[0])
    assert summary["summary"]["seq_gaps"] == 0
    assert summary["summary"]["events"] == len(events)


def test_a_vm_is_attached_to_by_name_uuid_and_pid(box: Box, guest: Guest, connection: libvirt.virConnect) -> None:
    pid = box.run(f"cat /run/libvirt/qemu/{NAME}.pid").stdout.strip()
    for name in (NAME, find_domain(connection, NAME).UUIDString(), f"pid:{pid}"):
        run = box.run(["kvmi-host", "attach", name, "--json", "--count", "1", "--events", "hypercall"])
        assert json.loads(run.stdout.splitlines()[0])["session"]["vcpus"] == 2


def test_detach_ends_a_session_from_elsewhere(box: Box, guest: Guest) -> None:
    box.run(f"nohup kvmi-host attach {NAME} --json > /run/attached.jsonl 2>&1 & sleep 0; true")
    box.run("until grep -q seq /run/attached.jsonl; do sleep 0.2; done", deadline=60)
    box.run(["kvmi-host", "detach", NAME])
    box.run("until grep -q summary /run/attached.jsonl; do sleep 0.2; done", deadline=60)
    summary = json.loads(box.run("tail -n 1 /run/attached.jsonl").stdout)["summary"]
    assert summary["ended"] == "unhook"
    assert attach(box, "--count", "1")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("attach nobody", 1, "nobody"),
        ("attach pid:1", 1, "runs no KVM guest"),
        ("attach pid:999999", 1, "no process"),
        ("attach x --events nonsense", 2, "nonsense"),
        ("detach nobody", 1, "nobody"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(box: Box, arguments: str, status: int, message: str) -> None:
    run = box.run(f"kvmi-host {arguments}", check=False)
    assert run.returncode == status
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def test_the_doctor_finds_from_here_what_it_finds_there(box: Box) -> None:
    there = [json.loads(line) for line in box.run(["kvmi-host", "doctor", "--json"], deadline=300).stdout.splitlines()]
    config = Path(box.ssh_command()[2])
    with connect_by_ssh("kvmi-lab", config, deadline=120) as remote:
        here = [asdict(finding) for finding in examine(machine_behind(remote, deadline=300))]
    assert here == there


def test_the_doctor_misses_nothing_in_the_box_but_what_it_was_not_given(box: Box) -> None:
    found = [json.loads(line) for line in box.run(["kvmi-host", "doctor", "--json"], deadline=300).stdout.splitlines()]
    assert {finding["subject"]: finding["state"] for finding in found if finding["state"] != "ok"} == {
        "kvm.introspection": "note",
        "modules on the disk": "note",
        "modules for each kernel": "note",
        "kernel headers": "note",
        "libvirt's hook": "note",
        "agent": "note",
        "agent's socket": "note",
    }


def test_the_doctor_tells_who_may_not_use_libvirt_or_kvm(box: Box) -> None:
    run = box.run("runuser -u nobody -- kvmi-host doctor --json", deadline=300, check=False)
    states = {finding["subject"]: finding["state"] for finding in map(json.loads, run.stdout.splitlines())}
    assert run.returncode == 3
    assert {subject for subject, state in states.items() if state == "missing"} == {"/dev/kvm", "libvirt's permission"}
    assert {subject for subject, state in states.items() if state == "unknown"} == {"capability", "QEMU's confinement"}
