# SPDX-License-Identifier: LGPL-2.1-or-later
"""The proof that ``ansible/`` does what it says: a stock Debian 12 becomes a host, gets another kernel, and becomes
what it was, in an emulated machine and by SSH.

    python -m kvmi_host.lab.rollout       # or ci/deploy; K=step chooses, KEEP=1 leaves the machine

What is looked at is what a user would look at: what Ansible prints, ``kvmi-host doctor``, the hardware suite, and at
the end every file and every package.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvmi_host.lab.errors import LabError
from kvmi_host.lab.paths import program, project_root
from kvmi_host.lab.progress import say, step, tail
from kvmi_host.lab.stock_host import NAME, StockHost

_PLAY_DEADLINE = 3 * 3600  # seconds; DKMS builds six modules in an emulated machine
_SMOKE = "test_breakpoint or test_msr or test_hook"
"""Of the hardware suite: events, registers, and the life of a session."""

HOLDER = """
import ctypes, fcntl, os, signal
vm = fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR), 0xAE01, 0)  # KVM_CREATE_VM
signal.pause()
"""
"""A VMM that libvirt does not know of."""

LEFT_BEHIND: Mapping[str, str] = {
    r"/var/lib/(dpkg|apt)/.*|/var/cache/(apt|debconf)/.*": "what apt, dpkg and debconf keep of packages",
    r"/var/lib/systemd/(deb-systemd-helper-[a-z]+|timers)/.*": "what systemd keeps of units",
    r"/var/log/.*|/var/backups/.*|/var/tmp/systemd-private-.*": "logs, backups, and services' temporary files",
    r"/var/cache/apparmor/.*": "profiles, compiled for each kernel",
    r"/var/cache/ldconfig/aux-cache": "what ldconfig knows of libraries",
    r"/root/\.ansible(/.*)?": "Ansible's folder for modules",
    r"/etc/xml|/etc/apparmor\.d/(disable|local/abstractions)|/var/lib/(machines|portables)": "empty folders",
}
"""What Debian leaves by design when packages go, and why: patterns of whole paths."""

REWRITTEN: Mapping[str, str] = {
    r"[0-9a-f]{64} +/etc/g?shadow-?|[0-9a-f]{64} +/etc/(passwd|group)-?": "users: they are looked at by themselves",
    r"[0-9a-f]{64} +/etc/ld\.so\.cache": "made anew as libraries come and go",
}
"""Whose contents may be others, and why: patterns of what sha256sum prints."""

USERS_LEFT = frozenset(
    {"libvirt", "libvirt-qemu", "libvirt-dnsmasq", "kvm", "render", "rdma", "swtpm", "tss", "polkitd", "dnsmasq"}
)
"""Users and groups that Debian's packages make and never remove."""


@dataclass(frozen=True)
class Recap:
    """Ansible's last word of a host."""

    ok: int
    changed: int
    unreachable: int
    failed: int

    @classmethod
    def of(cls, output: str, host: str = NAME) -> Recap:
        """
        :param output: all that ansible-playbook printed.
        :raise LabError: it has no recap of the host.
        """
        found = re.search(rf"^{re.escape(host)}\s*:\s*(.*)$", output, re.MULTILINE)
        if found is None:
            raise LabError(f"Ansible has not come to its end:\n{output[-2000:]}")
        numbers = dict(re.findall(r"(\w+)=(\d+)", found[1]))
        return cls(*(int(numbers[key]) for key in ("ok", "changed", "unreachable", "failed")))


def refusals(output: str) -> list[str]:
    """What Ansible's tasks failed with, each in one line."""
    found = re.findall(r'^fatal: \[[^\]]*\]: \w+!.*?"msg": "((?:[^"\\]|\\.)*)"', output, re.MULTILINE | re.DOTALL)
    return [" ".join(json.loads(f'"{text}"').split()) for text in found]


def strange(before: Iterable[str], after: Iterable[str], known: Iterable[str] = LEFT_BEHIND) -> list[str]:
    """What is there afterwards or is not any more, but for what is known to be left; + and - in front."""
    expected = [re.compile(pattern) for pattern in known]
    old, new = set(before), set(after)
    marked = [*(f"+{path}" for path in new - old), *(f"-{path}" for path in old - new)]
    return sorted(path for path in marked if not any(pattern.fullmatch(path[1:]) for pattern in expected))


@dataclass
class Row:
    """A line of the table. ``seconds`` is what it took."""

    name: str
    seconds: float
    result: str
    passed: bool


