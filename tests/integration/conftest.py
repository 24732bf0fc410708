# SPDX-License-Identifier: LGPL-2.1-or-later
"""The agent as a process of its own, as a service runs it."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

STARTS_WITHIN = 30.0  # seconds
SAYS_WITHIN = 20.0

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
