# SPDX-License-Identifier: LGPL-2.1-or-later
"""How fast the introspector is, against the least that a program in C has to do in its place.

Both sit at the same peer, a program in C that plays the kernel's end (peer.c), in turns: each run of ours is compared
with the C client's run before it, on the same CPUs. Times are those of the fastest tenth of many short slices, because
a shared machine gives others a turn in between. The ratios are added to build/bench.json.

On one CPU a round trip is two switches between two processes, and the work: that is what the limits are for. On two it
is for the greater part the time in which an idle CPU wakes up.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DEADLINE = 120.0
VMS = 64
IDLE = 256
MEMORY = 256 << 20

Argv = list[str]


@dataclass(frozen=True)
class Bench:
    """The compiled programs, and where their runs take place.

    :ivar cpus: the peer's, and the seat's.
    """

    peer: Path
    client: Path
    cpus: tuple[int, int]

    def round_us(self, seat: Argv, seconds: float) -> float:
        """Microseconds of an event's round trip."""
        return float(self._events(seat, 1, seconds)["round_us"])

    def many(self, seat: Argv, seconds: float) -> tuple[float, float]:
        """Events a second of VMS VMs together, and those of the slowest to those of the fastest."""
        measured = self._events(seat, VMS, seconds)
        return 1e6 / measured["round_us"], min(measured["rounds"]) / max(measured["rounds"])

    def chunk_us(self, seat: Argv) -> float:
        """Microseconds in which 1 MiB of guest memory is read."""
        with connections(1) as (peers, seats):
            peer = self._start([str(self.peer), "memory"], peers, 0)
            client = self._start(seat, seats, 1, str(MEMORY))
        measured = finish(client)
        finish(peer)
        return float(measured["chunk_us"])

    def _events(self, seat: Argv, vms: int, seconds: float) -> dict:
        with connections(vms) as (peers, seats):
            how = "watched" if seat[-1] == "loop" else "events"
            peer = self._start([str(self.peer), how, str(seconds)], peers, 0)
            client = self._start(seat, seats, 1)
        measured = finish(peer)
        finish(client)
        return measured

    def _start(self, argv: Argv, descriptors: list[int], place: int, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*argv, *map(str, descriptors), *more],
            pass_fds=descriptors,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {self.cpus[place]}),
        )


@contextmanager
def connections(count: int) -> Iterator[tuple[list[int], list[int]]]:
    """The descriptors of both ends of so many connections, as long as the block runs."""
    with ExitStack() as stack:
        pairs = [tuple(stack.enter_context(end) for end in socket.socketpair()) for _ in range(count)]
        yield [one.fileno() for one, _ in pairs], [other.fileno() for _, other in pairs]


def finish(process: subprocess.Popen[str]) -> dict:
    """What a program printed; empty if nothing. Exits if it failed."""
    try:
        output, _ = process.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        sys.exit(f"speed: {process.args} did not end in {DEADLINE} s")
    if process.returncode:
        sys.exit(f"speed: {process.args} failed ({process.returncode}): what it said is above")
    return json.loads(output) if output else {}


def compiled(folder: Path, name: str) -> Path:
    """A C program of this folder."""
    headers = [f"-I{ROOT}/kernel/src/include/uapi", f"-I{ROOT}/kernel/src/arch/x86/include/uapi"]
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-pthread", *headers]
    subprocess.run(["cc", *flags, "-o", folder / name, HERE / f"{name}.c"], check=True)
    return folder / name


class Figures:
    """Ratios with their least, middle and greatest value, and other figures beside them."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.tables: list[Table] = []

    def begin(self, title: str) -> None:
        """A table of its own for what follows."""
        self.tables.append(Table("", "min", "median", "max", "limit", "median figures", title=title, min_width=100))

    def ratio(self, name: str, label: str, ratios: list[float], limit: str, **beside: list[float]) -> None:
        """
        :param beside: what the ratios were made of; the name ends in the unit.
        """
        of = {"min": min(ratios), "median": median(ratios), "max": max(ratios)}
        self.values[f"{name}_ratio"] = round(of["median"], 3)
        self.values |= {f"{name}_ratio_{which}": round(value, 3) for which, value in of.items()}
        middles = {figure: round(median(values), 2) for figure, values in beside.items()}
        self.values |= {f"{name}_{figure}": value for figure, value in middles.items()}
        shown = ", ".join(f"{figure} {value:,}" for figure, value in middles.items())
        self.tables[-1].add_row(label, *(f"{value:.2f}" for value in of.values()), limit, shown)

    def figure(self, name: str, label: str, value: float, limit: str) -> None:
        """A figure that is no ratio."""
        self.values[name] = value
        self.tables[-1].add_row(label, "", "", "", limit, f"{value:,}")


def neighbours(rounds: int, c: Callable[[], float], ours: Callable[[], float]) -> tuple[list[float], list[float]]:
    """Runs in turns; what came of C's and of ours."""
    runs = [(c(), ours()) for _ in range(rounds)]
    return [run[0] for run in runs], [run[1] for run in runs]


