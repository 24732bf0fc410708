# SPDX-License-Identifier: LGPL-2.1-or-later
"""Recording a session while it runs."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from time import time_ns
from types import TracebackType
from typing import Any, Self

from kvmi_host import __version__
from kvmi_host.protocol import MAX_PAYLOAD, Command, Event
from kvmi_host.protocol.framing import HEADER
from kvmi_host.recording import pcapng
from kvmi_host.recording.errors import RecordingFailed

MESSAGES = "kvmi"
NOTES = "json"
"""Names of the dissectors of what a recording holds: messages, and what was noted beside them."""

_MESSAGE_TAGS = pcapng.dissected_by(MESSAGES)
_NOTE_TAGS = pcapng.dissected_by(NOTES)
_MAX_TIMES = 8192  # twice as many as there can be vCPUs: more events than can wait for their reply


class Recorder:
    """Writes what crosses a session's socket to a file, and notes beside it.

    Each message is one write(2), so if this program dies, at any moment, all messages before the last one are whole. No
    sync is done: what a crash of the host leaves is up to its file system.
    """

    def __init__(self, path: str | os.PathLike[str], vm: str) -> None:
        """
        :param path: a file that does not exist yet (others cannot read it: it holds what was read of the guest's
            memory), or a named pipe: waits until someone reads it, and a reader that is slow slows the session.
        :param vm: the VM, as Wireshark shows it: as the interface's name.
        :raise RecordingFailed: the file is there already, or cannot be made.
        """
        self._path = os.fspath(path)
        self._pending = [b"", b""]  # of a message that is not whole yet: received, sent
        self._times: dict[int, int] = {}
        self._empty = True
        self._fd = _open(self._path)
        self._write(pcapng.file_head(f"kvmi-host {__version__}", vm))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the recording; if it holds nothing, leave no file. May be called again.

        :raise RecordingFailed: the rest cannot be written.
        """
        if self._fd < 0:
            return
        try:
            for sent, rest in enumerate(self._pending):
                if rest:  # the session ended in the middle of a message
                    self._write_message(bool(sent), time_ns(), rest)
        finally:
            self._end()

    def tap(self, sent: bool, data: bytes) -> None:
        """Record what crossed the socket: a session's ``tap``. Bytes that are no messages are recorded as they came.

        :raise RecordingFailed: it cannot be written, and nothing more will be.
        """
        if self._fd < 0 or not data:
            return
        now = time_ns()
        data = self._pending[sent] + data
        at = 0
        while len(data) - at >= HEADER.size:
            message, size, seq = HEADER.unpack_from(data, at)
            end = at + HEADER.size + size
            if size > MAX_PAYLOAD:
                end = min(end, len(data))  # no message: the session ends here, and this is why
            elif end > len(data):
                break
            elif message == Command.EVENT and not sent:
                self._remember(seq, now)
            elif message == Command.EVENT_REPLY and sent:
                self._times.pop(seq, None)
            self._write_message(sent, now, data[at:end])
            at = end
        self._pending[sent] = data[at:]

    def note(self, content: Mapping[str, Any]) -> None:
        """Record an object beside the messages: what ``attach --json`` prints of the session and its summary.

        :raise RecordingFailed: it cannot be written, and nothing more will be.
        """
        if self._fd >= 0:
            self._write(pcapng.packet(time_ns(), 0, _NOTE_TAGS, json.dumps(content).encode()))
            self._empty = False

    def time_of(self, event: Event) -> int:
        """When an event that was not replied to yet was received, as it is recorded: nanoseconds since the epoch."""
        return self._times.get(event.seq) or time_ns()

    def _remember(self, seq: int, now: int) -> None:
        if len(self._times) >= _MAX_TIMES:  # a peer that does not wait for replies
            self._times.clear()
        self._times[seq] = now

    def _write_message(self, sent: bool, now: int, data: bytes) -> None:
        direction = pcapng.OUTBOUND if sent else pcapng.INBOUND
        self._write(pcapng.packet(now, direction, _MESSAGE_TAGS, data))
        self._empty = False

    def _write(self, block: bytes) -> None:
        view = memoryview(block)
        try:
            while view:  # once, but for a pipe that is full
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            self._end()
            raise RecordingFailed(f"{self._path}: the recording ends here: {error.strerror}") from error

    def _end(self) -> None:
        if self._fd >= 0:
            regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
            os.close(self._fd)
            self._fd = -1
            if self._empty and regular:
                os.unlink(self._path)


def _open(path: str) -> int:
    flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        try:
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            fd = os.open(path, flags)
            if stat.S_ISFIFO(os.fstat(fd).st_mode):
                return fd
            os.close(fd)
            raise
    except FileExistsError:
        raise RecordingFailed(f"{path} is there already: remove it, or record to another file") from None
    except OSError as error:
        raise RecordingFailed(f"{path}: no recording can be made there: {error.strerror}") from error
