# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is made of something else in docs/ is what that makes now: the protocol reference and the drawings."""

from __future__ import annotations

import runpy
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kvmi_host.protocol import Command, EventId, Request, messages
from kvmi_host.protocol.events import OWN
from kvmi_host.protocol.x86 import Registers
from kvmi_host.testing.rules import read_rules

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
DRAWINGS = sorted((DOCS / "drawings").glob("*.toml"))
PROTOCOL = runpy.run_path(str(DOCS / "make/protocol.py"))
DRAWN = runpy.run_path(str(DOCS / "make/drawings.py"))["drawn"]
PAGE = (DOCS / "protocol.md").read_text()

VCPU_HEADER = 8
SIZES = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "s32": 4, "kvm_regs": 144}

REQUESTS: list[Request[object]] = [
    messages.check_command(2),
    messages.check_event(1),
    messages.pause_vcpu(0),
    messages.control_vm_events(0, True),
    messages.control_events(0, 1, True),
    messages.control_cr(0, 3, True),
    messages.control_msr(0, 1, True),
    messages.control_cmd_response(True, True),
    messages.set_registers(0, Registers._make(range(18))),
    messages.cpuid(0, 1),
    messages.inject_exception(0, 3),
    messages.mtrr_type(0),
    messages.read_physical(0, 1),
    messages.guest_info(),
    messages.vcpu_info(0),
    messages.xsave(0),
    messages.max_gfn(),
]


def size_of(names: str) -> int:
    """How long a payload is, to the end of its last field that is not padding."""
    end = 0
    for name in names.split():
        if name == "vcpu_hdr":
            end += VCPU_HEADER
        elif name in SIZES:
            end += SIZES[name]
        elif fields := PROTOCOL["structures"]()[name]:
            offset, kind, _ = fields[-1]
            end += offset + SIZES[kind]
    return end


def test_the_protocol_reference_is_current() -> None:
    assert PROTOCOL["page"]() == PAGE, "python docs/make/protocol.py > docs/protocol.md"


@pytest.mark.parametrize("source", DRAWINGS, ids=lambda path: path.stem)
def test_a_drawing_is_current(source: Path) -> None:
    made = DRAWN(tomllib.loads(source.read_text()))
    assert made == (DOCS / f"{source.stem}.svg").read_text(), "python docs/make/drawings.py"


def test_every_drawing_has_a_source() -> None:
    assert [path.stem for path in sorted(DOCS.glob("*.svg"))] == [path.stem for path in DRAWINGS]


@pytest.mark.parametrize("source", DRAWINGS, ids=lambda path: path.stem)
def test_nothing_is_drawn_outside_of_the_paper(source: Path) -> None:
    svg = ElementTree.fromstring((DOCS / f"{source.stem}.svg").read_text())
    *_, width, height = map(int, svg.attrib["viewBox"].split())
    texts = svg.findall("{http://www.w3.org/2000/svg}text")
    lines = [path.attrib["d"] for path in svg.findall("{http://www.w3.org/2000/svg}path")]
    points = [(int(text.attrib["x"]), int(text.attrib["y"])) for text in texts]
    points += [tuple(map(int, point[1:].split(","))) for line in lines for point in line.split()]
    assert texts
    assert all(0 < x < width and 0 < y < height for x, y in points)


@pytest.mark.parametrize("number", read_rules(ROOT / "tests/hardware/rules.toml").rules)
def test_every_rule_is_in_the_reference_once(number: str) -> None:
    assert PAGE.count(f'<a id="rule-{number}"></a>') == 1


@pytest.mark.parametrize("command", [command for command in Command if command > Command.EVENT])
def test_every_command_is_in_the_reference(command: Command) -> None:
    name = command.name.lower().replace("_", "-")
    assert f"| {command:d} | `{name}` |" in PAGE or f"`{name}` ({command:d})" in PAGE


@pytest.mark.parametrize("asked", REQUESTS, ids=lambda request: str(request.command))
def test_the_layouts_of_the_headers_are_what_the_library_sends(asked: Request[object]) -> None:
    takes, _ = PROTOCOL["COMMANDS"][asked.command]
    assert 0 <= len(asked.payload) - size_of(takes) < VCPU_HEADER


@pytest.mark.parametrize("event", OWN)
def test_the_layouts_of_the_headers_are_what_the_library_reads(event: EventId) -> None:
    layout = OWN[event]
    ours = PROTOCOL["packed"](layout.struct.format, layout.type._fields)
    kernels = PROTOCOL["structures"]()[f"event_{event.name.lower()}"]
    assert [field[:2] for field in ours] == [field[:2] for field in kernels]