def compare_events(figures: Figures, bench: Bench, where: str, rounds: int, seconds: float) -> None:
    """Round trips of one VM."""
    for name, kind, label, limit in (
        ("event", "events", "an event's round trip", "1.35"),
        ("event_loop", "loop", "... in a VM's loop", "1.35"),
        ("event_registers", "registers", "... rip and cr3 read, too", "1.6"),
        ("event_asyncio", "asyncio", "... with asyncio, on_event", "3"),
        ("event_awaited", "awaited", "... with asyncio, next_event", ""),
    ):
        client, ours = neighbours(
            rounds,
            partial(bench.round_us, [str(bench.client), "events"], seconds),
            partial(bench.round_us, seat(kind), seconds),
        )
        ratios = [one / other for one, other in zip(ours, client, strict=True)]
        figures.ratio(name + where, label, ratios, f"<= {limit}" if limit else "", us=ours, c_us=client)


def compare_memory(figures: Figures, bench: Bench, where: str, rounds: int) -> None:
    """Reading guest memory."""
    client, ours = neighbours(
        rounds,
        lambda: 1e6 / bench.chunk_us([str(bench.client), "memory"]),
        lambda: 1e6 / bench.chunk_us(seat("memory")),
    )
    ratios = [one / other for one, other in zip(ours, client, strict=True)]
    label = f"{MEMORY >> 20} MiB of memory read"
    figures.ratio(f"memory{where}", label, ratios, ">= 0.8", mib_per_s=ours, c_mib_per_s=client)


def compare_vms(figures: Figures, bench: Bench, where: str, rounds: int, seconds: float) -> None:
    """One VM and many, in one process."""
    runs = []
    for _ in range(rounds):
        one = 1e6 / bench.round_us(seat("asyncio"), seconds)
        runs.append((one, *bench.many(seat("asyncio"), 2 * seconds)))
    figures.ratio(
        f"vms_throughput{where}",
        f"events of {VMS} VMs to those of one",
        [many / one for one, many, _ in runs],
        ">= 0.8",
        per_s=[many for _, many, _ in runs],
        one_per_s=[one for one, _, _ in runs],
    )
    fairness = [fair for _, _, fair in runs]
    figures.ratio(f"vms_fairness{where}", "... the slowest VM to the fastest", fairness, ">= 0.5")


def seat(*arguments: str) -> Argv:
    """Our introspector, see seat.py."""
    return [sys.executable, str(HERE / "seat.py"), *arguments]


def main(
    report: Annotated[Path, typer.Option(help="The figures are added to it.")] = Path("build/bench.json"),
    rounds: Annotated[int, typer.Option(help="How many runs of each kind.")] = 7,
    seconds: Annotated[float, typer.Option(help="How long a run of events is.")] = 0.4,
) -> None:
    """Compare the introspector with a minimal one in C, and one VM with many."""
    cpus = sorted(os.sched_getaffinity(0))
    figures, say = Figures(), Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="kvmi-host-bench-") as name:
        peer, client = (compiled(Path(name), program) for program in ("peer", "client"))
        places = {"": ("on one CPU", cpus[0])} | ({"_two_cpus": ("on two CPUs", cpus[1])} if len(cpus) > 1 else {})
        for where, (title, second) in places.items():
            say.print(f"measuring {title} ...")
            figures.begin(title)
            bench = Bench(peer, client, (cpus[0], second))
            compare_events(figures, bench, where, rounds, seconds)
            compare_memory(figures, bench, where, rounds)
            compare_vms(figures, bench, where, rounds, seconds)
    idle = finish(subprocess.Popen(seat("idle", str(IDLE)), stdout=subprocess.PIPE, text=True))
    figures.begin(f"of {IDLE} sessions")
    for kind in ("blocking", "asyncio"):
        limit = f"< {64 << 10:,}"
        figures.figure(f"session_{kind}_bytes", f"bytes for one that is idle, {kind}", idle[f"{kind}_bytes"], limit)
    for table in figures.tables:
        Console().print(table)
    report.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(report.read_text()) if report.exists() else {}
    report.write_text(json.dumps(before | figures.values, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
