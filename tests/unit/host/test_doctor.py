# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every check of the doctor: a host that has it, and one that has not, with what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmi_host import __version__
from kvmi_host.host.doctor import CHECKS, Finding, Machine, State, examine
from kvmi_host.host.doctor.kernel import DKMS_KEY, LOCKDOWN, PARAMETER, PTRACE_SCOPE, SECURE_BOOT, TAINTED
from kvmi_host.host.doctor.libvirtd import APPARMOR, QEMU_CONF
from kvmi_host.host.doctor.machine import Said, Status
from kvmi_host.host.printable import printable

RELEASE, NEXT = "6.1.0-55-amd64", "6.1.0-56-amd64"
QEMU = "/usr/bin/qemu-system-x86_64"
AGENT, RULES = "/etc/kvmi-host/agent.toml", "/etc/apparmor.d/local/abstractions/libvirt-qemu"
SOCKET, COOKIE = "/run/kvmi-agent/agent.sock", "/etc/kvmi-host/cookie"
HOOK = "/etc/libvirt/hooks/qemu.d/kvmi"
LIBVIRT_SOCKET = "/run/libvirt/libvirt-sock"
FIRMWARE_ON, FIRMWARE_OFF = "\6\0\0\0\1", "\6\0\0\0\0"

FILES: Mapping[str, str] = {
    "/proc/cpuinfo": "vendor_id : AuthenticAMD\nflags\t\t: fpu svm\n",
    "/proc/cmdline": "quiet\n",
    TAINTED: "4096\n",
    PTRACE_SCOPE: "1\n",
    "/sys/module/kvm/version": "kvmi\n",
    "/sys/module/kvm/srcversion": "0123456789\n",
    PARAMETER: "Y\n",
    "/etc/modprobe.d/kvmi.conf": "# ours\noptions kvm introspection=1\n",
    SECURE_BOOT: FIRMWARE_ON,
    LOCKDOWN: "[none] integrity confidentiality\n",
    APPARMOR: "Y\n",
    QEMU_CONF: '#user = "root"\n#security_driver = "selinux"\n',
    HOOK: "#!/bin/sh\nexec kvmi-host attach\n",
    AGENT: f'[listen]\nsocket = "{SOCKET}"\ncookie_file = "{COOKIE}"\n',
    RULES: f"{SOCKET} rw,\n",
}
THERE = (
    *("/sys/module/kvm", "/sys/module/kvm_amd", DKMS_KEY, "/usr/src/kvmi-0.1.0", "/usr/src/linux-source-6.1.tar.xz"),
    *(f"/boot/vmlinuz-{release}" for release in (RELEASE, NEXT)),
    *(f"/lib/modules/{release}/kernel" for release in (RELEASE, NEXT)),
    *(f"/lib/modules/{release}/build/Makefile" for release in (RELEASE, NEXT)),
    *(f"/lib/modules/{release}/updates/dkms/kvm.ko" for release in (RELEASE, NEXT)),
)
STATUSES: Mapping[str, Status] = {
    "/dev/kvm": Status("character special file", 0o660, "root", "kvm"),
    LIBVIRT_SOCKET: Status("socket", 0o770, "root", "libvirt"),
    HOOK: Status("regular file", 0o755, "root", "root"),
    SOCKET: Status("socket", 0o660, "kvmi-agent", "kvmi-agent"),
    COOKIE: Status("regular file", 0o600, "kvmi-agent", "root"),
}
OBJECTS = "List of user creatable objects:\n  iothread\n"
PROGRAMS: Mapping[str, Said] = {
    "user": Said("uid=1000(alice) gid=1000(alice) groups=1000(alice),104(kvm),105(libvirt)", 0),
    "kernel": Said(RELEASE, 0),
    "modinfo": Said("filename:       /lib/modules/kvm.ko\nversion:        kvmi\nsrcversion:     0123456789", 0),
    "mokutil": Said("/var/lib/dkms/mok.pub is already enrolled", 1),
    "log": Said("kvm: Nested Virtualization enabled", 0),
    "capabilities": Said("180=1 999=1 206=1", 0),
    f"version of {QEMU}": Said("QEMU emulator version 7.2.22 (Debian)\nCopyright", 0),
    f"objects of {QEMU}": Said(OBJECTS, 0),
    "libvirt": Said("9.0.0", 0),
    "guests": Said("webserver\nmail", 0),
    "binding": Said("9000000", 0),
    "kvmi-host": Said(__version__, 0),
    "service": Said("LoadState=loaded\nActiveState=active\nUnitFileState=enabled\nWatchdogUSec=30s", 0),
    "journal": Said("bad.toml: no such handler", 0),
    "reach": Said("", 0),
}


