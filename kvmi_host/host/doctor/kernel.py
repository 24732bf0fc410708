# SPDX-License-Identifier: LGPL-2.1-or-later
"""CPU and KVM: which modules are loaded, what they can, and what the next boot will bring.

The rules about modules are those of ``kernel/README.md``; capability numbers and dialects are KVMI's.
"""

from __future__ import annotations

import re

from kvmi_host.host.doctor.finding import Check, Verdict, missing, note, ok, unknown
from kvmi_host.host.doctor.machine import Machine
from kvmi_host.host.kernels import Series

OUR_VERSION = "kvmi"
"""What ``modinfo -F version`` says of our modules. Debian's own have no version."""

PARAMETER = "/sys/module/kvm/parameters/introspection"
SECURE_BOOT = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
DKMS_KEY = "/var/lib/dkms/mok.pub"
LOCKDOWN = "/sys/kernel/security/lockdown"
PTRACE_SCOPE = "/proc/sys/kernel/yama/ptrace_scope"
TAINTED = "/proc/sys/kernel/tainted"

_SERIES = Series.packaged()
_INSTALL = "install kvmi-dkms (`make dkms` builds it)"
_RELOAD = "stop all VMs, then modprobe -r kvm_amd kvm && modprobe kvm_amd (or kvm_intel)"
_VENDOR_MODULES = {"svm": "kvm_amd", "vmx": "kvm_intel"}
_DISABLED = re.compile(r"disabled.{0,16}bios|not enabled.{0,16}bios", re.IGNORECASE)
# Documentation/admin-guide/tainted-kernels.rst: bits that tell of a kernel which is no longer sound.
_UNSOUND = {4: "a machine check", 5: "a bad page", 7: "an oops", 9: "a warning", 14: "a soft lockup"}


def _vendor_module(machine: Machine) -> str:
    """The module that this CPU takes, or both to choose from."""
    flags = (machine.read("/proc/cpuinfo") or "").split()
    return next((module for flag, module in _VENDOR_MODULES.items() if flag in flags), "kvm_amd, or kvm_intel")


def virtualization(machine: Machine) -> Verdict:
    """The CPU has SVM or VMX."""
    flags = set((machine.read("/proc/cpuinfo") or "").split())
    if found := _VENDOR_MODULES.keys() & flags:
        inside = ", itself virtual," if "hypervisor" in flags else ""
        return ok(f"the CPU{inside} has {min(found)}")
    evidence = "the CPU's flags have neither svm nor vmx"
    if "hypervisor" in flags:
        remedy = "this is a virtual machine: give it its host's CPU (mode='host-passthrough'), with nested=1 of its KVM"
        return missing(evidence, remedy)
    return missing(evidence, "switch it on in the firmware's setup (SVM, VT-x)")


def firmware(machine: Machine) -> Verdict:
    """The firmware has not switched virtualization off behind the CPU's flag."""
    if loaded := [module for module in _VENDOR_MODULES.values() if machine.has(f"/sys/module/{module}")]:
        return ok(f"{loaded[0]} could be loaded")
    log = machine.said("log")
    if log and (line := next(filter(_DISABLED.search, log.text.splitlines()), None)):
        return missing(f"the kernel's log: {line.strip()}", "switch it on in the firmware's setup (SVM, VT-x)")
    evidence = "neither kvm_amd nor kvm_intel is loaded, and the kernel's log does not say why"
    return unknown(evidence, f"modprobe {_vendor_module(machine)}, and see what it says")


def device(machine: Machine) -> Verdict:
    """There is /dev/kvm, and this user may open it."""
    status = machine.status("/dev/kvm")
    if status is None:
        return missing("there is no /dev/kvm", f"modprobe {_vendor_module(machine)}")
    if status.kind != "character special file":
        return missing(f"/dev/kvm is a {status.kind}", "remove it, and load KVM's module anew: udev makes the device")
    user = machine.user
    may = user.root or status.mode & 0o006 == 0o006 or (status.group in user.groups and status.mode & 0o060 == 0o060)
    if may or (status.owner == user.name and status.mode & 0o600 == 0o600):
        return ok(f"{status}; {user.name} may open it")
    remedy = f"usermod -aG {status.group} {user.name}, and log in again"
    return missing(f"{status}; {user.name} may not open it", remedy)


