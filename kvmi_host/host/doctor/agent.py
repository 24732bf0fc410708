# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is installed of ours, and the agent: its service, its socket, its secret (``docs/agent.md``)."""

from __future__ import annotations

import re
import tomllib
from typing import Any

from kvmi_host import __version__
from kvmi_host.host.doctor.finding import Check, Verdict, missing, note, ok, unknown
from kvmi_host.host.doctor.libvirtd import apparmor_confines, qemu_user
from kvmi_host.host.doctor.machine import Machine
from kvmi_host.host.doctor.qemu import with_object

CONFIG = "/etc/kvmi-host/agent.toml"
SOCKET = "/run/kvmi-agent/agent.sock"
RULES = "/etc/apparmor.d/local/abstractions/libvirt-qemu"
"""Where AppArmor's rules of all QEMUs of libvirt are added to."""


def package(machine: Machine) -> Verdict:
    """kvmi-host is installed there, in this version: VMs are attached to on their own host."""
    said = machine.said("kvmi-host")
    if said is None:
        return note("it is not installed", "pip install it in /opt/kvmi-host, as the README says")
    if said.status:
        return missing(f"it does not start: {said.last_line}", "install it anew, as the README says")
    if said.last_line != __version__:
        remedy = "install the same one on both, if one is to read what the other writes"
        return note(f"it is {said.last_line}, and this one is {__version__}", remedy)
    return ok(f"version {__version__}")


def binding(machine: Machine) -> Verdict:
    """Python can speak to libvirt: guests are found by name."""
    said = machine.said("binding")
    if said is None:
        return unknown("there is no Python to ask", "apt-get install python3")
    if said.status:
        remedy = "apt-get install python3-libvirt, and make the environment with --system-site-packages"
        return note(f"guests are not found by name, only by pid:N: {said.last_line}", remedy)
    return ok(f"Python has libvirt's binding ({said.last_line})")


def service(machine: Machine) -> Verdict:
    """The agent's service runs, if there is one."""
    said = machine.said("service")
    if said is None or said.status:
        return unknown("systemd was not asked, or did not answer", "see: systemctl status kvmi-agent")
    fields = dict(line.split("=", 1) for line in said.text.splitlines() if "=" in line)
    if fields.get("LoadState") == "not-found":
        return note("it is not installed: each session needs an introspector of its own", "see docs/agent.md")
    state, enabled = fields.get("ActiveState", "unknown"), fields.get("UnitFileState") == "enabled"
    if state == "active":
        watched = ", without a watchdog" if fields.get("WatchdogUSec") == "0" else ""
        if not enabled:
            return note(f"it runs{watched}, and will not after the next boot", "systemctl enable kvmi-agent")
        return ok(f"it runs{watched}, and will after the next boot")
    journal = machine.said("journal")
    last = f"; the last it said: {journal.last_line}" if journal and journal.text else ""
    if state == "failed" or enabled:
        evidence = f"{state} ({fields.get('Result', '?')}){last}"
        return missing(evidence, f"kvmi-host agent --check --config {CONFIG}; systemctl restart kvmi-agent")
    return note(f"it is installed, and {state}", "systemctl enable --now kvmi-agent")


def _listen(machine: Machine) -> dict[str, Any]:
    """What the agent's configuration says of its socket.

    :raise ValueError: it is no TOML.
    """
    try:
        listen = tomllib.loads(machine.read(CONFIG) or "").get("listen", {})
    except RecursionError:
        raise ValueError("too many brackets") from None
    return listen if isinstance(listen, dict) else {}


def socket(machine: Machine) -> Verdict:
    """The agent's socket is there, and those who have to can connect."""
    try:
        path = str(_listen(machine).get("socket", SOCKET))
    except ValueError as error:
        return missing(f"{CONFIG} is no TOML: {error}", f"mend it: kvmi-host agent --check --config {CONFIG}")
    status = machine.status(path)
    if status is None:
        return note(f"nobody listens at {path}", "see: agent")
    if status.kind != "socket":
        return missing(f"{path} is a {status.kind}", "remove it, and restart the agent")
    if status.mode & 0o002:
        return missing(f"{path} is open to everybody: {status}", f"chmod o= {path}, and restart the agent")
    if not with_object(machine):
        return ok(f"{path}: {status}; attach connects to it as root")
    # KVM-VMI's QEMU connects by itself.
    user, reach = qemu_user(machine), machine.said("reach")
    if reach is None:
        return unknown(f"{path}: {status}; whether {user} can connect takes root to tell", "ask as root")
    if reach.status:
        remedy = f"setfacl -m u:{user}:rw {path}, as ExecStartPost= of the service; and `users` in {CONFIG}"
        return missing(f"{path}: {status}; QEMU, which runs as {user}, cannot connect", remedy)
    rules = machine.read(RULES) or ""
    if apparmor_confines(machine) and path not in rules:
        return missing(f"AppArmor keeps QEMU away from {path}", f"a line `{path} rw,` in {RULES}")
    return ok(f"{path}: {status}; QEMU, which runs as {user}, can connect")


def secret(machine: Machine) -> Verdict:
    """The secret that VMs are to know is there, and is one."""
    try:
        path = _listen(machine).get("cookie_file")
    except ValueError:
        return unknown(f"{CONFIG} is no TOML", "see: agent's socket")
    if machine.denies(CONFIG):
        return unknown(f"{CONFIG} is not for this user to read", "ask as root")
    if path is None:
        return ok("there is none: whoever may connect is let in")
    status = machine.status(str(path))
    if re.match(r"/run/credentials/", str(path)):
        return ok(f"systemd hands it over as {path}")
    if status is None:
        remedy = f"write the secret there, or take cookie_file out of {CONFIG}"
        return missing(f"there is no {path}, which {CONFIG} names", remedy)
    if status.mode & 0o077:
        return missing(f"{path} is open to others: {status}", f"chmod 600 {path}, and take a new secret")
    return ok(f"{path}: {status}; `attach --cookie-file` and QEMU's secret have to hold the same")


CHECKS = (
    Check("kvmi-host", "kvmi-host", package),
    Check("kvmi-host", "libvirt's binding", binding),
    Check("agent", "agent", service),
    Check("agent", "agent's socket", socket),
    Check("agent", "agent's secret", secret),
)
