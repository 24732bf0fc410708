# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can go wrong, as one tree. The branches are what the caller should do differently.

::

    KvmiError                   anything this package raises on purpose
    +-- ProtocolError           the peer broke the protocol: close the session, it cannot be resumed
    |   +-- HandshakeError      ... before the session began: the connection is of no use
    |   +-- UnsupportedDialect  ... or follows one that is not spoken here: another kernel or another library
    +-- CommandError            the kernel refused one command: the session goes on, .code says why
    +-- SessionError            (kvmi_host.introspect) the connection, not what was said on it
    |   +-- SessionClosed       the peer is gone: attach again
    |   +-- SessionTimeout      a deadline passed: the peer is stuck or slow
    +-- HostError               (kvmi_host.host) this host cannot do it until someone changes the host
    +-- RemoteError             ... no SSH connection to a host, or one that broke
    +-- SurveyError             ... a host could not be looked at
    +-- AttachError             (kvmi_host.attach) this VM cannot be attached to
    +-- RecordingError          (kvmi_host.recording) a recording cannot be written or read
    +-- ConfigError             (kvmi_host.agent) the agent's configuration cannot be used: change the file
    +-- ProvisionError          (kvmi_host.provision) libvirt or the SSH way to it refused

Arguments that a caller got wrong (a page that is no page, a reply to an event that has none) are ValueError: a bug of
the program, not a state of the world.
"""

from __future__ import annotations

from kvmi_host.protocol.ids import Command, ErrorCode, command_name

_ADVICE = {
    ErrorCode.EPERM: "not allowed for this session: attach with a policy that allows it",
    ErrorCode.ENOENT: "there is no such item",
    ErrorCode.EAGAIN: "that vCPU has not been started by the guest yet: try again when it runs",
    ErrorCode.ENOMEM: "the host is out of memory",
    ErrorCode.EFAULT: "the kernel could not reach that memory",
    ErrorCode.EBUSY: "too many requests are queued on that vCPU: answer its events first",
    ErrorCode.EINVAL: "an argument is out of range (vCPU index, register, event or address)",
    ErrorCode.EOPNOTSUPP: "this kernel does not have the command",
}


class KvmiError(Exception):
    """Root of every error that this package raises on purpose."""


class ProtocolError(KvmiError):
    """The peer sent what the protocol does not allow. The byte stream cannot be trusted any more: close it."""


class HandshakeError(ProtocolError):
    """The peer failed the exchange that precedes a session: silent, cut short, or with a wrong cookie."""


class UnsupportedDialect(ProtocolError):
    """The kernel speaks a dialect of the protocol that is known by name, and not spoken here."""


class CommandError(KvmiError):
    """The kernel answered a command with an error. The session goes on.

    :ivar command: the command's id, a :class:`Command` where it is known.
    :ivar code: the negative code of ``kvmi_error_code.err``, an :class:`ErrorCode` where it is known.
    """

    def __init__(self, command: int, code: int) -> None:
        self.command = Command(command) if command in Command.__members__.values() else command
        self.code = ErrorCode(code) if code in ErrorCode.__members__.values() else code
        what = f"-{self.code.name}" if isinstance(self.code, ErrorCode) else str(code)
        why = _ADVICE.get(self.code) if isinstance(self.code, ErrorCode) else None
        super().__init__(f"{command_name(command)}: {what}" + (f": {why}" if why else ""))