def _capabilities(machine: Machine) -> dict[int, int] | None:
    """What KVM answers for each number of KVM_CAP_INTROSPECTION; None if it was not asked, or did not answer."""
    said = machine.said("capabilities")
    if said is None or said.status:
        return None
    return {int(number): int(value) for number, value in re.findall(r"([0-9]{1,4})=([0-9]{1,4})", said.text)}


def ours(machine: Machine) -> bool:
    """Whether our modules are loaded."""
    return machine.read("/sys/module/kvm/version") == OUR_VERSION


def theirs(machine: Machine) -> bool:
    """Whether it is KVM-VMI's kernel that runs."""
    capabilities = _capabilities(machine) or {}
    return not ours(machine) and bool(capabilities.get(999) or capabilities.get(180))


def loaded(machine: Machine) -> Verdict:
    """The KVM that is loaded has introspection."""
    if not machine.has("/sys/module/kvm"):
        return missing("kvm is not loaded", f"modprobe {_vendor_module(machine)}")
    vendor = [module for module in _VENDOR_MODULES.values() if machine.has(f"/sys/module/{module}")]
    beside = f", with {vendor[0]}" if vendor else ", with neither kvm_amd nor kvm_intel"
    if ours(machine):
        if not vendor:
            return missing(f"kvm is ours{beside}", f"modprobe {_vendor_module(machine)}")
        return ok(f"kvm is ours{beside}")
    if theirs(machine):
        return ok(f"kvm is that of a KVM-VMI kernel{beside}")
    if machine.has(PARAMETER):
        return ok(f"kvm has introspection, and no version of ours{beside}")
    return missing(f"kvm is the kernel's own, without introspection{beside}", f"{_INSTALL}, and {_RELOAD}")


def switch(machine: Machine) -> Verdict:
    """Introspection is switched on, and stays so."""
    value = machine.read(PARAMETER)
    for_good = "`options kvm introspection=1` in a file of /etc/modprobe.d"
    if value is None:
        return unknown("the loaded kvm has no such parameter", "see: loaded modules")
    if value not in {"Y", "1"}:
        return missing("it is switched off", f"write 1 to {PARAMETER}; for good, {for_good}")
    options = [machine.read(found[0]) or "" for found in machine.match(r"/etc/modprobe\.d/[^/]*\.conf")]
    kept = any(re.search(r"^\s*options\s+kvm\s.*\bintrospection=[1yY]", text, re.MULTILINE) for text in options)
    if kept or re.search(r"\bkvm\.introspection=[1yY]", machine.read("/proc/cmdline") or ""):
        return ok("it is switched on, and will be after the next boot")
    return note("it is switched on, but off again when kvm is loaded anew", for_good)


def capability(machine: Machine) -> Verdict:
    """KVM says that it has introspection, in a dialect that kvmi-host speaks."""
    said = machine.said("capabilities")
    if said is None:
        return unknown("asking KVM takes Python", "apt-get install python3")
    found = _capabilities(machine)
    if found is None:
        return unknown(f"KVM was not asked: /dev/kvm: {said.last_line}", "see: /dev/kvm")
    if found.get(999) and found.get(180):
        return ok(f"version {found[999]}, dialect v6, from any process with CAP_SYS_ADMIN (capabilities 180 and 999)")
    if found.get(999):
        return ok(f"version {found[999]}, dialect v6, from the VMM alone (capability 999)")
    if found.get(180):
        return ok(f"version {found[180]}, dialect v7, from the VMM alone (capability 180)")
    if machine.read(PARAMETER) in {"N", "0"}:
        return missing("none, as long as introspection is switched off", "see: kvm.introspection")
    # Mainline has another use for 206: only with the parameter does it mean introspection.
    if found.get(206) and machine.has(PARAMETER) and not ours(machine):
        remedy = f"boot a kernel of Debian's with our modules ({_INSTALL}), or KVM-VMI's 5.4"
        return missing("dialect v12 (capability 206), which kvmi-host does not speak", remedy)
    return missing("none: KVM answers 0 to 180 and 999", "see: loaded modules")


