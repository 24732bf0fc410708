# SPDX-License-Identifier: LGPL-2.1-or-later
"""What this machine is, as a host under test: what it can show, and what it lacks."""

from __future__ import annotations

import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kvmi_host.host import kvm
from kvmi_host.testing import modules
from kvmi_host.testing.emulators import Fault, emulator
from kvmi_host.testing.modules import Paging
from kvmi_host.testing.rules import (
    ATTACHING,
    EXECUTE_ONLY,
    FIRST_NUMBER,
    NESTED,
    NO_EXECUTE_ONLY,
    OBSERVING,
    SELF_CHECKS,
    SERVICES,
    SHADOW,
    SHORT_REPLIES,
    UNDEPLOYED,
    Host,
)

_CAP_V7, _CAP_V6 = kvm.KVM_CAP_INTROSPECTION
_SYSTEMD = Path("/run/systemd/system")
"""There if systemd is the first process, see sd_booted(3)."""
_FIRST_NUMBER = Path("/sys/module/kvm/parameters/introspection_first_seq")
_DEBUG_KERNEL = "-debug"
"""The end of its release: CONFIG_LOCALVERSION of kernel/debug.config."""
_THEIRS = "this kernel's introspection is not ours: it keeps to the interface as it was published"


def host_under_test() -> Host:
    """This machine.

    :raise HostError: it has no introspection, and why.
    """
    kvm.require_introspection()
    with kvm.KVM_DEVICE.open("rb") as device:
        answered = {number for number, answer in kvm.capabilities(device.fileno()).items() if answer}
    paging = modules.paging()
    here = os.uname()
    vendor = re.search(r"^vendor_id\s*: (\S+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    try:
        package = version("kvmi-host")
    except PackageNotFoundError:  # a source tree that nobody has installed
        package = ""
    return Host(
        name=os.environ.get("KVMI_HOST_NAME", here.nodename),
        kernel=here.release,
        cpu_vendor=vendor[1] if vendor else "unknown",
        dialect="v6" if _CAP_V6 in answered else "v7",
        paging=paging,
        version=package,
        lacks=lacking(
            ours=answered == {_CAP_V6, _CAP_V7},
            paging=paging,
            intel=modules.vendor() == "kvm_intel",
            checks_itself=here.release.endswith(_DEBUG_KERNEL),
            systemd=_SYSTEMD.exists(),
            undeployed=not deployed(),
            first_number=_FIRST_NUMBER.exists(),
        ),
        faults=frozenset(fault for fault in Fault if fault.value[0] is emulator()),
    )


def lacking(
    *,
    ours: bool,
    paging: Paging,
    intel: bool,
    checks_itself: bool,
    systemd: bool,
    undeployed: bool,
    first_number: bool,
) -> dict[str, str]:
    """What a host lacks of what rules and tests may need, each with the reason.

    :param ours: its kernel part is this project's, not KVM-VMI's.
    :param undeployed: kvmi-host has no configuration there that is not a test's.
    :param first_number: that kernel part lets a test say from which number a session counts its events.
    """
    lacks = {} if ours else dict.fromkeys((ATTACHING, OBSERVING, SHORT_REPLIES), _THEIRS)
    if paging is Paging.NESTED:
        lacks[SHADOW] = "the CPU walks the guest's page tables here; --paging shadow has KVM do it"
    else:
        lacks[NESTED] = "KVM shadows the guest's page tables here"
    if intel:
        lacks[NO_EXECUTE_ONLY] = "with Intel's EPT a page can be executable and nothing else"
    else:
        lacks[EXECUTE_ONLY] = "with AMD's page tables what is executable is readable"
    if not checks_itself:
        lacks[SELF_CHECKS] = "this kernel does not check itself, and its allocations cannot be made to fail"
    if not systemd:
        lacks[SERVICES] = "systemd did not boot this host"
    if not undeployed:
        lacks[UNDEPLOYED] = "kvmi-host is deployed here, and what it is configured to do is left alone"
    if not first_number:
        lacks[FIRST_NUMBER] = f"this kernel part has no {_FIRST_NUMBER.name}"
    return lacks


def deployed(root: Path = Path("/")) -> bool:
    """Whether the host has a configuration of kvmi-host that is not a test's."""
    files = (path for path in (root / "etc/kvmi-host").rglob("*") if not path.is_dir() or path.is_symlink())
    return any(files) or (root / "etc/libvirt/hooks/qemu.d/kvmi-host").exists()
