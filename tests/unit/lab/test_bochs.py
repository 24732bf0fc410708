# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules of the Intel host, with a program that stands in for Bochs: every wait has an end, and results are results."""

import io
import subprocess
import tarfile
from collections.abc import Callable, Iterator

import pytest

from kvmi_host.lab.bochs import BochsHost
from kvmi_host.lab.errors import LabError

Start = Callable[[str], subprocess.Popen[bytes]]


@pytest.fixture
def host() -> BochsHost:
    return BochsHost("intel")


@pytest.fixture
def start(host: BochsHost) -> Iterator[Start]:
    """Starts a shell script in place of Bochs, in the host's folder."""
    running = []

    def make(script: str) -> subprocess.Popen[bytes]:
        running.append(subprocess.Popen(["/bin/sh", "-c", f"exec 2> /dev/null; {script}"], cwd=host.console_log.parent))
        return running[-1]

    yield make
    for process in running:
        process.kill()
        process.wait()


def exchange(host: BochsHost, files: dict[str, bytes]) -> None:
    """What is on the second disk at the end."""
    with tarfile.open(host.console_log.parent / "exchange.img", "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_output_is_shown_to_the_last_letter(host: BochsHost, start: Start) -> None:
    output = "".join(host._output(start("printf 'one\\n\\303\\244' > output.log; sleep 0.5; printf two >> output.log")))
    assert output == "one\nätwo"


@pytest.mark.parametrize(
    "line", ["kvmi-lab: failed: cannot load kvm.ko", "Kernel panic - not syncing: Fatal exception"]
)
def test_host_that_gives_up_is_not_waited_for(host: BochsHost, start: Start, line: str) -> None:
    with pytest.raises(LabError, match=f"the Intel host failed: {line}"):
        list(host._output(start(f"echo '[ 1.0] {line}' > console.log; exec sleep 60")))


def test_silence_has_an_end(start: Start) -> None:
    with pytest.raises(LabError, match=r"nothing came(.|\n)*its last words"):
        list(BochsHost("intel", silence=0.3)._output(start("echo its last words > console.log; exec sleep 60")))


def test_status_and_files_come_back(host: BochsHost) -> None:
    exchange(host, {"/status": b"1\n", "/run/report.xml": b"<x/>"})
    assert host._results() == (1, {"/run/report.xml": b"<x/>"})


def test_disk_as_it_was_sent_is_no_result(host: BochsHost) -> None:
    exchange(host, {"opt/kvmi-host/pyproject.toml": b"[project]\n"})
    with pytest.raises(LabError, match="ended without a result"):
        host._results()
