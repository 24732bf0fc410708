# SPDX-License-Identifier: LGPL-2.1-or-later
"""Live vCPUs for every test here: stock QEMU under this host's KVM, hooked through its VM file descriptor.

Whatever a test does, the kernel must not complain: new lines of its log are looked through after each one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator, Iterator
from math import inf
from pathlib import Path

import pytest
from _pytest.capture import CaptureManager

from kvmi_host.attach.policy import Allow
from kvmi_host.attach.vmfd import VmHandle
from kvmi_host.host.debug_kernel import locks_are_checked, lost_memory
from kvmi_host.host.kernel_log import TROUBLE
from kvmi_host.introspect import Session
from kvmi_host.protocol import KvmiError
from kvmi_host.testing import modules
from kvmi_host.testing.campaign import Campaign, Profile, Report
from kvmi_host.testing.live import LiveGuest, SharedGuests, Walker, Wire, hook, hook_socket
from kvmi_host.testing.modules import Paging
from kvmi_host.testing.puppet import Puppet
from kvmi_host.testing.rules import Host
from kvmi_host.testing.under_test import host_under_test

MODEWALK_VCPUS = 4
PUPPET_VCPUS = 2


class KernelLog:
    """The kernel's log from now on."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self._fd, 0, os.SEEK_END)
        self.lines: list[str] = []

    def read(self) -> list[str]:
        """The lines since the last call."""
        new = []
        while True:
            try:
                record = os.read(self._fd, 8192)
            except BlockingIOError:
                break
            except BrokenPipeError:
                continue  # lines were lost: the next read gives the oldest one that is left
            new.append(record.decode(errors="replace").partition(";")[2].rstrip("\n"))
        self.lines += new
        return new


def pytest_kvmi_host(config: pytest.Config) -> Host:
    """This host, with KVM's modules loaded anew if that was asked for."""
    if wanted := config.getoption("--paging"):
        modules.unload()
        modules.load(Paging(wanted))
    return host_under_test()


def pytest_report_header(config: pytest.Config) -> str:
    """What it takes to do a campaign again."""
    return f"campaigns: --seed {config.getoption('--seed')}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Linux boots before the shared guest takes its part of the host; tests that unload the modules go last."""
    order = {"test_linux.py": -1, "test_guide.py": -1, "test_operator.py": -1, "test_modules.py": 1}
    items.sort(key=lambda item: order.get(item.path.name, 0))


@pytest.fixture(scope="session", autouse=True)
def _host(record_testsuite_property: Callable[[str, object], None], host: Host) -> None:
    """What the host is goes to the report."""
    for name in ("name", "kernel", "paging", "cpu_vendor"):
        record_testsuite_property("host" if name == "name" else name, getattr(host, name))


@pytest.fixture(scope="session", autouse=True)
def _checks(_host: None) -> Iterator[None]:
    """A kernel that checks itself does so from the beginning to the end, and has lost no memory meanwhile."""
    assert locks_are_checked(), "lockdep has stopped before the first test: the log of the boot says why"
    lost_memory()
    yield
    assert not (lost := lost_memory()), f"memory is lost:\n{lost}"
    assert locks_are_checked(), "lockdep has stopped: the kernel's log says why"


@pytest.fixture(scope="session")
def _log() -> KernelLog:
    return KernelLog()


