# SPDX-License-Identifier: LGPL-2.1-or-later
"""What tests share: the agent as a process of its own, as a service runs it; a libvirt and guests without KVM."""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

STARTS_WITHIN = 30.0  # seconds
SAYS_WITHIN = 20.0
LIBVIRTD_STARTS_WITHIN = 60.0
USER = os.getuid() or 65534  # nobody

Line = dict[str, Any]


class AgentProcess:
    """``kvmi-host agent`` with a configuration, and what it logs.

    :ivar socket: where VMs announce themselves.
    :ivar metrics: the address and port of its metrics.
    """

    def __init__(self, directory: Path, config: str, environment: dict[str, str]) -> None:
        self.config = directory / "agent.toml"
        self.socket = directory / "run/agent.sock"
        self.configure(config)
        self.socket.parent.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvmi_host.cli", "agent", "--config", self.config],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.lines: list[str] = []
        self._logged: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        try:
            self.metrics: str = self.says("ready", STARTS_WITHIN)["metrics"]
        except BaseException:
            self.close()
            raise

    def configure(self, handlers: str) -> None:
        """Write the configuration, with these handlers."""
        self.config.write_text(f'listen.socket = "{self.socket}"\nmetrics.address = "127.0.0.1:0"\n{handlers}')

    def says(self, message: str, within: float = SAYS_WITHIN, **fields: object) -> Line:
        """Wait for the next line of the log with this message and these fields; those before it are passed over.

        :raise TimeoutError: it is not logged.
        """
        deadline = monotonic() + within
        while True:
            try:
                line = self._logged.get(timeout=max(0.0, deadline - monotonic()))
            except queue.Empty:
                line = None
            if line is None:
                raise TimeoutError(f"the agent did not log {message!r} {fields}, but:\n{''.join(self.lines)}")
            if message in line["message"] and fields.items() <= line.items():
                return line

    def stop(self, number: int) -> int:
        """Send a signal, and wait for the end; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(20)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self.process.stderr
        with self.process.stderr as stream:
            for line in stream:
                self.lines.append(line)
                if line.startswith("{"):
                    self._logged.put(json.loads(line))
        self._logged.put(None)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Callable[..., AgentProcess]]:
    """Starts an agent with these handlers: TOML tables of ``[[vms]]``."""
    with ExitStack() as stack:

        def start(handlers: str, **environment: str) -> AgentProcess:
            process = AgentProcess(tmp_path, handlers, environment)
            stack.callback(process.close)
            return process

        yield start


@pytest.fixture(scope="session")
def public_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a new SSH key."""
    path = tmp_path_factory.mktemp("key") / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True, timeout=60)
    return path.with_suffix(".pub")


@pytest.fixture(scope="module")
def libvirt_home() -> Iterator[Path]:
    """The home of the user who runs libvirtd, with a path that a socket's address has room for."""
    with tempfile.TemporaryDirectory(prefix="kvmi-libvirt-", dir="/var/tmp") as name:
        os.chown(name, USER, -1)
        yield Path(name)


@pytest.fixture(scope="module")
def libvirt_uri(libvirt_home: Path) -> Iterator[str]:
    """A libvirt with folders of its own and nothing in it. As root it would be the system's: so it is nobody's then."""
    libvirtd = shutil.which("libvirtd", path="/usr/sbin")
    assert libvirtd, "apt-get install libvirt-daemon libvirt-daemon-driver-qemu"
    home = str(libvirt_home)
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": home, "XDG_RUNTIME_DIR": home}
    socket = libvirt_home / "libvirt/libvirt-sock"
    with subprocess.Popen([libvirtd], user=USER, extra_groups=[], cwd=home, env=environment) as daemon:
        try:
            deadline = monotonic() + LIBVIRTD_STARTS_WITHIN
            while not socket.exists():
                assert monotonic() < deadline
                assert daemon.poll() is None
                sleep(0.1)  # the deadline decides, not this
            yield f"qemu+unix:///session?socket={socket}"
        finally:
            daemon.terminate()


@pytest.fixture(scope="session")
def without_kvm() -> Callable[[str], str]:
    """Turns the XML of a guest into that of one whose CPU is emulated."""

    def change(xml: str) -> str:
        return re.sub(r"<cpu [^>]*/>", "<cpu mode='maximum'/>", xml.replace('type="kvm"', 'type="qemu"', 1))

    return change


@pytest.fixture(scope="session")
def wait_serial() -> Callable[[Path, str, float], str]:
    """Waits until a guest's serial log has a text, with a deadline in seconds; what is in it then."""

    def wait(log: Path, text: str, within: float) -> str:
        deadline = monotonic() + within
        while text not in (written := log.read_text(errors="replace") if log.exists() else ""):
            assert monotonic() < deadline, f"no {text!r} in time, but:\n{written[-2000:]}"
            sleep(0.1)  # the deadline decides, not this
        return written

    return wait
