# SPDX-License-Identifier: LGPL-2.1-or-later
"""A rack that several share: labgrid's own coordinator and exporter, and users of them."""

from __future__ import annotations

import getpass
import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic, sleep

import paramiko
import pytest

from kvmi_host.host.remote import connect
from kvmi_host.lab import LabError
from kvmi_host.lab.labgrid_session import Session
from kvmi_host.lab.rack import reserved
from kvmi_host.testing.ssh_server import SshServer

pytestmark = pytest.mark.integration

STARTS_WITHIN = 60.0  # seconds
HAPPENS_WITHIN = 60.0
PLACES = {
    "lab1": "vendor=amd generation=zen3",
    "lab2": "vendor=amd generation=zen4",
    "lab3": "vendor=intel generation=skylake",
    "bare": "vendor=none",
}
"""The last one has no exporter."""
SCRIPT = """
import json, sys
from kvmi_host.lab.rack import reserved
with reserved(sys.argv[1], json.loads(sys.argv[2]), tell=lambda text: print(text, flush=True)) as hosts:
    print("has", *(host.name for host in hosts), flush=True)
    sys.stdin.read()
"""


class Rack:
    """A coordinator and an exporter, and ``labgrid-client`` for them."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder = folder
        self.coordinator, said = self._start("coordinator", "-l", f"127.0.0.1:{port}", until="listening on ")
        self.address = said.split()[-1]

    def export(self, port: int) -> None:
        """Make the places known; each but the last has an SSH server on a port here."""
        names = [name for name in PLACES if name != "bare"]
        service = {"address": "127.0.0.1", "username": getpass.getuser(), "port": port}
        resources = self.folder / "exporter.yaml"
        resources.write_text(json.dumps({name: {"NetworkService": service} for name in names}))
        arguments = ("-c", self.address, "-n", "shelf", resources)
        self.exporter, _ = self._start("exporter", *arguments, until="add resource lab3")
        for name, tags in PLACES.items():
            self.client("-p", name, "create")
            self.client("-p", name, "set-tags", *tags.split())
            if name in names:
                self.client("-p", name, "add-match", f"shelf/{name}/*")
        deadline = monotonic() + STARTS_WITHIN
        while "shelf/lab3" not in self.client("resources"):
            assert monotonic() < deadline
            sleep(0.1)  # the deadline decides, not this

    def client(self, *arguments: str, user: str = "alice") -> str:
        """What ``labgrid-client`` says to a user."""
        argv = [program("client"), "-x", self.address, *arguments]
        env = {**os.environ, "LG_USERNAME": user, "LG_HOSTNAME": "desk"}
        return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60, env=env).stdout

    def in_use(self) -> list[str]:
        """Which places are acquired, and the reservations."""
        with Session(self.address) as session:
            return [place.name for place in session.places() if place.holder] + list(session.reservations())

    def stop(self) -> None:
        for process in (self.coordinator, getattr(self, "exporter", None)):
            if process is not None:
                process.kill()
                process.wait()

    def _start(self, name: str, *arguments: str | Path, until: str) -> tuple[subprocess.Popen[bytes], str]:
        """A process, and the line that says it is ready. Its log is a file: nobody would read a pipe to its end."""
        log = self.folder / f"{name}.log"
        with log.open("wb") as output:
            argv = [program(name), *arguments]
            env = {**os.environ, "PYTHONUNBUFFERED": "1"}
            process = subprocess.Popen(argv, stdout=output, stderr=output, cwd=self.folder, env=env)
        deadline = monotonic() + STARTS_WITHIN
        while True:
            line = next((line for line in log.read_text().splitlines() if line.startswith(until)), None)
            if line is not None:
                return process, line
            assert process.poll() is None, log.read_text()
            assert monotonic() < deadline, log.read_text()
            sleep(0.1)  # the deadline decides, not this


def program(name: str) -> Path:
    return Path(sys.executable).parent / f"labgrid-{name}"


@contextmanager
def running(folder: Path, ssh_port: int = 22) -> Iterator[Rack]:
    rack = Rack(folder)
    try:
        rack.export(ssh_port)
        yield rack
    finally:
        rack.stop()


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the key that the SSH server has, and that opens it."""
    path = tmp_path_factory.mktemp("key") / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True, timeout=60)
    return path


@pytest.fixture(scope="module")
def ssh_port(key: Path) -> Iterator[int]:
    with SshServer(paramiko.Ed25519Key.from_private_key_file(str(key))) as server:
        yield server.port


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, ssh_port: int) -> Iterator[Rack]:
    with running(tmp_path_factory.mktemp("rack"), ssh_port) as rack:
        yield rack


@pytest.fixture
def rack(shared: Rack) -> Iterator[Rack]:
    """The rack, which every test leaves as it was."""
    yield shared
    assert shared.in_use() == []