class Case(NamedTuple):
    """What is otherwise than on a host that is ready (None: not there), and what the check says then."""

    subject: str
    state: State
    evidence: str
    remedy: str
    files: Mapping[str, str | None] = {}
    programs: Mapping[str, Said | None] = {}
    statuses: Mapping[str, Status | None] = {}
    without: tuple[str, ...] = ()
    denied: tuple[str, ...] = ()
    there: tuple[str, ...] = ()


def examined(case: Case | None = None) -> dict[str, Finding]:
    """Findings by subject."""
    case = case or Case("", State.OK, "", "")
    files = {name: text.encode() for name, text in {**FILES, **case.files}.items() if text is not None}
    machine = Machine(
        {name: text for name, text in files.items() if name not in case.denied},
        case.denied,
        [path for path in (*THERE, *case.there) if path not in case.without],
        {name: status for name, status in {**STATUSES, **case.statuses}.items() if status is not None},
        {name: said for name, said in {**PROGRAMS, **case.programs}.items() if said is not None},
    )
    return {finding.subject: finding for finding in examine(machine)}


STOCK: Mapping[str, str | None] = {"/sys/module/kvm/version": None, PARAMETER: None}
"""Debian's modules have neither."""
NOTHING = Said("180=0 999=0 206=1", 0)
KVM_VMI = Said("180=1 999=0 206=0", 0)
WITH_OBJECT = {f"objects of {QEMU}": Said(OBJECTS + "  introspection\n", 0)}
OK, NOTE, MISSING, UNKNOWN = State

