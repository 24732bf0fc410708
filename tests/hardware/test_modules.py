# SPDX-License-Identifier: LGPL-2.1-or-later
"""The modules come and go. These tests run last, when every guest of the suite has been taken down."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmi_host.attach import attach
from kvmi_host.attach.errors import AttachRefused
from kvmi_host.testing import modules
from kvmi_host.testing.live import DEADLINE, LiveGuest, SharedGuests

pytestmark = pytest.mark.hardware


@pytest.fixture
def nobody(shared: SharedGuests) -> Iterator[None]:
    """Nothing uses KVM. Our modules are loaded again at the end."""
    shared.kill()
    paging = modules.paging()
    yield
    if not Path("/sys/module/kvm/parameters/introspection").exists():
        if Path("/sys/module/kvm").exists():
            modules.unload()
        modules.load(paging)


@pytest.mark.usefixtures("nobody")
def test_the_modules_unload_and_load() -> None:
    paging = modules.paging()
    for _ in range(3):
        modules.unload()
        modules.load(paging)
        with LiveGuest(1) as guest:
            attach(guest.booted().name).close()


@pytest.mark.usefixtures("nobody")
def test_a_host_with_stock_modules_is_told_what_to_do() -> None:
    modules.unload()
    subprocess.run(["modprobe", modules.vendor()], check=True)
    with LiveGuest(1) as guest:
        with pytest.raises(AttachRefused, match="load the kvmi modules"):
            attach(guest.booted().name)
        run = subprocess.run(["kvmi-host", "attach", guest.name], capture_output=True, text=True, timeout=DEADLINE)
        assert run.returncode == 3
        assert "load the kvmi modules" in run.stderr
        guest.await_line(lambda line: " lap " in line)
        findings = doctor()
        assert {findings[subject] for subject in ("loaded modules", "capability", "modules on the disk")} == {"missing"}


def test_the_doctor_finds_ours() -> None:
    findings = doctor()
    assert {findings[subject] for subject in NEEDED} == {"ok"}
    # They are not where modprobe looks: the next boot will be without, as this one is not.
    assert findings["modules on the disk"] == "note"


NEEDED = ("virtualization", "/dev/kvm", "loaded modules", "capability", "ptrace", "QEMU", "introspection object")


def doctor() -> dict[str, str]:
    """What the doctor says of this host: states by subject. Its exit status follows from them."""
    # It runs each program that it asks: those take seconds on an emulated host.
    run = subprocess.run(["kvmi-host", "doctor", "--json"], capture_output=True, text=True, timeout=5 * DEADLINE)
    found = [json.loads(line) for line in run.stdout.splitlines()]
    states = {finding["subject"]: finding["state"] for finding in found}
    assert run.returncode == (3 if "missing" in states.values() else 0), run.stderr
    return states
