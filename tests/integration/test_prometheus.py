# SPDX-License-Identifier: LGPL-2.1-or-later
"""Debian's Prometheus scrapes the agent.

It is unpacked into the cache, not installed: its package would start a server on this machine.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from kvmi_host.lab import cache
from kvmi_host.protocol import EventId
from kvmi_host.testing.announced import announced
from kvmi_host.testing.peer import next_reply

READY_WITHIN = 60.0  # seconds
SCRAPED_WITHIN = 60.0


@pytest.fixture(scope="session")
def prometheus() -> Path:
    """The folder of ``prometheus`` and ``promtool``."""

    def unpack(folder: Path) -> None:
        apt = subprocess.run(["apt-get", "download", "prometheus"], cwd=folder, capture_output=True, text=True)
        assert apt.returncode == 0, f"apt-get download prometheus: {apt.stderr} (apt-get update may help)"
        (package,) = folder.glob("prometheus_*.deb")
        subprocess.run(["dpkg-deb", "--extract", package, folder / "root"], check=True)
        for program in ("prometheus", "promtool"):
            shutil.move(folder / "root/usr/bin" / program, folder / program)
        shutil.rmtree(folder / "root")
        package.unlink()

    about = subprocess.run(
        ["apt-cache", "show", "--no-all-versions", "prometheus"], capture_output=True, text=True, check=True
    )
    return cache.entry("prometheus", cache.digest(about.stdout), unpack)


@contextmanager
def running(programs: Path, directory: Path, target: str) -> Iterator[Callable[[str], dict[str, float]]]:
    """Prometheus, which scrapes `target` every second. What it yields asks a query: values by their labels."""
    config = directory / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: kvmi, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    process = subprocess.Popen(
        [
            programs / "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={directory}/tsdb",
            f"--web.listen-address={address}",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    log: list[str] = []
    ready = threading.Event()

    def read() -> None:
        for line in process.stderr or ():
            log.append(line)
            if "Server is ready to receive web requests" in line:
                ready.set()

    reader = threading.Thread(target=read)
    reader.start()

    def query(expression: str) -> dict[str, float]:
        parameters = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"http://{address}/api/v1/query?{parameters}", timeout=20) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return {
            ",".join(f"{name}={value}" for name, value in sorted(sample["metric"].items())): float(sample["value"][1])
            for sample in result
        }

    try:
        assert ready.wait(READY_WITHIN), "".join(log)
        yield query
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stderr.close()


def once(query: Callable[[], dict[str, float]], expected: dict[str, float]) -> None:
    """Wait until a query gives that: Prometheus has no way to tell that it has scraped."""
    deadline = monotonic() + SCRAPED_WITHIN
    while (found := query()) != expected:
        assert monotonic() < deadline, f"{found}, and not {expected}"
        sleep(0.1)


def test_prometheus_scrapes_what_the_agent_counts(agent: Callable[..., Any], prometheus: Path, tmp_path: Path) -> None:
    process = agent('[[vms]]\nmatch = "*"\nhandlers.log.events = ["hypercall", "xsetbv"]\n')
    with ExitStack() as stack:
        kernels = {name: stack.enter_context(announced(process.socket, name)) for name in ("web", "db")}
        for kernel in kernels.values():
            kernel.await_enabled(EventId.XSETBV)
        for name, kind, count in (("web", EventId.HYPERCALL, 7), ("web", EventId.XSETBV, 2), ("db", EventId.XSETBV, 5)):
            for _ in range(count):
                assert next_reply(kernels[name].fire(kind))
        query = stack.enter_context(running(prometheus, tmp_path, process.metrics))
        once(
            lambda: query("sum by (vm, kind) (kvmi_events_total)"),
            {"kind=hypercall,vm=web": 7, "kind=xsetbv,vm=web": 2, "kind=xsetbv,vm=db": 5},
        )
        assert query("sum(kvmi_sessions)") == {"": 2}
        assert query("sum(kvmi_event_seconds_count) >= bool 2") == {"": 1}
        (p99,) = query("histogram_quantile(0.99, sum by (le) (kvmi_event_seconds_bucket))").values()
        assert 0 < p99 <= 5
        once(lambda: query("sum(kvmi_round_trip_seconds_count) > bool 0"), {"": 1})
        assert query("sum(kvmi_errors_total)") == {"": 0}


def test_the_names_and_types_are_as_prometheus_likes_them(agent: Callable[..., Any], prometheus: Path) -> None:
    process = agent("")
    with urllib.request.urlopen(f"http://{process.metrics}/metrics", timeout=20) as answer:
        check = subprocess.run(
            [prometheus / "promtool", "check", "metrics"], input=answer.read(), capture_output=True, timeout=60
        )
    assert (check.returncode, check.stderr) == (0, b"")
