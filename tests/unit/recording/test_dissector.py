# SPDX-License-Identifier: LGPL-2.1-or-later
"""The numbers and names in the Wireshark dissector are those of the protocol."""

import re

import pytest

from kvmi_host.protocol import (
    Access,
    Action,
    Command,
    Descriptor,
    ErrorCode,
    EventId,
    MemoryType,
    Msrs,
    Registers,
    Segment,
    SpecialRegisters,
)
from kvmi_host.protocol.msrs import NAMES
from kvmi_host.recording import DISSECTOR

LUA = DISSECTOR.read_text()


def table(name: str) -> dict[int, str]:
    """The table of that name, ``[number] = "name"`` a line."""
    (body,) = re.findall(rf"^local {name} = {{\n(.*?)^}}", LUA, re.M | re.S)
    return {int(number, 0): word for number, word in re.findall(r"^\t\[(-?\w+)\] = \"(.*?)\",$", body, re.M)}


def strings(name: str) -> list[str]:
    (body,) = re.findall(rf"^local {name} = {{(.*?)}}", LUA, re.M | re.S)
    return re.findall(r'"(\w+)"', body)


def names(members) -> dict[int, str]:
    return {int(member): member.name.lower().replace("_", "-") for member in members}


@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("commands", Command),
        ("events", EventId),
        ("actions", Action),
        ("descriptors", Descriptor),
        ("memory_types", MemoryType),
    ],
)
def test_its_tables_are_those_of_the_protocol(name, members):
    assert table(name) == names(members)


def test_its_error_codes_are_those_of_the_protocol():
    assert table("errors") == {0: "ok"} | {int(code): code.name for code in ErrorCode}


def test_its_msrs_are_those_of_the_protocol():
    assert table("msrs") == {index: name for name, index in NAMES.items()}


def test_its_page_accesses_are_those_of_the_protocol():
    (body,) = re.findall(r"^local access = {(.*)}$", LUA, re.M)
    shown = re.findall(r'"(...)"', body)
    flags = ((Access.R, "r"), (Access.W, "w"), (Access.X, "x"))
    assert shown == ["".join(letter if number & flag else "-" for flag, letter in flags) for number in range(8)]


def test_its_registers_are_those_of_the_protocol():
    assert strings("registers") == list(Registers._fields)
    assert strings("event_msrs") == list(Msrs._fields)
    *parts, bitmap = SpecialRegisters._fields
    assert [*strings("segments"), *strings("tables"), *strings("control")] == parts
    assert f'"sregs.{bitmap}"' in LUA
    (layout,) = re.findall(r'^local segment_layout = "(.*)"$', LUA, re.M)
    assert re.findall(r"(\w+):\d", layout) == list(Segment._fields)


def test_every_word_of_a_layout_is_a_field():
    layouts = re.findall(r'^\t\[\d+\] = "([^"]*:[^"]*)",$', LUA, re.M)
    words = {word for layout in layouts for word in re.findall(r"(\w+):\d", layout)}
    defined = set(re.findall(r'"(\w+)"', LUA[LUA.index("local function define") : LUA.index("kvmi.fields = fields")]))
    assert layouts
    assert words <= defined
