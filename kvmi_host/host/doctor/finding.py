# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the doctor says of a thing: its state, what was seen, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from kvmi_host.host.doctor.machine import Machine


class State(StrEnum):
    """What came out."""

    OK = "ok"
    NOTE = "note"
    """Introspection works without it, as things are now."""
    MISSING = "missing"
    UNKNOWN = "unknown"


class Verdict(NamedTuple):
    """What a check comes to. ``remedy`` is empty if there is nothing to do."""

    state: State
    evidence: str
    remedy: str = ""


class Check(NamedTuple):
    """How one thing is looked at. ``subject`` is its name; ``group`` the part of the host that it belongs to."""

    group: str
    subject: str
    look: Callable[[Machine], Verdict]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    :ivar evidence: what was seen.
    :ivar remedy: what to do; empty if nothing.
    """

    group: str
    subject: str
    state: State
    evidence: str
    remedy: str = ""


def ok(evidence: str) -> Verdict:
    """It is there."""
    return Verdict(State.OK, evidence)


def note(evidence: str, remedy: str) -> Verdict:
    """It may stay as it is, and can be better."""
    return Verdict(State.NOTE, evidence, remedy)


def missing(evidence: str, remedy: str) -> Verdict:
    """It is needed, and not there."""
    return Verdict(State.MISSING, evidence, remedy)


def unknown(evidence: str, remedy: str) -> Verdict:
    """This user, or this host, cannot tell."""
    return Verdict(State.UNKNOWN, evidence, remedy)