class Rollout:
    """The sequence, on one machine.

    :param out: where logs go.
    """

    def __init__(self, host: StockHost, out: Path) -> None:
        self.host, self.out = host, out
        self.root = project_root()
        self.rows: list[Row] = []
        self._before: dict[str, list[str]] = {}
        self._inventory = out / "inventory.json"

    def steps(self) -> Iterator[tuple[str, Callable[[], str]]]:
        """Each step's name, and what does it and says how it went; it raises LabError where it failed."""
        yield "inventory", self.remember
        yield "refuses: a VM runs", self.refuses_while_a_vm_runs
        yield "refuses: another kernel", self.refuses_another_kernel
        yield "refuses: no virtualization", self.refuses_without_virtualization
        yield "refuses: Secure Boot", self.refuses_secure_boot
        yield "refuses: disk full", self.refuses_a_full_disk
        yield "refuses: no mirror", self.refuses_without_a_mirror
        yield "check: a bare host", self.checks_a_bare_host
        yield "site", lambda: self.applies("site")
        yield "doctor: 6.1", self.doctor
        yield "suite: 6.1", lambda: self.suite("6.1")
        yield "site: nothing changes", lambda: self.changes_nothing("site-again")
        yield "check: a deployed host", lambda: self.changes_nothing("check", "--check", "--diff")
        yield "site: 6.12", self.upgrades
        yield "doctor: 6.12", self.doctor
        yield "suite: 6.12", lambda: self.suite("6.12")
        yield "site: nothing changes on 6.12", lambda: self.changes_nothing("site-6.12-again", *_SERIES)
        yield "uninstall: refused while a VM runs", self.refuses_to_go
        yield "uninstall", self.uninstalls
        yield "uninstall: stock modules", self.has_stock_modules
        yield "uninstall: nothing left", self.has_nothing_of_ours

    # -- steps

    def remember(self) -> str:
        """What there is before."""
        self._inventory.write_text(json.dumps(inventory(self.host)))
        self._before = self._things()
        return ", ".join(f"{len(things)} {kind}" for kind, things in self._before.items())

    def refuses_while_a_vm_runs(self) -> str:
        with self._vm():
            return self.refused("site", "vm", r"python3 \(pid \d+\).*stop these VMs")

    def refuses_another_kernel(self) -> str:
        # The kernel says it is a 2.6 to whoever asks for that: UNAME26 of personality(2).
        wrapper = 'exec setarch x86_64 --uname-2.6 /usr/bin/python3 "$@"'
        self.host.run(f"printf '#!/bin/sh\\n%s\\n' {shlex.quote(wrapper)} > /root/old && chmod 755 /root/old")
        try:
            return self.refused("site", "kernel", "runs the kernel 2[.]6", "-e", "ansible_python_interpreter=/root/old")
        finally:
            self.host.run("rm /root/old")

    def refuses_without_virtualization(self) -> str:
        hide = "grep -v ^flags /proc/cpuinfo > /run/cpuinfo; mount --bind /run/cpuinfo /proc/cpuinfo"
        with self._while(hide, "umount /proc/cpuinfo"):
            return self.refused("site", "virtualization", "neither SVM nor VMX")

    def refuses_secure_boot(self) -> str:
        folder = "/sys/firmware/efi/efivars"
        name = "SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
        on = f"mount -t tmpfs none /sys/firmware; mkdir -p {folder}; printf '\\6\\0\\0\\0\\1' > {folder}/{name}"
        with self._while(on, "umount /sys/firmware"):
            return self.refused("site", "secure-boot", "Secure Boot is on")

    def refuses_a_full_disk(self) -> str:
        fill = "fallocate -l $(($(df --output=avail -B1M / | tail -n 1) - 200))M /full"
        with self._while(fill, "rm /full"):
            return self.refused("site", "disk", r"/ has \d+ MiB free, and \d+ are needed")

    def refuses_without_a_mirror(self) -> str:
        nowhere = 'Acquire { http::Proxy "http://127.0.0.1:9"; https::Proxy "http://127.0.0.1:9"; Retries "0"; };'
        with self._while(
            f"echo {shlex.quote(nowhere)} > /etc/apt/apt.conf.d/99nowhere", "rm /etc/apt/apt.conf.d/99nowhere"
        ):
            return self.refused("site", "mirror", "could not be installed")

    def checks_a_bare_host(self) -> str:
        output = self.play("site", "check-bare", "--check", "--diff")
        return self._expect(Recap.of(output), output)

    def applies(self, name: str, *arguments: str) -> str:
        """site.yml comes to its end."""
        output = self.play("site", name, *arguments)
        return self._expect(Recap.of(output), output)

    def changes_nothing(self, name: str, *arguments: str) -> str:
        output = self.play("site", name, *arguments)
        recap = Recap.of(output)
        said = self._expect(recap, output)
        if recap.changed:
            raise LabError(f"{recap.changed} tasks changed something: {', '.join(changed_tasks(output))}")
        return said

    def upgrades(self) -> str:
        """Another kernel, booted, for which DKMS has built the modules there."""
        said = self.applies("site-6.12", *_SERIES)
        self.host.reconnect()
        release = self.host.run("uname -r").strip()
        if not release.startswith("6.12."):
            raise LabError(f"it runs {release}")
        return f"{release}: {said}"

    def doctor(self) -> str:
        """Nothing is missing; what is noted is said."""
        said = self.host.run("kvmi-host doctor --json", check=False)
        findings = [json.loads(line) for line in said.splitlines()]
        bad = [f"{one['subject']}: {one['evidence']}" for one in findings if one["state"] in {"missing", "unknown"}]
        if bad or not findings:
            raise LabError("; ".join(bad) or f"it said nothing of use: {said!r}")
        notes = [one["subject"] for one in findings if one["state"] == "note"]
        return f"{len(findings) - len(notes)} ok, noted: {', '.join(notes) or 'nothing'}"

    def suite(self, series: str) -> str:
        """A part of the hardware suite, as a night runs it."""
        lab = self.out / "lab.toml"
        config = json.dumps(str(self.host.ssh_config))
        lab.write_text(f'[hosts.{NAME}]\naddress = "{NAME}"\nssh-config = {config}\n')
        report = self.out / f"suite-{series}"
        argv = ["-m", "kvmi_host.cli", "hwtest", "--inventory", lab, "--report", report, "-k", _SMOKE]
        with self._one_cpu():
            self._tell(f"suite-{series}", [sys.executable, *map(str, argv)])
        return tail(self.out / f"suite-{series}.log", 1)

    def refuses_to_go(self) -> str:
        with self._vm():
            return self.refused("uninstall", "uninstall-vm", r"python3 \(pid \d+\).*stop these VMs")

    def uninstalls(self) -> str:
        output = self.play("uninstall", "uninstall", *_SERIES)
        self.host.reconnect()
        return self._expect(Recap.of(output), output)

    def has_stock_modules(self) -> str:
        self.host.reconnect()
        said = self.host.run("uname -r; cat /sys/module/kvm/version; lsmod | grep -c ^kvm_", check=False).split()
        if "kvmi" in said or "1" not in said[1:]:
            raise LabError(f"it says {' '.join(said)}")
        return said[0]

    def has_nothing_of_ours(self) -> str:
        after = self._things()
        left = {
            "packages": strange(self._before["packages"], after["packages"], ()),
            "files": strange(self._before["files"], after["files"]),
            "contents": strange(self._before["contents"], after["contents"], REWRITTEN),
            "users": strange(self._before["users"], after["users"], USERS_LEFT),
        }
        (self.out / "left.json").write_text(json.dumps(left, indent=1))
        if any(left.values()):
            raise LabError("; ".join(f"{kind}: {' '.join(things[:20])}" for kind, things in left.items() if things))
        return "packages, files, contents and users are those from before, but for what Debian leaves by design"

    # -- how

    def play(self, playbook: str, name: str, *arguments: str) -> str:
        """What ansible-playbook prints; it goes to NAME.log, too."""
        ansible = program("ansible-playbook", "ansible-core")
        argv = [ansible, "-i", str(self._inventory), str(self.root / f"ansible/{playbook}.yml"), *arguments]
        return self._tell(name, argv, check=False)

    def refused(self, playbook: str, name: str, pattern: str, *arguments: str) -> str:
        """The playbook fails with one message, which says this."""
        said = refusals(self.play(playbook, f"refused-{name}", *arguments))
        if len(said) != 1 or not re.search(pattern, said[0]):
            raise LabError(f"one message with {pattern!r} was expected, and there were {len(said)}: {' | '.join(said)}")
        return said[0][:120]

    def _expect(self, recap: Recap, output: str) -> str:
        if recap.failed or recap.unreachable:
            raise LabError("; ".join(refusals(output)) or output[-1500:])
        return f"ok={recap.ok} changed={recap.changed}"

    def _tell(self, name: str, argv: Sequence[str], check: bool = True) -> str:
        env = {**os.environ, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_LOCALHOST_WARNING": "0", "PYTHONPATH": str(self.root)}
        try:
            done = subprocess.run(
                argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_PLAY_DEADLINE
            )
        except subprocess.TimeoutExpired:
            raise LabError(f"{name} did not end within {_PLAY_DEADLINE} s") from None
        output = done.stdout + done.stderr
        (self.out / f"{name}.log").write_text(output)
        if check and done.returncode:
            raise LabError(f"status {done.returncode}:\n{output[-1500:]}")
        return output

    @contextmanager
    def _while(self, before: str, after: str) -> Iterator[None]:
        self.host.run(before)
        try:
            yield
        finally:
            self.host.run(after)

    def _one_cpu(self) -> AbstractContextManager[None]:
        """Guests run on one emulated CPU: see docs/emulators.md. The others are there for DKMS."""
        online = "/sys/devices/system/cpu/cpu[1-9]*/online"
        return self._while(f"echo 0 | tee {online}", f"echo 1 | tee {online}")

    @contextmanager
    def _vm(self) -> Iterator[None]:
        begin = f"modprobe kvm_amd; setsid python3 -c {shlex.quote(HOLDER)} > /dev/null 2>&1 & echo $!"
        pid = self.host.run(begin).strip()
        try:
            yield
        finally:
            self.host.run(f"pkill -P {pid}; kill {pid} 2> /dev/null; true")

    def _things(self) -> dict[str, list[str]]:
        files = (
            "find / -xdev \\( -path /proc -o -path /sys -o -path /run -o -path /tmp -o -path /dev \\) -prune -o -print"
        )
        return {
            "packages": self.host.run("dpkg-query -W -f '${Package}\\n'").split(),
            "files": self.host.run(files).splitlines(),
            "contents": self.host.run("find /etc /boot /lib/modules/ -type f -exec sha256sum {} +").splitlines(),
            "users": self.host.run("cut -d: -f1 /etc/passwd /etc/group").split(),
        }


_SERIES = ("-e", "kvmi_kernel_series=6.12", "-e", '{"kvmi_kernel_reboot": true}')


def changed_tasks(output: str) -> list[str]:
    """The tasks that said `changed`."""
    found = []
    task = ""
    for line in output.splitlines():
        if begins := re.match(r"(?:TASK|RUNNING HANDLER) \[(.*)\]", line):
            task = begins[1]
        elif line.startswith("changed: ") and task not in found:
            found.append(task)
    return found


def inventory(host: StockHost) -> dict[str, object]:
    """Ansible's inventory of that one host."""
    # Emulated, it answers when it comes to it: see kvmi_host.host.remote.
    variables = {
        "ansible_ssh_common_args": f"-F {host.ssh_config}",
        "ansible_host": NAME,
        "ansible_user": "root",
        "ansible_timeout": 120,
        "ansible_python_interpreter": "/usr/bin/python3",
        "kvmi_kernel_reboot_timeout": 1800,
        "kvmi_host_agent_vms": [{"match": "web*", "handlers": {"log": {"events": ["cr3"]}}}],
        "kvmi_host_policies": {"web": {"allow": "observe"}},
        "kvmi_host_autoattach": ["web"],
        "kvmi_guests_list": [{"name": "web", "image": "linux", "memory": 128, "state": "present"}],
    }
    return {"kvmi_hosts": {"hosts": {NAME: variables}}}


def run(out: Path, choice: str = "", keep: bool = False) -> int:
    """Do the steps, and print the table.

    :param choice: only steps in whose names this regular expression is found.
    :return: the exit status: 1 where one of them failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    host = StockHost(keep=keep)
    began = time.monotonic()
    with host:
        rows.append(Row("boot of a stock Debian 12", time.monotonic() - began, host.run("uname -r").strip(), True))
        rollout = Rollout(host, out)
        for name, do in rollout.steps():
            if name != "inventory" and not re.search(choice, name):
                continue
            began = time.monotonic()
            try:
                with step(name):
                    result, passed = do(), True
            except LabError as error:
                result, passed = str(error), False
                say(f"{name}: FAILED: {error}")
            rows.append(Row(name, time.monotonic() - began, result, passed))
            (out / "steps.json").write_text(json.dumps([vars(row) for row in rows], indent=1))
    sys.stdout.write(table(rows))
    if keep:
        say(f"it is left running: ssh -F {host.ssh_config} {NAME}; its PID is in {host.ssh_config.parent}/qemu.json")
    return 0 if all(row.passed for row in rows) else 1


def table(rows: Sequence[Row]) -> str:
    """What came of each step, a line each."""
    width = max(len(row.name) for row in rows)
    lines = [
        f"{'ok' if row.passed else 'FAILED':6}  {row.name:{width}}  {row.seconds:7.1f} s  "
        + " ".join(row.result.split())[:160]
        for row in rows
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(run(Path("build/rollout"), os.environ.get("K", ""), bool(os.environ.get("KEEP"))))
