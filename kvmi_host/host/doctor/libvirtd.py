# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt: whether it answers, whether this user may, how it confines QEMU, and whether it calls us."""

from __future__ import annotations

import re

from kvmi_host.host.doctor.finding import Check, Verdict, missing, note, ok, unknown
from kvmi_host.host.doctor.machine import Machine

QEMU_CONF = "/etc/libvirt/qemu.conf"
QEMU_USER = "libvirt-qemu"
"""The user of Debian's libvirt for QEMU; a line ``user = ...`` in its configuration says otherwise."""
APPARMOR = "/sys/module/apparmor/parameters/enabled"

_SOCKETS = ("/run/libvirt/libvirt-sock", "/run/libvirt/virtqemud-sock")
_INSTALL = "apt-get install libvirt-daemon-system libvirt-clients"
_REFUSED = re.compile(r"authentication|permission denied|access denied|polkit", re.IGNORECASE)


def daemon(machine: Machine) -> Verdict:
    """libvirt's daemon answers for qemu:///system."""
    said = machine.said("guests")
    if said is None:
        if any(machine.has(socket) for socket in _SOCKETS):
            return unknown("its socket is there; asking it takes virsh", "apt-get install libvirt-clients")
        return missing("neither its socket nor virsh is there", _INSTALL)
    if not said.in_time:
        return missing("it did not answer within 30 s", "systemctl restart libvirtd, and journalctl -u libvirtd")
    if said.status and not _REFUSED.search(said.text):
        remedy = "systemctl enable --now libvirtd.socket, or " + _INSTALL
        return missing(f"qemu:///system: {said.last_line}", remedy)
    version = machine.said("libvirt")
    answers = f"it answers virsh {version.last_line if version else ''}".strip()
    if said.status:
        return ok(answers)
    guests = said.text.split()
    return ok(f"{answers}; {len(guests)} running" + (f": {', '.join(guests[:8])}" if guests else ""))


def permission(machine: Machine) -> Verdict:
    """This user may use qemu:///system."""
    said, user = machine.said("guests"), machine.user
    status = next(filter(None, map(machine.status, _SOCKETS)), None)
    beside = f" (its socket: {status})" if status else ""
    if said is not None and said.status and _REFUSED.search(said.text):
        remedy = f"usermod -aG libvirt {user.name}, and log in again; or be root"
        return missing(f"{user.name} may not use it{beside}: {said.last_line}", remedy)
    if said is None or said.status:
        return unknown("it was not asked, or did not answer", "see: libvirt")
    return ok(f"{user.name} may use it{beside}")


def qemu_user(machine: Machine) -> str:
    """The user that QEMU runs as."""
    return _setting(machine.read(QEMU_CONF) or "", "user") or QEMU_USER


def _setting(text: str, name: str) -> str | None:
    """What libvirt's configuration sets, without quotes; comments do not count, and of several lines the last."""
    found = re.findall(rf"^\s*{name}\s*=([^#\n]*)", text, re.MULTILINE)
    return found[-1].strip(" \t\"'") if found else None


def apparmor_confines(machine: Machine) -> bool:
    """Whether libvirt gives each QEMU an AppArmor profile."""
    drivers = _setting(machine.read(QEMU_CONF) or "", "security_driver")
    return machine.read(APPARMOR) == "Y" and (drivers is None or "apparmor" in drivers)


def confinement(machine: Machine) -> Verdict:
    """QEMU runs as a user of its own, confined: it is what a guest that breaks out gets."""
    if machine.denies(QEMU_CONF):
        return unknown(f"{QEMU_CONF} is not for this user to read", "ask as root")
    user = qemu_user(machine)
    if user in {"root", "0", "+0"}:
        return note("QEMU runs as root", f"take `user` out of {QEMU_CONF}, and restart libvirtd")
    if not apparmor_confines(machine):
        remedy = f"boot with AppArmor (apt-get install apparmor), and take security_driver out of {QEMU_CONF}"
        return note(f"QEMU runs as {user}, and no AppArmor profile confines it", remedy)
    return ok(f"QEMU runs as {user}, and AppArmor confines it")


def hook(machine: Machine) -> Verdict:
    """libvirt calls a hook of ours, which attaches guests as they start."""
    hooks = machine.match(r"/etc/libvirt/hooks/qemu(\.d/[^/]+)?")
    mine = [found[0] for found in hooks if "kvmi" in (machine.read(found[0]) or "")]
    if not mine:
        remedy = "to have guests attached to as they start, install ours in /etc/libvirt/hooks/qemu.d"
        return note("none is installed: guests are attached to by hand", remedy)
    for path in mine:
        status = machine.status(path)
        if status and not status.mode & 0o100:
            return missing(f"{path} is not executable ({status}): libvirt passes it over", f"chmod 755 {path}")
    return ok(", ".join(mine))


CHECKS = (
    Check("libvirt", "libvirt", daemon),
    Check("libvirt", "libvirt's permission", permission),
    Check("libvirt", "QEMU's confinement", confinement),
    Check("libvirt", "libvirt's hook", hook),
)
