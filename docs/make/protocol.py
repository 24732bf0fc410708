# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes docs/protocol.md: what crosses the socket, of the headers that the kernel part is built from, the tables that
kvmi_host.protocol reads and writes by, and the rules of the hardware suite.

    python docs/make/protocol.py > docs/protocol.md
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from struct import calcsize

from kvmi_host.protocol import handshake
from kvmi_host.protocol.dialects import DIALECTS, V6, V7, Dialect
from kvmi_host.protocol.events import OWN, Layout
from kvmi_host.protocol.framing import MAX_PAYLOAD
from kvmi_host.protocol.ids import (
    ALWAYS_ALLOWED,
    CHANGES_THE_GUEST,
    VM_EVENTS,
    Access,
    Action,
    Command,
    Descriptor,
    ErrorCode,
    EventId,
    command_name,
    event_name,
)
from kvmi_host.testing.rules import Rule, read_rules

ROOT = Path(__file__).parents[2]
HEADERS = (
    ROOT / "kernel/src/arch/x86/include/uapi/asm/kvmi.h",
    ROOT / "kernel/src/include/uapi/linux/kvmi.h",
)
KVMS = {"kvm_regs": 144, "kvm_sregs": 312, "kvm_msrs": 8}
"""The sizes of KVM's own structures; of the last, without its entries."""

COMMANDS: dict[Command, tuple[str, str]] = {
    Command.GET_VERSION: ("", "get_version_reply"),
    Command.CHECK_COMMAND: ("check", ""),
    Command.CHECK_EVENT: ("check", ""),
    Command.GET_GUEST_INFO: ("", "get_guest_info_reply"),
    Command.GET_VCPU_INFO: ("vcpu_hdr", "get_vcpu_info_reply"),
    Command.PAUSE_VCPU: ("vcpu_hdr pause_vcpu", ""),
    Command.CONTROL_VM_EVENTS: ("control_events", ""),
    Command.CONTROL_EVENTS: ("vcpu_hdr control_events", ""),
    Command.CONTROL_CR: ("vcpu_hdr control_cr", ""),
    Command.CONTROL_MSR: ("vcpu_hdr control_msr", ""),
    Command.GET_REGISTERS: ("vcpu_hdr get_registers", "get_registers_reply"),
    Command.SET_REGISTERS: ("vcpu_hdr kvm_regs", ""),
    Command.GET_CPUID: ("vcpu_hdr get_cpuid", "get_cpuid_reply"),
    Command.GET_XSAVE: ("vcpu_hdr", "kvm_xsave"),
    Command.READ_PHYSICAL: ("read_physical", "bytes"),
    Command.WRITE_PHYSICAL: ("write_physical", ""),
    Command.INJECT_EXCEPTION: ("vcpu_hdr inject_exception", ""),
    Command.GET_PAGE_ACCESS: ("get_page_access", "u8[]"),
    Command.SET_PAGE_ACCESS: ("set_page_access", ""),
    Command.GET_MTRR_TYPE: ("get_mtrr_type", "get_mtrr_type_reply"),
    Command.CONTROL_CMD_RESPONSE: ("control_cmd_response", ""),
    Command.GET_MAX_GFN: ("", "get_max_gfn_reply"),
}
"""Of each command that is served: what follows the message's header, and what follows the answer's error code."""

HELLO = ("struct_size", "uuid", "start_time", "name")
ANSWER = ("struct_size", "cookie_hash")
_OTHERS = {"kvm_regs": "`kvm_regs`", "kvm_xsave": "`kvm_xsave`", "bytes": "the bytes", "u8[]": "a byte for each page"}
_TYPES = {"H": "u16", "B": "u8", "I": "u32", "Q": "u64", "q": "s64"}

Field = tuple[int, str, str]
"""Offset, type, name."""


def structures() -> dict[str, list[Field]]:
    """Every structure of the two headers by its name without ``kvmi_``, as its fields but for padding."""
    found: dict[str, list[Field]] = {}
    text = re.sub(r"/\*.*?\*/", "", "".join(path.read_text() for path in HEADERS), flags=re.DOTALL)
    # The one structure within another is nine MSRs, which the text names.
    text = re.sub(r"struct \{[^}]*\} msrs;", "__u64 msrs[9];", text)
    for name, body in re.findall(r"^struct kvmi_(\w+) \{\n(.*?)^\};", text, re.MULTILINE | re.DOTALL):
        found[name] = list(_fields(body, found))
    return found


