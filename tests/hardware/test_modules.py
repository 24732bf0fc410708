# SPDX-License-Identifier: LGPL-2.1-or-later
"""The modules come and go. These tests run last, when every guest of the suite has been taken down."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest

from kvmi_host.attach import attach
from kvmi_host.attach.errors import AttachRefused
from kvmi_host.testing.live import DEADLINE, LiveGuest, SharedGuests

pytestmark = pytest.mark.hardware

OURS = Path("/run/kvmi/modules")


def unload(vendor: str) -> None:
    """Unload KVM. The last session's thread may still be on its way out: it holds the module until then."""
    deadline = monotonic() + DEADLINE
    while Path("/sys/module/kvm/refcnt").read_text().strip() != "1":
        assert monotonic() < deadline, "the kvm module is in use"
        os.sched_yield()
    subprocess.run(["rmmod", vendor, "kvm"], check=True)


def load_ours(vendor: str) -> None:
    subprocess.run(["insmod", OURS / "kvm.ko", "introspection=1"], check=True)
    subprocess.run(["insmod", OURS / f"{vendor.replace('_', '-')}.ko"], check=True)


@pytest.fixture
def vendor(shared: SharedGuests) -> Iterator[str]:
    """The vendor's module; nothing uses KVM. Our modules are loaded again at the end."""
    shared.kill()
    assert (OURS / "kvm.ko").exists(), f"the modules to load again are not in {OURS}: run this in the host in a box"
    name = "kvm_intel" if Path("/sys/module/kvm_intel").exists() else "kvm_amd"
    yield name
    if not Path("/sys/module/kvm/parameters/introspection").exists():
        if Path("/sys/module/kvm").exists():
            unload(name)
        load_ours(name)


def test_the_modules_unload_and_load(vendor: str) -> None:
    for _ in range(3):
        unload(vendor)
        load_ours(vendor)
        with LiveGuest(1) as guest:
            attach(guest.booted().name).close()


def test_a_host_with_stock_modules_is_told_what_to_do(vendor: str) -> None:
    unload(vendor)
    subprocess.run(["modprobe", vendor], check=True)
    with LiveGuest(1) as guest:
        with pytest.raises(AttachRefused, match="load the kvmi modules"):
            attach(guest.booted().name)
        run = subprocess.run(["kvmi-host", "attach", guest.name], capture_output=True, text=True, timeout=DEADLINE)
        assert run.returncode == 3
        assert "load the kvmi modules" in run.stderr
        guest.await_line(lambda line: " lap " in line)
