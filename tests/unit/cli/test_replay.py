# SPDX-License-Identifier: LGPL-2.1-or-later
"""``replay`` shows what ``attach --json`` printed as attach itself shows it."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from kvmi_host.cli import app

SESSION = {
    "session": {
        "uuid": "00000000-0000-0000-0000-000000000001",
        "name": "web",
        "version": 1,
        "dialect": "v6",
        "vcpus": 2,
        "commands": ["get-version"],
        "events": ["cr"],
        "method": "vm-fd",
    }
}
EVENT = {"vm": "web", "vcpu": 1, "seq": 7, "event": "cr", "mode": 8, "rip": 0x1000, "time_ns": 1}
CR = EVENT | {"cr": 3, "old": 0x2000, "new": 0x3000}
MSR = EVENT | {"event": "msr", "msr": 0xC0000082, "old": 1, "new": 2}
SUMMARY = {
    "summary": {
        "events": 1,
        "seconds": 2.0,
        "events_per_second": 0.5,
        "by_kind": {"cr": 1},
        "modes": {"8": 1},
        "seq_gaps": 0,
        "seq_repeated": 0,
        "round_trip": {"of": "get-version", "samples": 0},
        "ended": "count",
    }
}


def replay(path: Path, *lines: str) -> tuple[int, str]:
    path.write_text("\n".join(lines))
    result = CliRunner().invoke(app, ["replay", str(path)])
    return result.exit_code, result.output


def test_a_session_is_shown_as_attach_shows_it(tmp_path: Path) -> None:
    status, output = replay(tmp_path / "r", *map(json.dumps, (SESSION, CR, MSR, SUMMARY)))
    assert status == 0
    assert "web  uuid 00000000-0000-0000-0000-000000000001  2 vCPUs" in output
    assert "7    1 cr              8 0x0000000000001000 cr3 0x2000 -> 0x3000" in output
    assert "lstar 0x1 -> 0x2" in output
    assert "modes seen: 8 (1)" in output


def test_a_line_that_attach_does_not_print_is_named(tmp_path: Path) -> None:
    for line in ("{", "[]", "1", '{"seq": 1}', '{"session": {}}'):
        status, output = replay(tmp_path / "r", json.dumps(SESSION), line)
        assert status == 1
        assert "line 2 of" in output