def same_build(machine: Machine) -> Verdict:
    """What is loaded is what modprobe would load: ours, of the same build."""
    said = machine.said("modinfo")
    if said is None:
        return unknown("there is no modinfo", "apt-get install kmod")
    fields = dict(re.findall(r"^(\w+): +(.*)$", said.text, re.MULTILINE))
    if theirs(machine):
        return ok("that of KVM-VMI's kernel, which brings its own")
    if fields.get("version") != OUR_VERSION:
        name = fields.get("filename", f"no module kvm for {machine.kernel}")
        evidence = f"modprobe finds another kvm than ours: {name}"
        return (note if ours(machine) else missing)(evidence, f"{_INSTALL}, or load ours with insmod after each boot")
    build, running = fields.get("srcversion"), machine.read("/sys/module/kvm/srcversion")
    if ours(machine) and build != running:
        return note(f"the loaded kvm is another build ({running}) than that on the disk ({build})", _RELOAD)
    return ok(f"modprobe finds ours: {fields.get('filename', '')}")


def _numbers(release: str) -> list[int]:
    return [int(number) for number in re.findall(r"[0-9]{1,9}", release)]


def next_kernel(machine: Machine) -> str:
    """The release that the next boot most likely brings: the highest that is installed."""
    releases = [found[1] for found in machine.match(r"/boot/vmlinuz-(.+)")]
    releases = [release for release in releases if machine.has(f"/lib/modules/{release}/kernel")]
    return max(releases, key=_numbers, default=machine.kernel)


def headers(machine: Machine) -> Verdict:
    """There are headers to build modules for the next kernel with."""
    release = next_kernel(machine)
    if theirs(machine):
        return ok("not needed: KVM-VMI's kernel brings its own modules")
    if machine.has(f"/lib/modules/{release}/build/Makefile"):
        return ok(f"those of {release}, the next to be booted, are there")
    return note(f"none for {release}, the next to be booted: its modules cannot be built", _headers_of(release))


def _headers_of(release: str) -> str:
    return f"apt-get install linux-headers-{release}"


def every_kernel(machine: Machine) -> Verdict:
    """Each installed kernel has our modules, built by DKMS."""
    if theirs(machine):
        return ok("not needed: KVM-VMI's kernel brings its own modules")
    if not machine.match(r"/usr/src/kvmi-[^/]+"):
        return note("DKMS does not build our modules: a new kernel will be without", _INSTALL)
    installed = [found[1] for found in machine.match(r"/lib/modules/([^/]+)/kernel")]
    built = {found[1] for found in machine.match(r"/lib/modules/([^/]+)/updates/dkms/kvm\.ko.*")}
    without = [release for release in installed if release not in built]
    if not without:
        return ok(f"built by DKMS for {', '.join(installed) or 'no kernel'}")
    ours_to_build = [release for release in without if release.startswith(tuple(f"{series}." for series in _SERIES))]
    if not ours_to_build:
        remedy = f"boot a kernel of {' or '.join(_SERIES)}, or remove the others"
        return note(f"there are none for {', '.join(without)}, of another series", remedy)
    release = max(ours_to_build, key=_numbers)
    source = "linux-source-" + ".".join(release.split(".")[:2])
    if not machine.has(f"/lib/modules/{release}/build/Makefile"):
        first = _headers_of(release) + "; "
    elif not machine.has(f"/usr/src/{source}.tar.xz"):
        first = f"apt-get install {source}; "
    else:
        first = ""
    return note(f"DKMS has not built ours for {', '.join(without)}", f"{first}dkms autoinstall -k {release}")