def _fields(body: str, known: dict[str, list[Field]]) -> Iterator[Field]:
    at = 0
    for kind, name, array in re.findall(r"^\t(?:__|struct )(\w+) (\w+)(?:\[(\d*)\])?;", body, re.MULTILINE):
        inner = kind.removeprefix("kvmi_")
        if inner in known and not array and not body.count(f"{name}[]"):
            for offset, type_, field in known[inner]:
                yield at + offset, type_, field
            continue
        size = KVMS.get(kind) or (int(kind[1:]) // 8 if inner not in known else 0)
        many = f"[{array}]" if array or f"{name}[]" in body else ""
        if not name.startswith("padding"):
            yield at, kind, name + many
        at += size * int(array or (0 if many else 1))


def named(fields: Iterable[Field]) -> str:
    """Fields in one cell of a table."""
    return "<br>".join(f"`{offset} {kind} {name}`" for offset, kind, name in fields)


def packed(form: str, names: Iterable[str]) -> list[Field]:
    """The fields of a format of :mod:`struct`."""
    fields, at, left = [], 0, iter(names)
    for count, letter in re.findall(r"(\d*)([a-zA-Z])", form):
        size = calcsize(f"<{count}{letter}")
        if letter == "s":
            fields.append((at, "u8", f"{next(left)}[{count}]"))
        elif letter != "x":
            fields += [(at + nth * calcsize(letter), _TYPES[letter], next(left)) for nth in range(int(count or 1))]
        at += size
    return fields


def page() -> str:
    """The whole text."""
    rules = read_rules(ROOT / "tests/hardware/rules.toml").rules.values()
    known = structures()

    def section(number: int) -> str:
        mine = sorted((rule for rule in rules if rule.number.startswith(f"{number}.")), key=_order)
        return "\n".join(["| | |", "|---|---|", *map(_rule, mine)])

    def payload(names: str) -> str:
        parts = []
        for name in names.split():
            if name in _OTHERS:
                parts.append(_OTHERS[name])
            elif name == "vcpu_hdr":
                parts.append("vCPU header")
            else:
                parts.append(named(known[name]))
        return "<br>".join(parts)

    def mentions(name: str) -> str:
        word = re.compile(rf"\b{name}\b")
        mine = sorted((rule for rule in rules if word.search(rule.text)), key=_order)
        return ", ".join(f"[{rule.number}](#rule-{rule.number})" for rule in mine)

    commands = [
        f"| {command:d} | `{command_name(command)}` | {_notes(command)} | {payload(takes)} | {payload(gives)} "
        f"| {mentions(command.name)} |"
        for command, (takes, gives) in COMMANDS.items()
    ]
    not_served = [
        f"`{command_name(command)}` ({command:d})"
        for command in Command
        if command not in COMMANDS and command not in (Command.EVENT, Command.EVENT_REPLY)
    ]
    events = [
        f"| {event:d} | `{event_name(event)}` | {'VM' if event in VM_EVENTS else 'vCPU'} | {_own(V6, event)} "
        f"| {named(known[reply]) if (reply := f'event_{event.name.lower()}_reply') in known else ''} "
        f"| {mentions(event.name)} |"
        for event in EventId
    ]
    sevens = [
        f"| v7 | `{event_name(event)}` | {_own(V7, event)} |" for event in EventId if _own(V7, event) != _own(V6, event)
    ]
    return f"""\
# The protocol

<!-- Made by `python docs/make/protocol.py > docs/protocol.md`, from the kernel part's headers, kvmi_host/protocol and
tests/hardware/rules.toml. Change those. -->

KVM introspection, version 1, as a host speaks it in dialect v6. One stream socket for each VM leads from the
introspector to the kernel. The introspector sends *commands*, each of which is answered; a vCPU sends *events*, and
waits until the introspector *replies*. All numbers are little-endian, and padding is zero. Field lists show offset,
type and name; what is not listed is padding.

Numbers such as [2.1](#rule-2.1) are rules: tests of the [hardware suite](hardware-suite.md) hold a host to each of
them. A rule may hold in one dialect alone, or need something of the host; it says so.

## The two ends

![The states of a session](session.svg)

{section(1)}

## Handshake

Who hands the socket over speaks first: KVM-VMI's QEMU, or `kvmi-host attach --to` in its place. The introspector
answers; then the socket is the kernel's. Either structure begins with its own size; what an older peer leaves out is
absent, what a newer one adds is passed over.

| from | bytes | fields |
|---|---|---|
| the VM's side | {handshake._HELLO.size} | {named(packed(handshake._HELLO.format, HELLO))} |
| the introspector | {handshake._ANSWER.size} | {named(packed(handshake._ANSWER.format, ANSWER))} |

{section(6)}

## Messages

Each message is a header and what its `size` announces, {MAX_PAYLOAD} bytes at most. Commands and their answers have
the command's id and the same `seq`, which the introspector chooses; an event has id {Command.EVENT:d}, and its reply
id {Command.EVENT_REPLY:d} and the event's `seq`. What is about a vCPU has a vCPU header before all else.

| | fields |
|---|---|
| header | {named(known["msg_hdr"])} |
| vCPU header | {named(known["vcpu_hdr"])} |
| error code | {named(known["error_code"])} |

Error codes are {", ".join(f"{code.name} ({code:d})" for code in ErrorCode)}.

{section(2)}

## Commands

| id | command | | payload | answer, after the error code | rules |
|---|---|---|---|---|---|
{chr(10).join(commands)}

*Always*: every session may send it, whatever its policy. *Changes the guest*: a session that observes cannot be
allowed it. Not served, -EOPNOTSUPP: {", ".join(not_served)}.

An entry of `set-page-access` is {", ".join(named(known["page_access_entry"]).split("<br>"))}. Bits of a page's
access are {", ".join(f"{bit.name} {bit:d}" for bit in (Access.R, Access.W, Access.X))}.

{section(3)}

## Events

![What passes between guest, KVM and introspector when an event is sent and replied to](event.svg)

An event begins with the common part, whose first field says how long it is; its own data follow. `mode` is the size of
an operand in bytes: 2, 4 or 8. The nine MSRs are sysenter_cs, sysenter_esp, sysenter_eip, efer, star, lstar, cstar, pat
and kernel_gs_base.

| | fields |
|---|---|
| common part | {named(known["event"])} |
| reply, after the vCPU header | {named(known["event_reply"])} |

| id | event | switched for the | own data | own data of the reply | rules |
|---|---|---|---|---|---|
{chr(10).join(events)}

Actions of a reply are {", ".join(f"{action.name} {action:d}" for action in Action)}; descriptor table registers are
{", ".join(f"{register.name} {register:d}" for register in Descriptor)}. The access of `pf` is what was tried.

{section(4)}

## The host's interface

Ioctls on the VM's descriptor: `KVM_INTROSPECTION_HOOK` takes the socket, `COMMAND` and `EVENT` say what the session
may send and see, `UNHOOK` asks the introspector to leave, `FORCE_UNHOOK` ends the session.

| structure | fields |
|---|---|
| of HOOK | {named(_ioctl("hook"))} |
| of COMMAND and EVENT | {named(_ioctl("feature"))} |

{section(5)}

## Dialects

{" ".join(_dialect(dialect) for dialect in DIALECTS.values())}

| dialect | event | own data |
|---|---|---|
{chr(10).join(sevens)}

{section(7)}
"""


def _order(rule: Rule) -> tuple[int, ...]:
    return tuple(map(int, rule.number.split(".")))


def _rule(rule: Rule) -> str:
    where = [f"dialect {' and '.join(rule.dialects)}"] if rule.dialects else []
    where += [rule.needs] if rule.needs else []
    said = f" *({'; '.join(where)})*" if where else ""
    return f'| <a id="rule-{rule.number}"></a>{rule.number} | {rule.text}{said} |'


def _notes(command: Command) -> str:
    notes = [("always", command in ALWAYS_ALLOWED), ("changes the guest", command in CHANGES_THE_GUEST)]
    return ", ".join(note for note, holds in notes if holds)


def _own(dialect: Dialect, event: EventId) -> str:
    layout: Layout | None = (dialect.event.layouts if dialect.event else OWN).get(event)
    return named(packed(layout.struct.format, layout.type._fields)) if layout else ""


def _ioctl(name: str) -> list[Field]:
    body = re.search(
        rf"^struct kvm_introspection_{name} \{{\n(.*?)^\}};", HEADERS[1].read_text(), re.MULTILINE | re.DOTALL
    )
    assert body, f"{HEADERS[1]} has no kvm_introspection_{name}"
    return list(_fields(body[1], {}))


def _dialect(dialect: Dialect) -> str:
    if dialect.event is None:
        return f"{dialect.name} numbers its messages otherwise: it is recognised, and refused."
    return f"{dialect.name} has {len(dialect.commands)} commands and {len(dialect.events)} kinds of events."


if __name__ == "__main__":
    sys.stdout.write(page())