@pytest.fixture(autouse=True)
def kernel_log(_log: KernelLog) -> Iterator[KernelLog]:
    """The kernel's log; a complaint in it fails the test that brought it about."""
    _log.read()
    yield _log
    complaints = [line for line in _log.read() if TROUBLE.search(line)]
    assert not complaints, "the kernel complains:\n" + "\n".join(complaints)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure shows the end of the kernel's log, and of the guest's serial output."""
    report = yield
    if not report.failed or not isinstance(item, pytest.Function):
        return report
    log = item.funcargs.get("kernel_log")
    if isinstance(log, KernelLog):
        log.read()
        report.sections.append(("dmesg, its end", "\n".join(log.lines[-40:])))
    for name in ("guest", "own_guest", "puppet_guest"):
        if isinstance(guest := item.funcargs.get(name), LiveGuest):
            report.sections.append((f"serial output of {name}, its end", guest.tail()))
    return report


@pytest.fixture(scope="session")
def in_the_systems_path() -> Iterator[None]:
    """``kvmi-host`` is where services look for programs, before any other that is installed for good."""
    program = shutil.which("kvmi-host")
    assert program, "no kvmi-host in PATH"
    link = Path("/usr/local/sbin/kvmi-host")
    if link.is_symlink():
        link.unlink()  # of a suite that was killed
    link.symlink_to(program)
    yield
    link.unlink()


@pytest.fixture(scope="session")
def shared() -> Iterator[SharedGuests]:
    """The guests that tests share."""
    guests = SharedGuests()
    yield guests
    guests.kill()


@pytest.fixture
def guest(shared: SharedGuests) -> Iterator[LiveGuest]:
    """A running modewalk guest with four vCPUs, shared by the tests; none leaves it hooked or held."""
    guest = shared.use("modewalk", MODEWALK_VCPUS)
    yield guest
    session = hook(guest)
    Walker(session, MODEWALK_VCPUS).reset()
    session.close()


@pytest.fixture
def own_guest(shared: SharedGuests, request: pytest.FixtureRequest) -> Iterator[LiveGuest]:
    """A running modewalk guest with two vCPUs, for tests that may break it. The shared ones stand aside if they can."""
    if "guest" not in request.fixturenames:
        shared.stand_aside()
    with LiveGuest(2) as guest:
        yield guest.booted()


@pytest.fixture
def puppet_guest(shared: SharedGuests) -> Iterator[LiveGuest]:
    """A running puppet guest with two vCPUs, shared by the tests; one whose vCPUs a test leaves stuck is ended."""
    guest = shared.use("puppet", PUPPET_VCPUS)
    yield guest
    try:
        with hook(guest) as session:
            Puppet(session).settle(guest.vcpus)
    except (AssertionError, KvmiError):
        guest.kill()
        raise


@pytest.fixture
def campaign(shared: SharedGuests, pytestconfig: pytest.Config) -> Callable[..., Report]:
    """Carries out a campaign of a profile, with the seed that was asked for, and tells what it does."""
    shared.stand_aside()
    terminal = pytestconfig.pluginmanager.get_plugin("terminalreporter")
    capture = pytestconfig.pluginmanager.get_plugin("capturemanager")
    assert isinstance(terminal, pytest.TerminalReporter)
    assert isinstance(capture, CaptureManager)

    def tell(text: str) -> None:
        with capture.global_and_fixture_disabled():
            terminal.write_line(text)

    def carry_out(profile: Profile, *, messages: float = inf, seconds: float = inf, vcpus: int = 4) -> Report:
        seed = pytestconfig.getoption("--seed")
        tell("")
        report = Campaign(seed, profile, messages=messages, seconds=seconds, vcpus=vcpus, tell=tell).run()
        tell(str(report))
        return report

    return carry_out


@pytest.fixture
def handle(guest: LiveGuest) -> Iterator[VmHandle]:
    """A duplicate of the guest's VM file descriptor."""
    with VmHandle(guest.pid) as handle:
        yield handle


@pytest.fixture
def hooked(host: Host) -> Iterator[Callable[..., Session]]:
    """Hooks a guest: ``hooked(guest, allow="full")``. The sessions end with the test."""
    sessions = []

    def make(guest: LiveGuest, allow: Allow = "full") -> Session:
        session = hook(guest, allow)
        sessions.append(session)
        if host.dialect != "v6":
            session.get_version()  # events are read as v6 has them until this is answered
        return session

    yield make
    for session in sessions:
        session.close()


@pytest.fixture
def session(guest: LiveGuest, hooked: Callable[..., Session]) -> Session:
    """A session with the guest that may do everything."""
    return hooked(guest)


@pytest.fixture
def wire(guest: LiveGuest) -> Iterator[Wire]:
    """A session with the guest that may do everything, as a bare socket."""
    with hook_socket(guest) as sock:
        yield Wire(sock)


@pytest.fixture
def walker(session: Session) -> Walker:
    """The session, with what it takes to send vCPUs to stations."""
    return Walker(session, MODEWALK_VCPUS)


@pytest.fixture
def puppet(puppet_guest: LiveGuest, hooked: Callable[..., Session]) -> Puppet:
    """The vCPUs of the puppet guest, on a session that may do everything."""
    return Puppet(hooked(puppet_guest))
