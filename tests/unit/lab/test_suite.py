# SPDX-License-Identifier: LGPL-2.1-or-later
"""What of a kernel's log fails a run, and what does not; how the suite is run on a host, and what comes back."""

import subprocess
from pathlib import Path

import pytest

from kvmi_host.host.kernels import Series
from kvmi_host.lab import suite
from kvmi_host.lab.suite import trouble


@pytest.mark.parametrize(
    "line",
    [
        "WARNING: CPU: 0 PID: 12 at arch/x86/kvm/x86.c:100 kvm_arch_vcpu_ioctl_run+0x1/0x2 [kvm]",
        "BUG: unable to handle page fault for address: ffffc90000000000",
        "BUG: KASAN: use-after-free in kvmi_recv+0x1/0x2 [kvm]",
        "Oops: 0002 [#1] PREEMPT SMP NOPTI",
        "watchdog: BUG: soft lockup - CPU#1 stuck for 26s! [kvmi:200]",
        "rcu: INFO: rcu_preempt self-detected stall on CPU",
        "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
        "general protection fault, probably for non-canonical address 0xdead: 0000 [#1]",
        "INFO: task kvmi:200 blocked for more than 120 seconds.",
        "WARNING: possible circular locking dependency detected",
        "WARNING: possible recursive locking detected",
        "WARNING: suspicious RCU usage",
        "WARNING: inconsistent lock state",
        "INFO: trying to register non-static key.",
        "BUG: sleeping function called from invalid context at kernel/locking/mutex.c:580",
        "BUG: using smp_processor_id() in preemptible [00000000] code: kvmi-812/830",
        "BUG kmalloc-256 (Tainted: G           O     ): Poison overwritten",
        "ODEBUG: free active (active state 0) object type: work_struct hint: kvmi_work+0x0/0x10 [kvm]",
        "UBSAN: shift-out-of-bounds in arch/x86/kvm/kvmi.c:300:12",
        "unreferenced object 0xffff888012345678 (size 512):",
        "kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)",
        "kmemleak: Kernel memory leak detector disabled",
        "Kernel panic - not syncing: Fatal exception",
    ],
)
def test_complaint_fails_the_run(line: str) -> None:
    assert line in trouble(f"[    1.0] before\n[    2.0] {line}\n[    2.1] Call Trace:\n")


@pytest.mark.parametrize(
    "line",
    [
        "kvm [818]: vcpu0, guest rIP: 0xffffffff81073744 Unhandled WRMSR(0xc0010007) = 0xffff",
        "kvm: loading out-of-tree module taints kernel.",
        "kvmi: 00000000-0000-0000-0000-000000000000: session ends: message id 22349, size 19276: -32",
        "hrtimer: interrupt took 133712050 ns",
        "acpi PNP0A03:00: fail to add MMCONFIG information, can't access extended PCI configuration space",
    ],
)
def test_everyday_line_does_not(line: str) -> None:
    assert trouble(line) == ""


def test_what_follows_the_complaint_is_shown() -> None:
    log = "\n".join(["boot", "WARNING: CPU: 0", *(f"frame {number}" for number in range(40))])
    assert trouble(log, context=3) == "boot\nWARNING: CPU: 0\nframe 0\nframe 1"


class FakeBox:
    """A box in which pytest leaves these reports."""

    name = "lab7"
    series = Series.V6_1

    def __init__(self, folder: Path, reports: dict[str, str]) -> None:
        self.console_log = folder / "console"
        self.console_log.write_text("booted\n")
        self._reports = reports
        self.ran: list[str] = []

    def deploy(self) -> bool:
        return True

    def run(self, argv: str | list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if argv[0] == "cat":
            (output,) = (text for name, text in self._reports.items() if argv[1].endswith(name))
            return subprocess.CompletedProcess(argv, 0, output)
        if "pytest" in argv:
            self.ran = list(argv)
        return subprocess.CompletedProcess(argv, 0, "")


def test_the_reports_of_a_box_come_along(tmp_path: Path) -> None:
    box = FakeBox(tmp_path, {"junit.xml": "<testsuites/>", "suite.json": "{}"})
    reports = tmp_path / "reports"
    assert suite.run(suite.in_box(box), reports) == 0  # type: ignore[arg-type]
    assert (reports / "junit.xml").read_text() == "<testsuites/>"
    assert (reports / "suite.json").read_text() == "{}"
    assert (reports / "console.log").read_text() == "booted\n"


def test_a_host_runs_the_package_by_the_hosts_name(tmp_path: Path) -> None:
    box = FakeBox(tmp_path, {"junit.xml": "<testsuites/>", "suite.json": "{}"})
    suite.run(suite.in_box(box), tmp_path / "reports", "breakpoint", ["--seed=3"])  # type: ignore[arg-type]
    assert "KVMI_HOST_NAME=lab7" in box.ran
    assert box.ran[box.ran.index("--pyargs") + 1] == "kvmi_host.hwtest"
    assert box.ran[-3:] == ["-k", "breakpoint", "--seed=3"]