CASES = (
    Case("virtualization", MISSING, "neither svm nor vmx", "firmware", {"/proc/cpuinfo": "flags : fpu"}),
    Case("virtualization", MISSING, "neither", "host-passthrough", {"/proc/cpuinfo": "flags : fpu hypervisor"}),
    Case("virtualization", OK, "itself virtual, has vmx", "", {"/proc/cpuinfo": "flags : vmx hypervisor"}),
    Case(
        *("firmware", MISSING, "SVM disabled (by BIOS)", "firmware's setup"),
        programs={"log": Said("[ 1.0] kvm: SVM disabled (by BIOS) in MSR_VM_CR", 0)},
        without=("/sys/module/kvm_amd",),
    ),
    Case("firmware", UNKNOWN, "does not say why", "modprobe kvm_amd", without=("/sys/module/kvm_amd",)),
    Case("/dev/kvm", MISSING, "there is no /dev/kvm", "modprobe kvm_amd", statuses={"/dev/kvm": None}),
    Case(
        *("/dev/kvm", MISSING, "alice may not open it", "usermod -aG kvm alice"),
        programs={"user": Said("uid=1000(alice) gid=1000(alice) groups=1000(alice)", 0)},
    ),
    Case(
        *("/dev/kvm", MISSING, "regular file", "remove it"),
        statuses={"/dev/kvm": Status("regular file", 0o644, "root", "root")},
    ),
    Case("/dev/kvm", OK, "root may open it", "", programs={"user": Said("uid=0(root) gid=0(root) groups=0(root)", 0)}),
    Case("loaded modules", MISSING, "kvm is not loaded", "modprobe kvm_amd", without=("/sys/module/kvm",)),
    Case("loaded modules", MISSING, "the kernel's own", "kvmi-dkms", STOCK, {"capabilities": NOTHING}),
    Case("loaded modules", MISSING, "with neither", "modprobe kvm_amd", without=("/sys/module/kvm_amd",)),
    Case("loaded modules", OK, "KVM-VMI", "", STOCK, {"capabilities": KVM_VMI}),
    Case("kvm.introspection", MISSING, "switched off", "write 1", {PARAMETER: "N\n"}),
    Case("kvm.introspection", UNKNOWN, "no such parameter", "loaded modules", {PARAMETER: None}),
    Case("kvm.introspection", NOTE, "off again", "options kvm", {"/etc/modprobe.d/kvmi.conf": "#options kvm x=1"}),
    Case(
        *("kvm.introspection", OK, "will be after", ""),
        {"/etc/modprobe.d/kvmi.conf": None, "/proc/cmdline": "quiet kvm.introspection=1"},
    ),
    Case("capability", MISSING, "KVM answers 0", "loaded modules", STOCK, {"capabilities": NOTHING}),
    Case("capability", MISSING, "switched off", "introspection", {PARAMETER: "N"}, {"capabilities": NOTHING}),
    Case("capability", MISSING, "v12", "Debian's", {"/sys/module/kvm/version": None}, {"capabilities": NOTHING}),
    Case(
        "capability", UNKNOWN, "Permission denied", "/dev/kvm", programs={"capabilities": Said("Permission denied", 1)}
    ),
    Case("capability", UNKNOWN, "takes Python", "python3", programs={"capabilities": None}),
    Case("capability", OK, "v7, from the VMM alone", "", STOCK, {"capabilities": KVM_VMI}),
    Case("capability", OK, "v6, from the VMM alone", "", STOCK, {"capabilities": Said("180=0 999=1 206=0", 0)}),
    Case("modules on the disk", UNKNOWN, "no modinfo", "kmod", programs={"modinfo": None}),
    Case("modules on the disk", NOTE, "than ours: /k", "kvmi-dkms", programs={"modinfo": Said("filename: /k", 0)}),
    Case(
        "modules on the disk",
        MISSING,
        "another kvm",
        "kvmi-dkms",
        STOCK,
        {"modinfo": Said("", 1), "capabilities": NOTHING},
    ),
    Case("modules on the disk", NOTE, "another build (77)", "modprobe -r", {"/sys/module/kvm/srcversion": "77\n"}),
    Case("modules for each kernel", NOTE, "does not build", "kvmi-dkms", without=("/usr/src/kvmi-0.1.0",)),
    Case(
        *("modules for each kernel", NOTE, f"has not built ours for {NEXT}", f"dkms autoinstall -k {NEXT}"),
        without=(f"/lib/modules/{NEXT}/updates/dkms/kvm.ko",),
    ),
    Case(
        *("modules for each kernel", NOTE, NEXT, f"apt-get install linux-headers-{NEXT}; dkms"),
        without=(f"/lib/modules/{NEXT}/updates/dkms/kvm.ko", f"/lib/modules/{NEXT}/build/Makefile"),
    ),
    Case(
        *("modules for each kernel", NOTE, NEXT, "apt-get install linux-source-6.1; dkms"),
        without=(f"/lib/modules/{NEXT}/updates/dkms/kvm.ko", "/usr/src/linux-source-6.1.tar.xz"),
    ),
    Case(
        *("modules for each kernel", NOTE, "none for 6.5.0-1-amd64, of another series", "6.1 or 6.12"),
        there=("/lib/modules/6.5.0-1-amd64/kernel",),
    ),
    Case(
        *("modules for each kernel", NOTE, "6.5.0-1-amd64", f"dkms autoinstall -k {NEXT}"),
        without=(f"/lib/modules/{NEXT}/updates/dkms/kvm.ko",),
        there=("/lib/modules/6.5.0-1-amd64/kernel",),
    ),
    Case(
        *("kernel headers", NOTE, f"none for {NEXT}", f"apt-get install linux-headers-{NEXT}"),
        without=(f"/lib/modules/{NEXT}/build/Makefile",),
    ),
    Case("Secure Boot", OK, "off", "", {SECURE_BOOT: FIRMWARE_OFF}),
    Case("Secure Boot", OK, "there is none", "", {SECURE_BOOT: None}),
    Case("Secure Boot", MISSING, "no key", "kvmi-dkms", without=(DKMS_KEY,)),
    Case(
        "Secure Boot", MISSING, "not enrolled", "mokutil --import", programs={"mokutil": Said("it is not enrolled", 0)}
    ),
    Case("Secure Boot", UNKNOWN, "takes mokutil", "install mokutil", programs={"mokutil": None}),
    Case("Secure Boot", UNKNOWN, "not for this user", "root", denied=(SECURE_BOOT,)),
    Case("lockdown", NOTE, "integrity", "signed", {**STOCK, LOCKDOWN: "none [integrity] confidentiality"}),
    Case("lockdown", OK, "our modules are loaded", "", {LOCKDOWN: "none [integrity] confidentiality"}),
    Case("ptrace", MISSING, "ptrace_scope is 3", "/etc/sysctl.d", {PTRACE_SCOPE: "3\n"}),
    Case("ptrace", OK, "KVM-VMI", "", {**STOCK, PTRACE_SCOPE: "3"}, {"capabilities": KVM_VMI}),
    Case("ptrace", OK, "is 0", "", {PTRACE_SCOPE: None}),
    Case("kernel's health", NOTE, "an oops, a warning", "dmesg", {TAINTED: str(1 << 7 | 1 << 9)}),
    Case("kernel's health", UNKNOWN, "says nothing", "/proc", {TAINTED: None}),
    Case("QEMU", MISSING, "no qemu-system", "qemu-system-x86", programs={f"version of {QEMU}": None}),
    Case(
        *("QEMU", MISSING, "/opt/qemu: error while loading shared libraries", "<emulator>"),
        programs={"version of /opt/qemu": Said("/opt/qemu: error while loading shared libraries", 127)},
    ),
    Case(
        *("introspection object", MISSING, "from the VMM alone", "KVM-VMI's QEMU"),
        STOCK,
        {"capabilities": KVM_VMI},
    ),
    Case("introspection object", NOTE, "not needed once", "loaded modules", STOCK, {"capabilities": NOTHING}),
    Case("introspection object", UNKNOWN, "no QEMU", "QEMU", STOCK, {f"objects of {QEMU}": None}),
    Case("introspection object", OK, "qemu-object", "", STOCK, {"capabilities": KVM_VMI, **WITH_OBJECT}),
    Case(
        *("libvirt", MISSING, "neither its socket nor virsh", "libvirt-daemon-system"),
        programs={"guests": None},
        statuses={LIBVIRT_SOCKET: None},
    ),
    Case("libvirt", UNKNOWN, "takes virsh", "libvirt-clients", programs={"guests": None}),
    Case("libvirt", MISSING, "within 30 s", "restart libvirtd", programs={"guests": Said("", 124)}),
    Case(
        *("libvirt", MISSING, "No such file", "libvirtd.socket"),
        programs={"guests": Said("error: Failed to connect socket: No such file or directory", 1)},
    ),
    Case(
        *("libvirt's permission", MISSING, "root:libvirt", "usermod -aG libvirt alice"),
        programs={"guests": Said("error: authentication unavailable: no polkit agent available", 1)},
    ),
    Case("libvirt's permission", UNKNOWN, "not asked", "libvirt", programs={"guests": None}),
    Case("QEMU's confinement", UNKNOWN, "not for this user", "root", denied=(QEMU_CONF,)),
    Case("QEMU's confinement", NOTE, "runs as root", "take `user` out", {QEMU_CONF: 'user = "root"\n'}),
    Case("QEMU's confinement", NOTE, "no AppArmor profile", "apparmor", {APPARMOR: "N\n"}),
    Case("QEMU's confinement", NOTE, "no AppArmor", "security_driver", {QEMU_CONF: 'security_driver = [ "none" ]\n'}),
    Case("QEMU's confinement", OK, "AppArmor", "", {QEMU_CONF: 'security_driver = [ "selinux", "apparmor" ]\n'}),
    Case("libvirt's hook", NOTE, "none is installed", "hooks/qemu.d", {HOOK: "#!/bin/sh\n"}),
    Case(
        *("libvirt's hook", MISSING, "not executable", "chmod 755"),
        statuses={HOOK: Status("regular file", 0o644, "root", "root")},
    ),
    Case("kvmi-host", NOTE, "not installed", "README", programs={"kvmi-host": None}),
    Case("kvmi-host", NOTE, "it is 0.0.1, and this one", "the same", programs={"kvmi-host": Said("0.0.1", 0)}),
    Case(
        *("kvmi-host", MISSING, "ModuleNotFoundError", "install it anew"),
        programs={"kvmi-host": Said("Traceback\nModuleNotFoundError: typer", 1)},
    ),
    Case(
        *("libvirt's binding", NOTE, "No module named", "python3-libvirt"),
        programs={"binding": Said("Traceback\nModuleNotFoundError: No module named 'libvirt'", 1)},
    ),
    Case("libvirt's binding", UNKNOWN, "no Python", "python3", programs={"binding": None}),
    Case("agent", NOTE, "not installed", "docs/agent.md", programs={"service": Said("LoadState=not-found", 0)}),
    Case(
        *("agent", MISSING, "failed (exit-code); the last it said: bad.toml", "--check"),
        programs={"service": Said("LoadState=loaded\nActiveState=failed\nResult=exit-code", 0)},
    ),
    Case(
        *("agent", NOTE, "not after the next boot", "systemctl enable"),
        programs={"service": Said("LoadState=loaded\nActiveState=active\nUnitFileState=disabled", 0)},
    ),
    Case(
        *("agent", NOTE, "inactive", "enable --now"),
        programs={"service": Said("LoadState=loaded\nActiveState=inactive\nUnitFileState=disabled", 0)},
    ),
    Case("agent", UNKNOWN, "did not answer", "systemctl", programs={"service": None}),
    Case("agent's socket", NOTE, "nobody listens", "agent", statuses={SOCKET: None}),
    Case("agent's socket", MISSING, "no TOML", "--check", {AGENT: "[listen"}),
    Case("agent's socket", MISSING, "no TOML", "--check", {AGENT: "x = " + "[" * 50_000}),
    Case(
        *("agent's socket", MISSING, "regular file", "remove it"),
        statuses={SOCKET: Status("regular file", 0o600, "root", "root")},
    ),
    Case(
        *("agent's socket", MISSING, "open to everybody: 0666", "chmod o="),
        statuses={SOCKET: Status("socket", 0o666, "kvmi-agent", "kvmi-agent")},
    ),
    Case(
        *("agent's socket", MISSING, "libvirt-qemu, cannot connect", "setfacl"),
        programs={**WITH_OBJECT, "reach": Said("", 1)},
    ),
    Case("agent's socket", UNKNOWN, "takes root", "root", programs={**WITH_OBJECT, "reach": None}),
    Case("agent's socket", MISSING, "AppArmor", f"{SOCKET} rw,", {RULES: None}, WITH_OBJECT),
    Case("agent's socket", OK, "libvirt-qemu, can connect", "", programs=WITH_OBJECT),
    Case(
        *("agent's socket", OK, "0600 root:root system_u:object_r:virt_t:s0", ""),
        statuses={SOCKET: Status("socket", 0o600, "root", "root", "system_u:object_r:virt_t:s0")},
    ),
    Case("agent's secret", MISSING, f"there is no {COOKIE}", "write the secret", statuses={COOKIE: None}),
    Case(
        *("agent's secret", MISSING, "open to others: 0644", "chmod 600"),
        statuses={COOKIE: Status("regular file", 0o644, "root", "root")},
    ),
    Case("agent's secret", UNKNOWN, "no TOML", "agent's socket", {AGENT: "[listen"}),
    Case("agent's secret", UNKNOWN, "not for this user", "root", denied=(AGENT,)),
    Case("agent's secret", OK, "there is none", "", {AGENT: None}),
    Case("agent's secret", OK, "systemd", "", {AGENT: '[listen]\ncookie_file = "/run/credentials/k.service/c"'}),
)