def secure_boot(machine: Machine) -> Verdict:
    """Secure Boot is off, or trusts the key that DKMS signs with."""
    content = machine.read_bytes(SECURE_BOOT)
    if machine.denies(SECURE_BOOT):
        return unknown(f"{SECURE_BOOT} is not for this user to read", "ask as root")
    if not content:
        return ok("there is none: modules need no signature")
    if not content[-1]:
        return ok("it is off: modules need no signature")
    if not machine.has(DKMS_KEY):
        return missing(f"it is on, and DKMS has no key in {DKMS_KEY}", _INSTALL)
    said = machine.said("mokutil")
    if said is None:
        evidence = "it is on; whether the key of DKMS is enrolled takes mokutil to tell"
        return unknown(evidence, "apt-get install mokutil")
    if "already enrolled" in said.text:
        return ok("it is on, and the key of DKMS is enrolled")
    remedy = f"mokutil --import {DKMS_KEY}, then reboot and choose Enroll MOK"
    return missing("it is on, and the key of DKMS is not enrolled", remedy)


def lockdown(machine: Machine) -> Verdict:
    """The kernel takes modules that nobody signed, or has taken ours."""
    mode = re.search(r"\[(\w+)\]", machine.read(LOCKDOWN) or "[none]")
    if mode is None or mode[1] == "none":
        return ok("it is off")
    if ours(machine):
        return ok(f"it is on ({mode[1]}), and our modules are loaded")
    remedy = "see: Secure Boot; what kernel/build makes is not signed, what DKMS makes is"
    return note(f"it is on ({mode[1]}): unsigned modules are not loaded", remedy)


def ptrace(machine: Machine) -> Verdict:
    """Yama lets root take a descriptor from a VMM: pidfd_getfd(2) needs PTRACE_MODE_ATTACH, which scope 3 forbids."""
    if theirs(machine):
        return ok("not needed: with KVM-VMI's kernel, QEMU itself hands its VM over")
    scope = machine.read(PTRACE_SCOPE) or "0"
    if scope != "3":
        return ok(f"kernel.yama.ptrace_scope is {scope}: root may take a VM's descriptor from its VMM")
    remedy = "take kernel.yama.ptrace_scope=3 out of /etc/sysctl.d, and reboot: it cannot be undone otherwise"
    return missing("kernel.yama.ptrace_scope is 3: not even root can take a VM's descriptor from its VMM", remedy)


def soundness(machine: Machine) -> Verdict:
    """Nothing has gone wrong in this kernel since it was booted."""
    text = machine.read(TAINTED) or ""
    if not re.fullmatch(r"[0-9]{1,20}", text):
        return unknown(f"{TAINTED} says nothing", "is /proc mounted?")
    seen = [name for bit, name in _UNSOUND.items() if int(text) >> bit & 1]
    if not seen:
        return ok(f"no oops, no warning since the boot (tainted {text})")
    return note(f"there was {', '.join(seen)} since the boot (tainted {text})", "read dmesg; reboot")


CHECKS = (
    Check("CPU", "virtualization", virtualization),
    Check("CPU", "firmware", firmware),
    Check("KVM", "/dev/kvm", device),
    Check("KVM", "loaded modules", loaded),
    Check("KVM", "kvm.introspection", switch),
    Check("KVM", "capability", capability),
    Check("KVM", "modules on the disk", same_build),
    Check("KVM", "modules for each kernel", every_kernel),
    Check("KVM", "kernel headers", headers),
    Check("kernel", "Secure Boot", secure_boot),
    Check("kernel", "lockdown", lockdown),
    Check("kernel", "ptrace", ptrace),
    Check("kernel", "kernel's health", soundness),
)
