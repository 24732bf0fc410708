# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host's part of the night while it goes on: what is known of it, for who does it and for who watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvmi_host.lab.inventory import LabHost
from kvmi_host.lab.night import HostRun, State
from kvmi_host.lab.pytest_output import Tally

_MOST_OUTPUT = 64 << 20  # bytes of pytest's output that are kept
_LOGS = ("junit.xml", "suite.json", "pytest.log", "dmesg.log", "console.log")


class Part:
    """A host's part.

    :param folder: for what the host leaves.
    :param changed: called when there is something new to show.
    :ivar phase: what it is at now; empty: it waits for its turn.
    :ivar detail: what of that, in words.
    :ivar phases: seconds that each took.
    :ivar result: set at the end.
    """

    def __init__(self, host: LabHost, folder: Path, changed: Callable[[Part], None]) -> None:
        self.host = host
        self.folder = folder
        self.phase = ""
        self.detail = ""
        self._began: float | None = None
        self.tally = Tally()
        self.phases: dict[str, float] = {}
        self.status: int | None = None
        self.dirty = False
        self.warnings: list[str] = []
        self.result: HostRun | None = None
        self._changed = changed
        self._kept = 0

    @property
    def seconds(self) -> float:
        """How long it has taken so far, or took."""
        if self.result:
            return sum(self.phases.values())
        return 0 if self._began is None else time.monotonic() - self._began

    def begin(self) -> None:
        """Its turn has come: what an earlier night left in its folder goes."""
        self._began = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in _LOGS:
            (self.folder / name).unlink(missing_ok=True)

    @contextmanager
    def at(self, phase: str) -> Iterator[None]:
        """Note that it is at a phase while the block runs, and how long it took."""
        began = time.monotonic()
        self.phase = phase
        self.tell("")
        try:
            yield
        finally:
            self.phases[phase] = round(self.phases.get(phase, 0) + time.monotonic() - began, 1)

    def tell(self, detail: str) -> None:
        """Note what is done now."""
        self.detail = detail
        self._changed(self)

    def output(self, piece: bytes) -> None:
        """Take a piece of pytest's output."""
        kept = piece[: max(0, _MOST_OUTPUT - self._kept)]
        self._kept += len(kept)
        with (self.folder / "pytest.log").open("ab") as log:
            log.write(kept)
        self.tally.feed(piece)
        self._changed(self)

    def end(self, state: State, reason: str) -> HostRun:
        """Its part has ended."""
        self.result = HostRun(
            name=self.host.name,
            state=state,
            reason=" ".join(reason.split()),
            tags=dict(self.host.tags),
            dirty=self.dirty,
            status=self.status,
            phases=self.phases,
            warnings=tuple(self.warnings),
        )
        self.phase = ""
        self.tell("")
        return self.result
