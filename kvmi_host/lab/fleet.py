# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hardware suite on many hosts at once: a night.

Whatever becomes of a host, the others go on; what became of it is a state and a sentence (:mod:`kvmi_host.lab.night`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from kvmi_host import __version__
from kvmi_host.host.kernels import Series
from kvmi_host.host.remote import connect
from kvmi_host.host.vendor import Vendor
from kvmi_host.lab import cache, suite
from kvmi_host.lab.bochs import BochsHost
from kvmi_host.lab.box import SSH_NAME, Box
from kvmi_host.lab.errors import LabError
from kvmi_host.lab.inventory import LabHost
from kvmi_host.lab.night import FILE, HostRun, Night, State
from kvmi_host.lab.parcel import Parcel, Python, make_parcel
from kvmi_host.lab.part import Part
from kvmi_host.lab.paths import project_root
from kvmi_host.lab.progress import told_to
from kvmi_host.lab.ssh_run import Plan, outcome, run_over_ssh
from kvmi_host.lab.supervision import Ended, Host, Patience, Places

FORKS = 4
"""Hosts at once, unless it is said otherwise."""

_BOX_KIB = 3 << 20  # its memory, and what QEMU needs beside


def run_fleet(
    hosts: Sequence[LabHost],
    folder: Path,
    arguments: Sequence[str] = (),
    *,
    forks: int = FORKS,
    stop: threading.Event | None = None,
    watch: Callable[[Part], None] = lambda part: None,
    patience: Patience = Patience(),  # noqa: B008  # it cannot be changed
    places: Places = Places(),  # noqa: B008
    parcel: Callable[[Python], Parcel] = make_parcel,
) -> Night:
    """Run the suite on hosts, and write ``night.json`` and ``hosts/NAME/`` in a folder.

    :param hosts: each of another name.
    :param arguments: more of them for pytest.
    :param forks: how many hosts at once; boxes as many as there are CPUs and memory for.
    :param stop: when it is set, every suite is ended, and what there is is collected.
    :param watch: called with a host's part when there is something new about it, on any thread.
    """
    began = _now()
    plan = Plan(arguments, parcel, stop or threading.Event())
    parts = [Part(host, folder / "hosts" / host.name, watch) for host in hosts]
    lock = threading.Lock()

    def written() -> Night:
        """The night as far as it is over. Written after each host: whatever ends this program, that much is known."""
        runs = tuple(part.result or _not_begun(part.host) for part in parts)
        night = Night(began, _now(), __version__, revision(), runs)
        unfinished = folder / f".{FILE}"
        unfinished.write_text(night.to_json())
        unfinished.rename(folder / FILE)
        return night

    def run(part: Part) -> None:
        if plan.stop.is_set():
            part.result = _not_begun(part.host)
            return
        part.begin()
        with told_to(part.tell):
            try:
                part.end(State.FINISHED, _on(part, plan, patience, places))
            except Ended as ended:
                part.end(ended.state, ended.reason)
            except Exception as error:  # a fault of ours is this host's alone
                part.output(traceback.format_exc().encode())
                part.dirty = part.host.kind == "ssh"
                part.end(State.INTERRUPTED, f"kvmi-host failed: {error!r}: the end of pytest.log says where; report it")
        with lock:
            written()

    folder.mkdir(parents=True, exist_ok=True)
    written()
    with ThreadPoolExecutor(forks) as by_ssh, ThreadPoolExecutor(min(forks, _boxes_at_once())) as boxes:
        wait([(boxes if part.host.kind == "box" else by_ssh).submit(run, part) for part in parts])
    return written()


def revision() -> str:
    """What git says of this tree; empty where it says nothing."""
    argv = ["git", "-C", str(project_root()), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _not_begun(host: LabHost) -> HostRun:
    return HostRun(host.name, State.INTERRUPTED, "the night ended before this host's part did", dict(host.tags))


def _boxes_at_once() -> int:
    """How many boxes there are CPUs and memory for; one in any case."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return max(1, min(os.cpu_count() or 1, int(found[1]) // _BOX_KIB if found else 1))


def _on(part: Part, plan: Plan, patience: Patience, places: Places) -> str:
    """Do a host's part: see :func:`kvmi_host.lab.ssh_run.run_over_ssh`."""
    if part.host.kind == "ssh":
        reach = partial(connect, part.host.address, part.host.ssh_config, patience.connecting)
        return _with(Host(reach, lambda: True, plan.stop, patience, places), part, plan)
    with ExitStack() as claim:
        try:
            claim.enter_context(cache.claimed(box_name(part.host)))  # two nights of one machine would share it
        except LabError as error:
            raise Ended(State.UNREACHABLE, str(error)) from error
        if part.host.cpu is Vendor.INTEL:
            return _in_bochs(part, plan, patience)
        return _in_box(part, plan, patience, places)


def _with(host: Host, part: Part, plan: Plan) -> str:
    try:
        return run_over_ssh(part, host, plan)
    finally:
        host.close()


def box_name(host: LabHost) -> str:
    """What a box is called while it is a host of a night."""
    return "night-" + host.name.replace(".", "-")


def _in_box(part: Part, plan: Plan, patience: Patience, places: Places) -> str:
    """A box is a host like any other, once it is up. It keeps nothing, so it is never left dirty."""
    box = Box(box_name(part.host), part.host.kernel or Series.V6_1)
    with part.at("boot"):
        try:
            box.up()
        except LabError as error:
            raise Ended(State.UNREACHABLE, f"the box did not come up: {error}") from error
    reach = partial(connect, SSH_NAME, box.ssh_config, patience.connecting)
    try:
        return _with(Host(reach, box.is_up, plan.stop, patience, places), part, plan)
    finally:
        part.dirty = False
        if box.console_log.exists():
            shutil.copy(box.console_log, part.folder / "console.log")
        part.warnings = part.warnings or _on_console(part)
        box.down()


def _in_bochs(part: Part, plan: Plan, patience: Patience) -> str:
    """The Intel host boots, runs the suite, and is gone; nothing connects to it."""
    until = time.monotonic() + part.host.deadline

    def take(piece: str) -> None:
        part.output(piece.encode())
        if plan.stop.is_set():
            raise Ended(State.INTERRUPTED, "the night was ended from here while the suite was at work")
        if time.monotonic() > until:
            raise Ended(State.HUNG, "the suite did not end by the host's deadline: raise it, or see which test hangs")

    host = BochsHost(box_name(part.host), part.host.kernel or Series.V6_1, silence=patience.progress)
    with part.at("suite"):
        try:
            part.status = suite.in_bochs(host, take)(["--color=no", *plan.arguments], part.folder)
        except LabError as error:
            if plan.stop.is_set():  # a terminal's Ctrl-C ends Bochs, too
                raise Ended(State.INTERRUPTED, "the night was ended from here") from error
            if not part.tally.total:
                raise Ended(State.UNREACHABLE, f"it did not come to its first test: {error}") from error
            raise Ended(State.HUNG if "serial lines" in str(error) else State.DIED, str(error)) from error
        finally:
            dmesg = part.folder / "dmesg.log"
            if dmesg.exists():
                dmesg.write_text(suite.since(dmesg.read_text(errors="replace"), suite.BEGIN))
            part.warnings = _on_console(part)
    return outcome(part)


def _on_console(part: Part) -> list[str]:
    """The complaints on a box's console."""
    console = part.folder / "console.log"
    log = console.read_text(errors="replace") if console.exists() else ""
    return list(suite.complaints(suite.since(log, suite.BEGIN)))
