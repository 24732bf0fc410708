# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rules that the hardware suite holds a host to, from its ``rules.toml``, and on which hosts they can be shown."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmi_host.testing.emulators import Fault

ATTACHING = "attach from outside"
OBSERVING = "observing sessions"
SHORT_REPLIES = "short replies"
NESTED = "nested paging"
SHADOW = "shadow paging"
EXECUTE_ONLY = "execute-only pages"
NO_EXECUTE_ONLY = "no execute-only pages"
FIRST_NUMBER = "a settable event number"
SELF_CHECKS = "allocations that can be made to fail"
SERVICES = "services"
UNDEPLOYED = "no deployment"

PROPERTIES: Mapping[str, str] = {
    ATTACHING: "the introspection ioctls are taken from a process that is not the VMM",
    OBSERVING: "HOOK has the flag OBSERVE",
    SHORT_REPLIES: "the common part of a reply may be short",
    NESTED: "the CPU walks the guest's page tables",
    SHADOW: "KVM shadows the guest's page tables",
    EXECUTE_ONLY: "a page can be executable and nothing else",
    NO_EXECUTE_ONLY: "a page cannot be executable and nothing else",
    FIRST_NUMBER: "where the count of events begins can be set, near its end",
    SELF_CHECKS: "the kernel is the one that checks itself (kernel/debug.config)",
    SERVICES: "systemd booted the host, which has AppArmor",
    UNDEPLOYED: "what a deployed host has in /etc/kvmi-host, /run/kvmi-agent and libvirt's hooks is free for tests",
}
"""What a rule, or a test, may need of a host, and what that means."""

DIALECTS = ("v6", "v7")
"""Those that a session can be had in; v12 is refused when attaching."""

_NUMBER = re.compile(r"[1-7]\.[1-9]\d*")


class RulesError(ValueError):
    """A file of rules is not what it should be: which one, and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Host:
    """What a host under test is.

    :ivar lacks: of :data:`PROPERTIES`, those that it has not, each with the reason.
    :ivar faults: what its CPU, which is emulated, gets wrong.
    """

    name: str
    kernel: str
    cpu_vendor: str
    dialect: str
    paging: str
    version: str
    lacks: Mapping[str, str]
    faults: frozenset[Fault] = frozenset()


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. Empty: `dialects` for every one, `needs` for nothing; ``fault``: None for none."""

    number: str
    group: str
    text: str
    dialects: tuple[str, ...] = ()
    needs: str = ""
    fault: Fault | None = None

    def not_here(self, host: Host) -> str:
        """Why the rule does not hold on a host; an empty text if it does."""
        if self.dialects and host.dialect not in self.dialects:
            return f"a rule of dialect {' and '.join(self.dialects)}; this kernel speaks {host.dialect}"
        return host.lacks.get(self.needs, "")

    def not_shown(self, host: Host) -> str:
        """Why the rule cannot be shown on a host, though it may hold there; an empty text if it can."""
        return f"this emulated CPU's fault: {self.fault.value[1]}" if self.fault in host.faults and self.fault else ""


@dataclass(frozen=True, slots=True)
class Rules:
    """All rules by number, in the file's order, and the titles of their groups by id."""

    groups: Mapping[str, str]
    rules: Mapping[str, Rule]


def read_rules(path: Path) -> Rules:
    """The rules of a file.

    :raise RulesError: it is malformed, or a number is given twice.
    :raise OSError: it cannot be read.
    """
    try:
        groups = tomllib.loads(path.read_text())["groups"]
        titles: dict[str, str] = {}
        rules: dict[str, Rule] = {}
        for group in groups:
            titles[group["id"]] = group["title"]
            for number, entry in group["rules"].items():
                if number in rules:
                    raise RulesError(f"{number} is given twice")
                rules[number] = _rule(number, group["id"], {"text": entry} if isinstance(entry, str) else entry)
    except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError) as error:
        raise RulesError(f"{path}: not a list of groups, each with id, title and rules: {error!r}") from None
    except RulesError as error:
        raise RulesError(f"{path}: {error}") from None
    return Rules(titles, rules)


def _rule(number: str, group: str, entry: Mapping[str, Any]) -> Rule:
    if not _NUMBER.fullmatch(number):
        raise RulesError(f"{number!r} is no rule's number: a section, a dot, a count")
    if unknown := set(entry) - {"text", "dialects", "needs", "fault"}:
        raise RulesError(f"{number}: there is no {', '.join(sorted(unknown))}")
    dialects, needs, fault = tuple(entry.get("dialects", ())), entry.get("needs", ""), entry.get("fault")
    if not set(dialects) <= set(DIALECTS):
        raise RulesError(f"{number}: dialects are {', '.join(DIALECTS)}, not {', '.join(dialects)}")
    if needs and needs not in PROPERTIES:
        raise RulesError(f"{number}: no property of a host is called {needs!r}: {', '.join(PROPERTIES)}")
    if fault and fault not in Fault.__members__:
        raise RulesError(f"{number}: no fault is called {fault!r}: {', '.join(Fault.__members__)}")
    return Rule(number, group, entry["text"], dialects, needs, Fault[fault] if fault else None)
