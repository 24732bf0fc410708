# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ioctls: who may hook, what is refused, how a session is asked to end, and how it is ended."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fcntl import ioctl
from pathlib import Path
from uuid import uuid4

import pytest

from kvmi_host.attach import attach
from kvmi_host.attach.errors import AlreadyHooked, AttachRefused, NotHooked
from kvmi_host.attach.vmfd import VmHandle
from kvmi_host.host import HostError, kvm
from kvmi_host.introspect import Session
from kvmi_host.protocol import Command, EventId
from kvmi_host.testing.live import DEADLINE, LiveGuest, Walker, await_end
from kvmi_host.testing.modewalk import Actions, Station

pytestmark = pytest.mark.hardware

UNPRIVILEGED = 65534


@contextmanager
def parameter(value: str) -> Iterator[None]:
    """The module parameter kvm.introspection, for a while."""
    path = Path("/sys/module/kvm/parameters/introspection")
    before = path.read_text()
    path.write_text(value)
    try:
        yield
    finally:
        path.write_text(before)


@pytest.mark.rule("5.2")
@pytest.mark.parametrize("capability", [180, 999])
def test_the_capability_answers_version_1(capability: int) -> None:
    with open("/dev/kvm", "rb") as device:
        assert ioctl(device, kvm.KVM_CHECK_EXTENSION, capability) == 1


@pytest.mark.rule("5.3")
def test_switched_off_there_is_no_capability_and_no_hook(guest: LiveGuest) -> None:
    with parameter("0"):
        with pytest.raises(HostError, match="switched off"):
            kvm.require_introspection()
        with pytest.raises(AttachRefused, match="switched off"):
            attach(guest.name)
    attach(guest.name).close()


@pytest.mark.rule("5.5")
def test_before_anything_is_allowed_only_three_commands_are(guest: LiveGuest, handle: VmHandle) -> None:
    ours, kernels = socket.socketpair()
    with kernels:
        handle.hook(kernels, uuid4(), observe=False)
    with Session(ours, timeout=DEADLINE) as session:
        allowed = {command for command in Command if session.check_command(command)}
        assert allowed == {Command.GET_VERSION, Command.CHECK_COMMAND, Command.CHECK_EVENT}
        assert not any(session.check_event(event) for event in EventId)


@pytest.mark.rule("5.6")
def test_what_is_allowed_can_be_taken_back(session: Session, handle: VmHandle) -> None:
    kvm.allow_command(handle._fd, Command.GET_MAX_GFN, allow=False)
    assert not session.check_command(Command.GET_MAX_GFN)
    kvm.allow_command(handle._fd, allow=False)
    kvm.allow_event(handle._fd, allow=False)
    assert not session.check_command(Command.GET_GUEST_INFO)
    assert not session.check_event(EventId.CR)
    assert session.check_command(Command.GET_VERSION)


@pytest.mark.rule("5.7")
@pytest.mark.parametrize(
    ("request_number", "number", "error"),
    [
        (kvm.KVM_INTROSPECTION_COMMAND, 40, errno.EINVAL),
        (kvm.KVM_INTROSPECTION_COMMAND, -2, errno.EINVAL),
        (kvm.KVM_INTROSPECTION_COMMAND, Command.CONTROL_VE, errno.EOPNOTSUPP),
        (kvm.KVM_INTROSPECTION_EVENT, 12, errno.EINVAL),
    ],
)
def test_what_there_is_not_cannot_be_allowed(
    session: Session, handle: VmHandle, request_number: int, number: int, error: int
) -> None:
    with pytest.raises(OSError) as refused:  # noqa: PT011 - the number is looked at below
        ioctl(handle._fd, request_number, kvm._ALLOW.pack(True, number))
    assert refused.value.errno == error


@pytest.mark.rule("1.1")
def test_a_hooked_vm_cannot_be_hooked_again(session: Session, guest: LiveGuest) -> None:
    with pytest.raises(AlreadyHooked):
        attach(guest.name)
    assert session.get_version().version == 1


@pytest.mark.rule("5.18")
def test_a_vm_whose_introspector_has_closed_can_be_hooked_at_once(guest: LiveGuest) -> None:
    for _ in range(20):
        attach(guest.name, timeout=DEADLINE).close()


@pytest.mark.rule("5.4")
@pytest.mark.parametrize("kind", ["datagram", "file", "closed", "unconnected"])
def test_only_a_connected_stream_socket_will_do(handle: VmHandle, kind: str) -> None:
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    lonely = socket.socket(socket.AF_UNIX)
    with pair[0], pair[1], lonely, open("/dev/null", "rb") as file:
        number = {"datagram": pair[0].fileno(), "file": file.fileno(), "closed": -1, "unconnected": lonely.fileno()}
        with pytest.raises(OSError) as refused:  # noqa: PT011 - the number is looked at below
            kvm.hook(handle._fd, number[kind], uuid4(), observe=True)
    assert refused.value.errno == (errno.ENOTCONN if kind == "unconnected" else errno.EINVAL)


@pytest.mark.rule("5.8")
@pytest.mark.parametrize("call", [kvm.unhook, kvm.unhook_force, kvm.allow_command, kvm.allow_event])
def test_a_vm_that_is_not_hooked_is_refused(guest: LiveGuest, call: Callable[[int], None]) -> None:
    with VmHandle(guest.pid) as handle, pytest.raises(OSError, match="Bad address"):
        call(handle._fd)


@pytest.mark.rule("5.12")
def test_another_process_needs_cap_sys_admin(handle: VmHandle) -> None:
    child = os.fork()
    if child == 0:
        ours, _kernels = socket.socketpair()
        os.setuid(UNPRIVILEGED)
        try:
            kvm.hook(handle._fd, ours.fileno(), uuid4(), observe=True)
        except OSError as error:
            os._exit(error.errno)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == errno.EPERM


@pytest.mark.rule("5.13")
def test_other_ioctls_of_a_duplicate_are_refused_as_ever(handle: VmHandle) -> None:
    create_vcpu = 0xAE41
    with pytest.raises(OSError, match="Input/output error"):
        ioctl(handle._fd, create_vcpu, 99)


@pytest.mark.rule("5.10")
def test_unhook_that_nobody_asked_for_is_refused(session: Session, handle: VmHandle) -> None:
    assert handle.unhook_request() is False
    assert session.get_version().version == 1


@pytest.mark.rule("5.9", "4.2")
def test_unhook_sends_its_event_and_leaves_the_session_to_the_introspector(session: Session, handle: VmHandle) -> None:
    session.control_vm_events(EventId.UNHOOK, True)
    assert handle.unhook_request() is True
    event = session.next_event(DEADLINE)
    assert event is not None
    assert (event.event, event.vcpu, event.seq) == (EventId.UNHOOK, 0, 1)
    assert session.get_version().version == 1
    session.close()
    while handle.hooked():
        pass


@pytest.mark.rule("5.11")
def test_a_forced_unhook_ends_the_session_and_the_waiting_vcpu_goes_on(
    guest: LiveGuest, walker: Walker, handle: VmHandle
) -> None:
    walker.hold(0, Station.LONG64, Actions.ALL)
    walker.enable(EventId.HYPERCALL, 0)
    walker.event()
    handle.unhook_force()
    with pytest.raises(NotHooked):
        handle.unhook_force()
    await_end(walker.session)
    guest.goes_on()
