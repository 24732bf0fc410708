# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a rollout reads off Ansible's output and off a host."""

from __future__ import annotations

import json

import pytest

from kvmi_host.lab.errors import LabError
from kvmi_host.lab.rollout import LEFT_BEHIND, REWRITTEN, Recap, Row, changed_tasks, refusals, strange, table
from kvmi_host.lab.stock_host import link_target

REFUSED = """
TASK [kvmi_kernel : The CPU has virtualization] ****
fatal: [stock-host]: FAILED! => {"assertion": "x", "changed": false, "msg": "No \\"SVM\\" nor\\n VMX."}

PLAY RECAP *****
stock-host                 : ok=12   changed=0    unreachable=0    failed=1    skipped=2    rescued=0    ignored=0
"""


def test_the_recap_is_that_of_the_host() -> None:
    assert Recap.of(REFUSED) == Recap(ok=12, changed=0, unreachable=0, failed=1)


def test_output_without_a_recap_is_an_error_that_shows_it() -> None:
    with pytest.raises(LabError, match="no inventory"):
        Recap.of("ERROR! no inventory")


def test_a_refusal_is_its_message_in_one_line() -> None:
    assert refusals(REFUSED) == ['No "SVM" nor VMX.']


def test_a_failure_that_is_ignored_is_counted_too() -> None:
    assert len(refusals(REFUSED + REFUSED)) == 2


def test_tasks_that_changed_something_are_named_once() -> None:
    output = "TASK [a] ***\nchanged: [h] => (item=1)\nchanged: [h] => (item=2)\nTASK [b] ***\nok: [h]\n"
    output += "RUNNING HANDLER [c] ***\nchanged: [h]\n"
    assert changed_tasks(output) == ["a", "c"]


def test_a_file_that_came_or_went_is_told() -> None:
    assert strange(["/a", "/b"], ["/b", "/c"], ()) == ["+/c", "-/a"]


@pytest.mark.parametrize(
    "path",
    ["/var/log/dpkg.log", "/var/lib/dpkg/info/dkms.list", "/root/.ansible/tmp", "/var/cache/apparmor/6b0d.0/ping"],
)
def test_what_debian_leaves_by_design_is_not_told(path: str) -> None:
    assert strange([], [path]) == []


@pytest.mark.parametrize(
    "path",
    [
        "/etc/kvmi-host",
        "/etc/modprobe.d/kvmi-host.conf",
        "/etc/systemd/system/kvmi-agent.service",
        "/opt/kvmi-host",
        "/usr/local/share/man/man1/kvmi-host.1",
        "/usr/src/kvmi-0.1.0",
        "/var/lib/dkms/kvmi",
        "/var/lib/systemd/kvmi",
        "/usr/lib/python3/__pycache__/kvmi_host.pyc",
        "/var/lib/kvmi-deploy/packages",
        "/lib/modules/6.1.0-56-cloud-amd64/updates/dkms/kvm.ko",
        "/etc/libvirt/hooks/qemu.d/kvmi-host",
    ],
)
def test_nothing_of_ours_passes_for_debians(path: str) -> None:
    assert strange([], [path]) == [f"+{path}"]


@pytest.mark.parametrize(("path", "told"), [("/etc/group-", False), ("/etc/modules", True), ("/etc/groups", True)])
def test_a_file_with_other_contents_is_told_unless_the_system_writes_it(path: str, told: bool) -> None:
    line = f"{64 * 'a'}  {path}"
    assert strange([], [line], REWRITTEN) == ([f"+{line}"] if told else [])


def test_everything_that_is_left_has_a_reason() -> None:
    assert all(LEFT_BEHIND.values())
    assert all(REWRITTEN.values())


def test_the_kernel_is_what_debians_link_names() -> None:
    said = 'Inode: 12   Type: symlink\nFast link dest: "boot/vmlinuz-6.1.0-56-cloud-amd64"\n'
    assert link_target(said) == "boot/vmlinuz-6.1.0-56-cloud-amd64"


def test_a_file_is_no_link() -> None:
    assert link_target("Inode: 12   Type: regular\n") is None


def test_the_table_has_each_step_in_a_line() -> None:
    rows = [Row("site", 61.0, "ok=3\nchanged=1", True), Row("doctor", 2.5, "KVM: none", False)]
    assert table(rows).splitlines() == [
        "ok      site       61.0 s  ok=3 changed=1",
        "FAILED  doctor      2.5 s  KVM: none",
    ]
    assert json.loads(json.dumps([vars(row) for row in rows]))[1]["passed"] is False
