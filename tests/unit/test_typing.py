# SPDX-License-Identifier: LGPL-2.1-or-later
"""A user's program is checked by mypy as strictly as this package is."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import asyncio
from collections import Counter

import kvmi_host
import kvmi_host.aio
from kvmi_host import CR3, Access, Action, Breakpoint, Msr, PageWatch, WatchedEvent
from kvmi_host.protocol import CrWrite, PageFault


def look(name: str) -> Counter[int]:
    with kvmi_host.attach(name, allow="full") as vm:
        with vm.paused():
            rip: int = vm.vcpus[0].registers.rip
            data: bytes = vm.memory[0x1000:0x1010]
            print(rip, data, vm.vcpus[0].translate(rip).gpa, vm.facts.commands)
        seen: Counter[int] = Counter()
        for event in vm.events(CR3, Msr("lstar"), Breakpoint(0xFFFFFFFF81000000), duration=10):
            if isinstance(event.data, CrWrite):
                seen[event.data.new] += 1
                event.reply(new_val=event.data.old)
            else:
                event.reply(Action.RETRY, registers=event.registers._replace(rip=event.rip + 1))
        return seen


def handle(name: str) -> None:
    with kvmi_host.attach(name) as vm:

        @vm.on(PageWatch(0x1000, Access.W))
        def written(event: WatchedEvent) -> None:
            assert isinstance(event.data, PageFault)
            print(event.data.gva)

        vm.run(duration=1.5)


async def look_again(name: str) -> bytes:
    async with await kvmi_host.aio.attach(name) as vm:
        async with vm.paused():
            vcpu = (await vm.vcpus)[0]
            rip: int = (await vcpu.registers).rip
        async for event in vm.events(CR3):
            print(event.seq, event.vcpu, event.mode, rip)
        return await vcpu.memory[rip : rip + 16]


handle("webserver")
print(look("webserver"), asyncio.run(look_again("webserver")))
"""


def check(tmp_path: Path, program: str) -> str:
    file = tmp_path / "program.py"
    file.write_text(program)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), str(file)]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300).stdout


def test_a_program_that_uses_the_library_is_typed(tmp_path):
    assert check(tmp_path, PROGRAM) == "Success: no issues found in 1 source file\n"


def test_what_is_wrong_in_it_is_found(tmp_path):
    wrong = PROGRAM.replace("vm.memory[0x1000:0x1010]", 'vm.memory["text"]')
    assert 'Invalid index type "str" for "Memory"; expected type "slice' in check(tmp_path, wrong)
