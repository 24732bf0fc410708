# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the keys of the live view do to the VM."""

from __future__ import annotations

from collections.abc import Callable

from kvmi_host.cli.view import Situation
from kvmi_host.introspect import Facts, SessionTimeout
from kvmi_host.introspect.holding import Hold
from kvmi_host.introspect.plans import Plan
from kvmi_host.protocol import Command, CommandError, EventId, command_name, event_name

_PAUSE_KEYS, _STEP_KEY, _NEXT_KEY, _QUIT_KEYS = " p", "s", "\t", "q\x04"


class Steering:
    """Pauses the VM, steps a vCPU, lets them go.

    :ivar quit: whether it was asked to leave.
    """

    def __init__(self, hold: Hold, facts: Facts, carry_out: Callable[[Plan[object]], object]) -> None:
        """
        :param carry_out: carries a plan out.
        """
        self.quit = False
        self._hold = hold
        self._carry_out = carry_out
        self._paused = False
        self._may_pause = _may(facts, Command.PAUSE_VCPU, EventId.PAUSE_VCPU)
        self._may_step = self._may_pause and _may(facts, Command.CONTROL_EVENTS, EventId.SINGLESTEP)
        self._vcpus = facts.vcpus
        self._vcpu = 0  # what is stepped
        self._refused = ""

    def press(self, keys: str) -> None:
        """Do what these keys say. What does not succeed is told by :meth:`situation`."""
        for key in keys:
            self._refused = ""
            try:
                self._press(key)
            except (CommandError, SessionTimeout) as error:
                self._refused = str(error)

    def let_go(self) -> None:
        """Resume, if the VM is paused."""
        if self._paused:
            self._paused = False
            self._carry_out(self._hold.resume())

    def situation(self) -> Situation:
        """What goes on, and what the keys do now."""
        quits = ("q", "quit")
        if not self._paused:
            keys = (("space", "pause"),) if self._may_pause else ()
            return Situation("running", self._refused, (*keys, quits))
        held = self._hold.held
        where = f"vCPU {self._vcpu} at {held[self._vcpu].rip:#x}" if self._vcpu in held else f"vCPU {self._vcpu} runs"
        steps = (("s", f"step vCPU {self._vcpu}"), ("tab", "next vCPU")) if self._may_step else ()
        detail = self._refused or f"{len(held)} of {self._vcpus} held, {where}"
        return Situation("paused", detail, (("space", "resume"), *steps, quits))

    def _press(self, key: str) -> None:
        if key in _QUIT_KEYS:
            self.quit = True
        elif key in _PAUSE_KEYS and self._paused:
            self.let_go()
        elif key in _PAUSE_KEYS and self._may_pause:
            self._paused = True
            try:
                self._carry_out(self._hold.pause())
            except (CommandError, SessionTimeout):
                self.let_go()
                raise
        elif key == _NEXT_KEY and self._vcpus:
            self._vcpu = (self._vcpu + 1) % self._vcpus
        elif key == _STEP_KEY and self._may_step and self._vcpu in self._hold.held:
            self._carry_out(self._hold.step(self._vcpu))


def _may(facts: Facts, command: int, event: int) -> bool:
    return command_name(command) in facts.commands and event_name(event) in facts.events