def test_a_host_that_is_ready_has_nothing_to_do() -> None:
    assert [finding for finding in examined().values() if (finding.state, finding.remedy) != (OK, "")] == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.subject}: {case.evidence}")
def test_what_is_otherwise_is_said_with_what_to_do(case: Case) -> None:
    finding = examined(case)[case.subject]
    assert finding.state is case.state
    assert case.evidence in finding.evidence
    assert case.remedy in finding.remedy


@pytest.mark.parametrize("subject", [check.subject for check in CHECKS])
def test_every_check_can_fail(subject: str) -> None:
    assert {case.state for case in CASES if case.subject == subject} - {OK}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.subject}: {case.evidence}")
def test_there_is_something_to_do_unless_it_is_ok(case: Case) -> None:
    for finding in examined(case).values():
        assert bool(finding.remedy) == (finding.state is not OK)


def test_subjects_are_named_once() -> None:
    assert len({check.subject for check in CHECKS}) == len(CHECKS)


def test_a_host_of_which_nothing_was_seen_can_be_judged() -> None:
    assert {finding.subject for finding in examine(Machine())} == {check.subject for check in CHECKS}


def test_what_a_program_says_at_length_is_cut() -> None:
    finding = examined(Case("", OK, "", "", programs={"binding": Said("x" * 60_000, 1)}))["libvirt's binding"]
    assert len(finding.evidence) == 400


CONTENTS = st.one_of(st.sampled_from(sorted(text.encode() for text in FILES.values())), st.binary(max_size=40))
SAID = st.builds(Said, CONTENTS.map(lambda content: printable(content.decode(errors="replace"))), st.integers(-1, 124))


@settings(deadline=None)
@given(
    files=st.dictionaries(st.sampled_from(sorted(FILES)), CONTENTS),
    programs=st.dictionaries(st.sampled_from(sorted(PROGRAMS)), SAID),
)
def test_whatever_is_there_can_be_judged(files: dict[str, bytes], programs: dict[str, Said]) -> None:
    assert len(list(examine(Machine(files, (), THERE, STATUSES, programs)))) == len(CHECKS)