@pytest.fixture(autouse=True)
def me(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who we are to labgrid."""
    monkeypatch.setenv("LG_USERNAME", "carol")
    monkeypatch.setenv("LG_HOSTNAME", "desk")
    monkeypatch.delenv("LG_TOKEN", raising=False)
    monkeypatch.delenv("LG_PROXY", raising=False)


class Told:
    """What a user was told."""

    def __init__(self) -> None:
        self._texts: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.tell = self._texts.put

    def next(self) -> str:
        return self._texts.get(timeout=HAPPENS_WITHIN)


@pytest.fixture
def told() -> Told:
    return Told()


@contextmanager
def another(rack: Rack, user: str, **filters: str) -> Iterator[subprocess.Popen[str]]:
    """Somebody else who wants hosts, in a process that says what happens, and has them until its input ends."""
    argv = [sys.executable, "-c", SCRIPT, rack.address, json.dumps(filters)]
    env = {**os.environ, "LG_USERNAME": user}
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            yield process
            process.communicate("", timeout=HAPPENS_WITHIN)
        finally:
            process.kill()


def says(process: subprocess.Popen[str]) -> str:
    """What it says next."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_all_places_with_the_tags_are_ours_while_the_block_runs(rack: Rack, ssh_port: int) -> None:
    with reserved(rack.address, {"vendor": "amd"}) as hosts:
        address = f"{getpass.getuser()}@127.0.0.1:{ssh_port}"
        assert [(host.name, host.kind, host.address) for host in hosts] == [
            ("lab1", "ssh", address),
            ("lab2", "ssh", address),
        ]
        assert hosts[0].tags == {"vendor": "amd", "generation": "zen3"}
        assert rack.client("who").count("carol") == 2


def test_as_many_as_are_asked_for_are_taken(rack: Rack) -> None:
    with reserved(rack.address, {"vendor": "amd"}, count=1) as hosts:
        assert len(hosts) == 1
        assert rack.client("who").count("carol") == 1


def test_the_host_behind_a_place_does_what_it_is_told(rack: Rack, key: Path, ssh_port: int, tmp_path: Path) -> None:
    public = Path(f"{key}.pub").read_text()
    (tmp_path / "known").write_text(f"[127.0.0.1]:{ssh_port} {public}")
    (tmp_path / "config").write_text(f"IdentityFile {key}\nUserKnownHostsFile {tmp_path / 'known'}\n")
    with reserved(rack.address, {}, "lab3") as [host], connect(host.address, tmp_path / "config") as remote:
        assert remote.run("echo here").stdout == b"here\n"


def test_the_suites_hosts_are_the_places_and_are_given_back(
    rack: Rack, key: Path, ssh_port: int, tmp_path: Path
) -> None:
    """This machine, which is behind the place, has no introspection."""
    public = Path(f"{key}.pub").read_text()
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{ssh_port} {public}")
    (tmp_path / ".ssh/config").write_text(f"IdentityFile {key}\n")
    argv = [
        sys.executable,
        "-m",
        "kvmi_host.cli",
        "hwtest",
        "--lg-filter",
        "vendor=intel",
        "-k",
        "no test is so called",
    ]
    argv += ["--report", str(tmp_path / "night")]
    env = {**os.environ, "HOME": str(tmp_path), "LG_COORDINATOR": rack.address}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    [host] = json.loads((tmp_path / "night/night.json").read_text())["hosts"]
    assert (host["name"], host["state"]) == ("lab3", "refused"), host
    assert host["tags"] == {"vendor": "intel", "generation": "skylake"}
    assert rack.in_use() == []


def test_who_comes_second_waits_until_the_first_lets_go(rack: Rack) -> None:
    with ExitStack() as first:
        first.enter_context(reserved(rack.address, {"vendor": "intel"}))
        with another(rack, "bob", vendor="intel") as second:
            assert says(second).startswith("labgrid's place lab3 is in use (lab3 by carol on desk): waiting")
            first.close()
            assert says(second) == "has lab3"


def test_what_is_not_free_in_time_is_an_error_that_says_who_has_it(rack: Rack) -> None:
    rack.client("-p", "lab3", "acquire")
    with (
        pytest.raises(LabError, match=r"lab3 was not free within 0 s: in use are lab3 by alice on desk"),
        reserved(rack.address, {"vendor": "intel"}, deadline=0, tell=lambda text: None),
    ):
        pytest.fail("it was had")
    rack.client("-p", "lab3", "release")


def test_those_that_are_free_do_not_wait_for_one_that_is_never(rack: Rack) -> None:
    rack.client("-p", "lab1", "acquire")
    with (
        pytest.raises(LabError, match="lab1 was not free"),
        reserved(rack.address, {"vendor": "amd"}, deadline=0, tell=lambda text: None) as hosts,
    ):
        assert [host.name for host in hosts] == ["lab2"]
    rack.client("-p", "lab1", "release")


def test_tags_that_no_place_has_are_an_error_that_says_what_there_is(rack: Rack) -> None:
    with (
        pytest.raises(LabError, match=r"vendor=via wanted, and labgrid at \S+ has none\. There are .*lab1: gen.*zen3"),
        reserved(rack.address, {"vendor": "via"}),
    ):
        pytest.fail("it was had")


def test_a_place_without_an_ssh_server_is_an_error_that_says_where_to_look(rack: Rack) -> None:
    with (
        pytest.raises(LabError, match="bare has no NetworkService: is its exporter connected"),
        reserved(rack.address, {"vendor": "none"}, tell=lambda text: None),
    ):
        pytest.fail("it was had")


def test_a_named_place_that_somebody_has_is_not_waited_for(rack: Rack) -> None:
    rack.client("-p", "lab1", "acquire")
    with (
        pytest.raises(LabError, match="lab1 is in use: alice on desk acquired it"),
        reserved(rack.address, {}, "lab1"),
    ):
        pytest.fail("it was had")
    rack.client("-p", "lab1", "release")


def test_a_named_place_that_is_reserved_is_an_error_that_says_for_whom(rack: Rack) -> None:
    token = rack.client("reserve", "--shell", "name=lab1").strip().removeprefix("export LG_TOKEN=")
    with (
        pytest.raises(LabError, match="lab1 could not be acquired: it is reserved for alice on desk"),
        reserved(rack.address, {}, "lab1"),
    ):
        pytest.fail("it was had")
    rack.client("cancel-reservation", token)


def test_a_name_that_is_none_is_an_error(rack: Rack) -> None:
    with pytest.raises(LabError, match="place pattern lab9 matches nothing"), reserved(rack.address, {}, "lab9"):
        pytest.fail("it was had")


def test_a_named_place_that_we_acquired_before_stays_acquired(rack: Rack) -> None:
    rack.client("-p", "lab1", "acquire", user="carol")
    with reserved(rack.address, {}, "lab1") as hosts:
        assert [host.name for host in hosts] == ["lab1"]
    assert rack.in_use() == ["lab1"]
    rack.client("-p", "lab1", "release", user="carol")


def test_a_place_that_we_reserved_before_is_ours_by_its_token(rack: Rack) -> None:
    token = rack.client("reserve", "--shell", "name=lab1", user="carol").strip().removeprefix("export LG_TOKEN=")
    with reserved(rack.address, {}, f"+{token}") as hosts:
        assert [host.name for host in hosts] == ["lab1"]
    assert rack.in_use() == [token]
    rack.client("cancel-reservation", token)


def test_places_are_given_back_when_the_block_fails(rack: Rack) -> None:
    with pytest.raises(ZeroDivisionError), reserved(rack.address, {"vendor": "amd"}):
        raise ZeroDivisionError
    assert rack.in_use() == []


def test_ctrl_c_gives_the_places_back(rack: Rack) -> None:
    with another(rack, "bob", vendor="amd") as user:
        assert says(user) == "has lab1 lab2"
        user.send_signal(signal.SIGINT)
        user.wait(HAPPENS_WITHIN)
    assert rack.in_use() == []


def test_ctrl_c_while_waiting_gives_up_the_turn_and_what_was_taken_before(rack: Rack) -> None:
    rack.client("-p", "lab2", "acquire")
    with another(rack, "bob", vendor="amd") as user:
        assert "lab2 is in use (lab2 by alice on desk)" in says(user)
        user.send_signal(signal.SIGINT)
        user.wait(HAPPENS_WITHIN)
        rack.client("-p", "lab2", "release")
        assert rack.in_use() == []


def test_who_loses_a_place_to_somebody_else_is_told(rack: Rack, told: Told) -> None:
    with reserved(rack.address, {"vendor": "intel"}, tell=told.tell):
        rack.client("-p", "lab3", "release", "--kick")
        assert told.next() == "labgrid's place lab3 is no longer ours: nobody has it. The suite goes on"


def test_a_coordinator_that_goes_away_is_told_and_how_to_release_what_it_may_still_hold(
    tmp_path: Path, told: Told
) -> None:
    with ExitStack() as stack, running(tmp_path) as rack:
        stack.enter_context(reserved(rack.address, {"vendor": "amd"}, tell=told.tell))
        rack.coordinator.kill()
        assert "is gone: the suite goes on on lab1, lab2" in told.next()
        with pytest.raises(LabError, match=r"lab1, lab2 may still be acquired for desk/carol .*-p lab1 release"):
            stack.close()


def test_a_coordinator_that_was_started_again_has_nothing_of_ours_to_give_back(tmp_path: Path, told: Told) -> None:
    with running(tmp_path) as rack, reserved(rack.address, {"vendor": "amd"}, tell=told.tell):
        rack.coordinator.kill()
        rack.coordinator.wait()
        told.next()
        again = Rack(tmp_path, int(rack.address.rpartition(":")[2]))
        rack.coordinator = again.coordinator


def test_no_coordinator_is_an_error_that_says_where_it_was_looked_for() -> None:
    with (
        pytest.raises(LabError, match=r"no labgrid coordinator answers at 127\.0\.0\.1:1: is that the right address"),
        reserved("127.0.0.1:1", {"vendor": "amd"}),
    ):
        pytest.fail("it was had")
