# SPDX-License-Identifier: LGPL-2.1-or-later
"""The agent as a process, with VMs that announce themselves as QEMU does; the kernel is simulated."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import kvmi_host
from kvmi_host.protocol import Action, EventId, HandshakeError
from kvmi_host.testing.announced import announced
from kvmi_host.testing.peer import SimulatedKernel, next_reply

StartAgent = Callable[..., Any]

HYPERCALLS = '[[vms]]\nmatch = "*"\nhandlers.log.events = ["hypercall"]\n'
CONTROL_REGISTERS = '[[vms]]\nmatch = "*"\nhandlers.log.events = ["cr3"]\n'
NOBODY = 65534
VM = UUID("00112233-4455-6677-8899-aabbccddeeff")


def metric(agent: Any, name: str) -> float:
    """A sample by its name, with its labels as the agent writes them."""
    with urllib.request.urlopen(f"http://{agent.metrics}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    (value,) = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(value)


def hypercall(kernel: SimulatedKernel, vcpu: int = 0) -> int:
    """The action that the event of a hypercall is answered with."""
    reply = next_reply(kernel.fire(EventId.HYPERCALL, vcpu), 20)
    assert reply
    return reply.action


def install(folder: Path, points: dict[str, str], **modules: str) -> str:
    """Make a distribution with these entry points and modules; the PYTHONPATH that has it."""
    info = folder / "site/handlers-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: handlers\nVersion: 1.0\n")
    lines = [f"{name} = {place}\n" for name, place in points.items()]
    (info / "entry_points.txt").write_text("".join(["[kvmi_host.handlers]\n", *lines]))
    for name, source in modules.items():
        (folder / f"site/{name}.py").write_text(source)
    return f"{folder}/site:{Path(kvmi_host.__file__).parents[1]}"


# -- a VM's life


def test_the_events_of_a_vm_are_handled(agent: StartAgent) -> None:
    process = agent(HYPERCALLS)
    with announced(process.socket, "webserver", VM) as kernel:
        kernel.await_enabled(EventId.HYPERCALL)
        assert hypercall(kernel) == Action.CONTINUE
        process.says("attached", vm="webserver", uuid=str(VM), handlers=["log"])
        process.says("event", vm="webserver", event="hypercall", seq=1, mode=8)


def test_who_has_another_secret_finds_out(agent: StartAgent, tmp_path: Path) -> None:
    (tmp_path / "cookie").write_text("secret")
    process = agent(f'listen.cookie_file = "{tmp_path}/cookie"\n{HYPERCALLS}')
    with announced(process.socket, cookie=b"secret") as kernel:
        kernel.await_enabled(EventId.HYPERCALL)
    with pytest.raises(HandshakeError, match="wrong cookie"), announced(process.socket, cookie=b"other"):
        pass


def test_a_vm_that_reconnects_replaces_its_old_session(agent: StartAgent) -> None:
    process = agent(HYPERCALLS)
    with announced(process.socket, "webserver", VM) as old:
        old.await_enabled(EventId.HYPERCALL)
        with announced(process.socket, "webserver", VM) as new:
            assert not old.enabled(EventId.HYPERCALL)  # undone, before the new one was answered
            assert old.wait_ended() == "the introspector closed"
            new.await_enabled(EventId.HYPERCALL)
            assert hypercall(new) == Action.CONTINUE


def test_peers_that_say_nothing_or_nonsense_hold_up_nobody(agent: StartAgent) -> None:
    process = agent(HYPERCALLS)
    with ExitStack() as stack:
        for said in [b"", b"\x60", b"\xff" * 1000] * 100:
            peer = stack.enter_context(socket.socket(socket.AF_UNIX))
            peer.connect(os.fspath(process.socket))
            peer.sendall(said)
        kernel = stack.enter_context(announced(process.socket))
        kernel.await_enabled(EventId.HYPERCALL)
        assert hypercall(kernel) == Action.CONTINUE
        assert metric(process, 'kvmi_errors_total{type="handshake"}') >= 100


def test_unhook_is_cleaned_up_after_and_the_agent_goes_on(agent: StartAgent) -> None:
    process = agent(HYPERCALLS)
    with announced(process.socket, vcpus=2) as kernel:
        kernel.await_enabled(EventId.HYPERCALL, 1)
        kernel.fire(EventId.UNHOOK)
        assert kernel.wait_ended() == "the introspector closed"
        assert not any(kernel.enabled(EventId.HYPERCALL, vcpu) for vcpu in (0, 1))
    with announced(process.socket) as kernel:
        kernel.await_enabled(EventId.HYPERCALL)


def test_a_handler_that_raises_is_reported_and_the_guest_goes_on(agent: StartAgent, tmp_path: Path) -> None:
    source = (
        "from kvmi_host.introspect import HYPERCALL\n"
        "def plugin(options):\n"
        "    async def handle(event):\n"
        "        raise LookupError(options['why'])\n"
        "    return lambda vm: vm.on(HYPERCALL)(handle)\n"
    )
    path = install(tmp_path, {"buggy": "buggy:plugin"}, buggy=source)
    process = agent('[[vms]]\nmatch = "*"\nhandlers.buggy.why = "a bug"\n', PYTHONPATH=path)
    with announced(process.socket) as kernel:
        kernel.await_enabled(EventId.HYPERCALL)
        assert [hypercall(kernel) for _ in range(3)] == [Action.CONTINUE] * 3
        line = process.says("raised", level="error", vm="webserver")
        assert "LookupError: a bug" in line["exception"]
        assert metric(process, 'kvmi_handler_errors_total{vm="webserver"}') == 3


# -- the agent's life


def test_sighup_changes_the_handlers_of_vms_that_stay_attached(agent: StartAgent) -> None:
    process = agent(HYPERCALLS)
    with announced(process.socket) as kernel:
        kernel.await_enabled(EventId.HYPERCALL)
        process.configure(CONTROL_REGISTERS)
        process.process.send_signal(signal.SIGHUP)
        kernel.await_enabled(EventId.CR)
        assert not kernel.enabled(EventId.HYPERCALL)
        assert hypercall(kernel) == Action.CONTINUE
        assert metric(process, "kvmi_sessions_begun_total") == 1


def test_a_configuration_that_cannot_be_used_changes_nothing(agent: StartAgent) -> None:
    process = agent(HYPERCALLS)
    with announced(process.socket) as kernel:
        kernel.await_enabled(EventId.HYPERCALL)
        process.configure(CONTROL_REGISTERS + "colour = 5")
        process.process.send_signal(signal.SIGHUP)
        process.says("vms[0].colour: there is no such key", level="error")
        assert hypercall(kernel) == Action.CONTINUE
        process.says("event", event="hypercall")
        assert metric(process, 'kvmi_errors_total{type="config"}') == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_when_every_vm_is_as_it_was(agent: StartAgent, number: int) -> None:
    process = agent(HYPERCALLS)
    with ExitStack() as stack:
        kernels = [stack.enter_context(announced(process.socket)) for _ in range(8)]
        for kernel in kernels:
            kernel.await_enabled(EventId.HYPERCALL)
        assert process.stop(number) == 0
        for kernel in kernels:
            assert kernel.wait_ended() == "the introspector closed"
            assert not kernel.enabled(EventId.HYPERCALL)
    assert not process.socket.exists()


def test_after_a_kill_no_guest_waits_and_the_next_agent_takes_its_place(agent: StartAgent) -> None:
    process = agent(HYPERCALLS)
    with announced(process.socket) as kernel:
        kernel.await_enabled(EventId.HYPERCALL)
        process.process.send_signal(signal.SIGSTOP)
        replies = kernel.fire(EventId.HYPERCALL)
        assert process.stop(signal.SIGKILL) == -signal.SIGKILL
        assert next_reply(replies) is None  # the kernel saw the socket closed
    restarted = agent(HYPERCALLS)
    with announced(restarted.socket) as kernel:
        kernel.await_enabled(EventId.HYPERCALL)


def test_systemd_is_told_what_happens(agent: StartAgent, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(os.fspath(tmp_path / "notify"))
        supervisor.settimeout(20)

        def until(wanted: str) -> list[str]:
            told: list[str] = []
            while wanted not in told:
                told += supervisor.recv(1000).decode().splitlines()
            return told

        process = agent(HYPERCALLS, NOTIFY_SOCKET=os.fspath(tmp_path / "notify"), WATCHDOG_USEC="200000")
        until("READY=1")
        until("WATCHDOG=1")
        with announced(process.socket):
            until("STATUS=VMs attached: 1")
        process.process.send_signal(signal.SIGHUP)
        assert any(line.startswith("MONOTONIC_USEC=") for line in until("READY=1"))
        process.process.send_signal(signal.SIGTERM)
        until("STOPPING=1")


def test_a_socket_unit_can_hold_the_socket(tmp_path: Path) -> None:
    config, path = tmp_path / "agent.toml", tmp_path / "agent.sock"
    config.write_text(HYPERCALLS)
    command = ["systemd-socket-activate", "--listen", path, sys.executable, "-m", "kvmi_host.cli", "agent"]
    with subprocess.Popen([*command, "--config", config], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            assert "Listening on" in process.stderr.readline()
            with announced(path, timeout=30) as kernel:
                kernel.await_enabled(EventId.HYPERCALL, timeout=20)
        finally:
            process.terminate()
            process.communicate(timeout=20)
    assert process.returncode == 0


def test_the_configuration_can_be_checked_alone(tmp_path: Path) -> None:
    config = tmp_path / "agent.toml"
    config.write_text('log.level = "loud"')
    command = [sys.executable, "-m", "kvmi_host.cli", "agent", "--check", "--config", config]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1
    assert f"kvmi-host: {config}: log.level = 'loud': one of debug, info, warning, error" in run.stderr


def test_the_configuration_and_the_handler_of_the_documentation_work(agent: StartAgent, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/agent.md").read_text()
    config, entry_points = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (plugin,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (_, points), *_ = tomllib.loads(entry_points)["project"]["entry-points"].items()
    path = install(tmp_path, points, spaces=plugin)
    process = agent(config[config.index("[[vms]]") :], PYTHONPATH=path)
    with announced(process.socket, "webserver") as kernel:
        kernel.memory[0x2000:0x2008] = bytes(range(8))
        kernel.await_enabled(EventId.CR)
        own = struct.pack("<H6xQQ", 3, 0x1000, 0x2000)
        for _ in range(2):
            assert next_reply(kernel.fire(EventId.CR, own=own), 20)
        process.says("address space", vm="webserver", root="0x2000", first_entry="0001020304050607")
        assert sum('"address space"' in line for line in process.lines) == 1


# -- without root


@pytest.fixture
def readable() -> Iterator[Path]:
    """A folder that every user can read, with our packages in it."""
    with tempfile.TemporaryDirectory(prefix="kvmi-host-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        ignore = shutil.ignore_patterns("__pycache__", "mypy*", "ruff*", "hypothesis", "pip", "setuptools", "*.pth")
        shutil.copytree(sysconfig.get_path("purelib"), folder / "packages", ignore=ignore)
        shutil.copytree(Path(kvmi_host.__file__).parent, folder / "packages/kvmi_host", ignore=ignore)
        subprocess.run(["chmod", "-R", "a+rX", folder / "packages"], check=True)
        yield folder


def test_it_runs_without_root(readable: Path) -> None:
    config = readable / "agent.toml"
    run = readable / "run"
    run.mkdir()
    config.write_text(f'listen.socket = "{run}/agent.sock"\n{HYPERCALLS}')
    user = NOBODY if os.geteuid() == 0 else os.geteuid()
    os.chown(run, user, -1)
    process = subprocess.Popen(
        [sys._base_executable, "-s", "-m", "kvmi_host.cli", "agent", "--config", config],
        stderr=subprocess.PIPE,
        text=True,
        user=user if os.geteuid() == 0 else None,
        extra_groups=[] if os.geteuid() == 0 else None,
        cwd="/",
        env={"PYTHONPATH": f"{readable}/packages", "LC_ALL": "C.UTF-8"},
    )
    with process:
        try:
            assert process.stderr
            assert '"ready"' in process.stderr.readline()
            status = Path(f"/proc/{process.pid}/status").read_text()
            assert f"\nUid:\t{user}\t{user}\t" in status
            assert "\nCapEff:\t0000000000000000\n" in status
            with announced(run / "agent.sock") as kernel:  # as root, who attaches
                kernel.await_enabled(EventId.HYPERCALL)
                assert hypercall(kernel) == Action.CONTINUE
        finally:
            process.terminate()
            process.communicate(timeout=20)
    assert process.returncode == 0


# -- many


def test_64_vms_are_served_side_by_side(agent: StartAgent) -> None:
    events = 40
    process = agent(HYPERCALLS)
    with ExitStack() as stack:
        kernels = [stack.enter_context(announced(process.socket, f"vm{number}", vcpus=2)) for number in range(64)]
        for kernel in kernels:
            kernel.await_enabled(EventId.HYPERCALL, 1)
        for _ in range(events // 2):
            replies = [kernel.fire(EventId.HYPERCALL, vcpu) for kernel in kernels for vcpu in (0, 1)]
            assert all(next_reply(reply, 20) for reply in replies)
        assert metric(process, "kvmi_sessions") == 64
        counts = [metric(process, f'kvmi_events_total{{kind="hypercall",vm="vm{number}"}}') for number in (0, 31, 63)]
        assert counts == [events] * 3
        assert metric(process, "kvmi_event_seconds_count") >= 64


def test_an_idle_session_takes_less_than_64_kib(agent: StartAgent) -> None:
    process = agent(HYPERCALLS)

    def resident() -> int:
        return int(metric(process, "process_resident_memory_bytes"))

    with ExitStack() as stack:

        def come(count: int) -> None:
            for _ in range(count):
                stack.enter_context(announced(process.socket)).await_enabled(EventId.HYPERCALL)

        come(8)  # what the first ones need once
        before = resident()
        come(128)
        assert (resident() - before) / 128 < 65536
