# SPDX-License-Identifier: LGPL-2.1-or-later
"""The live view on a terminal: what it shows, and what its keys do."""

import json
import os
import pty
import re
import select
import signal
import termios
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, redirect_stdout
from threading import Condition, Thread
from unittest import mock

import pyte
import pytest
from typer import Exit

from kvmi_host.cli import app, live
from kvmi_host.cli.view import Situation
from kvmi_host.protocol import Command, EventId
from kvmi_host.testing.peer import next_reply

COLUMNS, LINES = 100, 40
CR3_WRITE = bytes.fromhex("0300 000000000000 0010000000000000 0020000000000000")
FACTS = {"uuid": "0", "name": "web", "version": 1, "dialect": "v6", "vcpus": 1, "commands": [], "events": []}
EVENT = {"vm": "web", "vcpu": 0, "event": "hypercall", "mode": 8, "rip": 0x1234}


class Terminal:
    """A terminal, and the person before it."""

    stdin = None  # a file that is read in its place

    def __init__(self, ours, device):
        self.device = device
        self._ours = ours
        self._screen = pyte.Screen(COLUMNS, LINES)
        self._drawn = Condition()
        self._showing = Thread(target=self._show)
        self._showing.start()

    def close(self):
        os.close(self.device)
        self._showing.join()  # it reads until nobody has the device open any more
        os.close(self._ours)

    @property
    def text(self):
        with self._drawn:
            return "\n".join(line.rstrip() for line in self._screen.display)

    def wait_for(self, pattern):
        """Look until the screen shows it."""
        with self._drawn:
            seen = self._drawn.wait_for(lambda: re.search(pattern, "\n".join(self._screen.display)), timeout=10)
            assert seen, f"{pattern!r} is not shown:\n" + "\n".join(self._screen.display)

    def press(self, keys):
        os.write(self._ours, keys)

    @contextmanager
    def in_front(self):
        """Standard input and output are this terminal."""
        with (
            open(self.stdin or os.ttyname(self.device)) as stdin,
            open(self.device, "w", closefd=False) as stdout,
            mock.patch("sys.stdin", stdin),
            redirect_stdout(stdout),
        ):
            yield

    def run(self, *arguments, while_it_runs, on_failure=lambda: None):
        """Run ``kvmi-host`` on it while someone does this and that; its exit status."""

        def person():
            try:
                while_it_runs()
            except BaseException:
                on_failure()
                raise

        with ThreadPoolExecutor(1) as pool, self.in_front():
            acting = pool.submit(person)
            try:
                status = app(arguments, standalone_mode=False) or 0
            except Exit as error:
                status = error.exit_code
            acting.result(10)
        return status

    def _show(self):
        stream = pyte.ByteStream(self._screen)
        while True:
            try:
                data = os.read(self._ours, 65536)
            except OSError:
                return
            with self._drawn:
                stream.feed(data)
                self._drawn.notify_all()


@pytest.fixture
def terminal(monkeypatch):
    ours, device = pty.openpty()
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    monkeypatch.setenv("LINES", str(LINES))
    monkeypatch.setenv("TERM", "xterm-256color")
    with closing(Terminal(ours, device)) as shown:
        yield shown


@pytest.fixture
def attached(terminal, kernel):
    """Runs ``attach`` on the terminal."""

    def run(*arguments, while_it_runs):
        def give_up():
            kernel.end("the person before the terminal gave up")

        return terminal.run("attach", "webserver", *arguments, while_it_runs=while_it_runs, on_failure=give_up)

    return run


def fire(kernel, event, vcpu=0, own=b"", **settings):
    """An event, and its reply."""
    return next_reply(kernel.fire(event, vcpu, own, **settings))


def test_it_shows_the_session_the_kinds_their_rate_and_the_last_events(terminal, kernel, attached):
    def act():
        terminal.wait_for("running 00:0")
        fire(kernel, EventId.CR, 1, CR3_WRITE, mode=4)
        for _ in range(3):
            fire(kernel, EventId.HYPERCALL)
        terminal.wait_for(r"hypercall +3 +\d+\.\d/s █+")
        shown = terminal.text
        assert re.search(r"^webserver +2 vCPUs .* running 00:0\d$", shown, re.M)
        assert re.search(r"^[▁-█]{60} 4 events, \d+/s, peak \d/s$", shown, re.M)
        assert re.search(r"^ +1 +1 +cr +4 +0x0000000000000000 +cr3 0x1000 -> 0x2000$", shown, re.M)
        assert re.search(r"^ +4 +0 +hypercall +8 +0x0000000000000000$", shown, re.M)
        assert re.search(r"^ space +pause +q +quit$", shown, re.M)
        terminal.press(b"q")

    assert attached(while_it_runs=act) == 0


def test_q_leaves_with_the_summary_and_the_terminal_as_it_was(terminal, kernel, attached):
    before = termios.tcgetattr(terminal.device)
    during = []

    def act():
        terminal.wait_for("running")
        during.append(termios.tcgetattr(terminal.device))
        terminal.press(b"q")
        terminal.wait_for("ended: quit")

    attached(while_it_runs=act)
    assert not during[0][3] & (termios.ECHO | termios.ICANON)
    assert during[0][3] & termios.ISIG
    assert termios.tcgetattr(terminal.device) == before
    assert kernel.wait_ended() == "the introspector closed"


def test_a_stopped_agent_would_stop_the_guest_so_ctrl_z_does_nothing(terminal, attached):
    def act():
        terminal.wait_for("running")
        assert termios.tcgetattr(terminal.device)[6][termios.VSUSP] == b"\0"
        terminal.press(b"\x1aq")

    assert attached(while_it_runs=act) == 0


def test_a_signal_leaves_the_terminal_as_it_was(terminal, attached):
    before = termios.tcgetattr(terminal.device)

    def act():
        terminal.wait_for("running")
        os.kill(os.getpid(), signal.SIGTERM)
        terminal.wait_for("ended: SIGTERM")

    attached(while_it_runs=act)
    assert termios.tcgetattr(terminal.device) == before


def test_an_error_leaves_the_terminal_as_it_was(terminal, kernel, attached):
    before = termios.tcgetattr(terminal.device)

    def act():
        terminal.wait_for("running")
        kernel.send_raw(b"\1\0\xff\xff\0\0\0\0")

    assert attached(while_it_runs=act) == 1
    assert termios.tcgetattr(terminal.device) == before


def test_the_end_of_the_vm_leaves_the_terminal_as_it_was(terminal, kernel, attached):
    before = termios.tcgetattr(terminal.device)

    def act():
        terminal.wait_for("running")
        kernel.end("the VM died")

    attached(while_it_runs=act)
    assert termios.tcgetattr(terminal.device) == before


@pytest.mark.parametrize("key", [b" ", b"p"])
def test_space_and_p_pause_every_vcpu_and_let_it_go(terminal, kernel, attached, key):
    def act():
        terminal.wait_for("running")
        terminal.press(key)
        terminal.wait_for(r"2 of 2 held, vCPU 0 at 0x0 .* paused")
        assert all(vcpu.waiting for vcpu in kernel._vcpus)
        terminal.press(key)
        terminal.wait_for(" running ")
        fire(kernel, EventId.HYPERCALL, 1)
        terminal.press(b"q")

    attached(while_it_runs=act)


def test_other_events_are_answered_while_a_vcpu_is_held(terminal, kernel, attached):
    kernel._vcpus[1].started = False

    def act():
        terminal.wait_for("running")
        terminal.press(b"p")
        terminal.wait_for("1 of 2 held")
        assert fire(kernel, EventId.CREATE_VCPU, 1) is not None
        terminal.press(b"q")

    attached(while_it_runs=act)


def test_s_steps_the_vcpu_that_tab_chose(terminal, kernel, attached):
    def act():
        terminal.wait_for("running")
        terminal.press(b"p")
        terminal.wait_for("step vCPU 0")
        terminal.wait_for("2 of 2 held")
        terminal.press(b"\t")
        terminal.wait_for("step vCPU 1")
        terminal.press(b"s")
        kernel.await_running(1)
        assert kernel.enabled(EventId.SINGLESTEP, 1)
        assert kernel.waiting_for(0) == EventId.PAUSE_VCPU
        kernel.fire(EventId.SINGLESTEP, 1)
        terminal.wait_for("2 of 2 held, vCPU 1 at 0x0")
        terminal.wait_for(r"1 +singlestep")
        terminal.press(b"q")

    attached(while_it_runs=act)
    assert not kernel.enabled(EventId.SINGLESTEP, 1)


@pytest.mark.parametrize("leave", [b"q", b"\x03"])
def test_who_leaves_a_paused_vm_leaves_it_running(terminal, kernel, attached, leave):
    def act():
        terminal.wait_for("running")
        terminal.press(b"p")
        terminal.wait_for("2 of 2 held")
        if leave == b"\x03":
            os.kill(os.getpid(), signal.SIGINT)
        else:
            terminal.press(leave)
        terminal.wait_for("ended: ")

    attached(while_it_runs=act)
    assert not any(kernel.waiting_for(vcpu) for vcpu in (0, 1))


def test_keys_of_what_the_session_may_not_do_are_not_offered(terminal, kernel, attached):
    kernel._events = kernel._events - {EventId.PAUSE_VCPU}

    def act():
        terminal.wait_for("q +quit")
        assert "pause" not in terminal.text.splitlines()[-1]
        terminal.press(b"p")
        terminal.press(b"q")
        terminal.wait_for("ended: quit")

    attached(while_it_runs=act)


def test_a_refusal_is_told_and_the_view_goes_on(terminal, kernel, attached):
    def act():
        terminal.wait_for("running")
        kernel._commands = kernel._commands - {Command.PAUSE_VCPU}
        terminal.press(b"p")
        terminal.wait_for("pause-vcpu: -EPERM")
        terminal.wait_for(" running ")
        terminal.press(b"q")

    attached(while_it_runs=act)


@pytest.mark.parametrize(("columns", "lines"), [(20, 5), (300, 100)])
def test_any_size_of_terminal_will_do(terminal, attached, monkeypatch, columns, lines, kernel):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", str(lines))

    def act():
        terminal.wait_for("may see")
        fire(kernel, EventId.CR, 1, CR3_WRITE)
        terminal.press(b"q")
        terminal.wait_for("ended: quit")

    assert attached(while_it_runs=act) == 0


def test_without_a_keyboard_it_shows_all_the_same(terminal, kernel, attached, monkeypatch):
    monkeypatch.setattr(Terminal, "stdin", os.devnull)

    def act():
        terminal.wait_for("running")
        fire(kernel, EventId.HYPERCALL)
        terminal.wait_for("ended: count")

    assert attached("--count", "1", while_it_runs=act) == 0


@pytest.fixture
def clock(monkeypatch):
    """The time that the view goes by, in seconds; a drawing takes as long as ``cost`` says."""

    class Clock:
        now, cost, drawings = 0.0, 0.0, 0

    def draw(view):
        Clock.drawings += 1
        Clock.now += Clock.cost

    monkeypatch.setattr(live, "monotonic", lambda: Clock.now)
    monkeypatch.setattr(live.LiveView, "_draw", draw)
    return Clock


@pytest.fixture
def view(terminal):
    with terminal.in_front():
        shown = live.LiveView()
        shown.session(FACTS | {"method": "vm-fd"})
        yield shown
        shown.close()


def pass_ten_seconds(view, clock, events):
    while clock.now < 10:
        if events:
            view.event(EVENT | {"seq": 1, "time_ns": 1})
        view.poll(lambda: Situation("running"))
        clock.now += 1 / 1024


@pytest.mark.parametrize("events", [True, False])
def test_it_is_drawn_eight_times_a_second_however_many_events_come(view, clock, events):
    pass_ten_seconds(view, clock, events)
    assert clock.drawings == 80


def test_while_events_come_drawing_takes_no_more_than_a_tenth_of_the_time(view, clock):
    clock.cost = 0.1
    pass_ten_seconds(view, clock, True)
    assert clock.drawings == 10


def test_while_none_come_it_is_drawn_however_long_that_takes(view, clock):
    clock.cost = 0.5
    pass_ten_seconds(view, clock, False)
    assert clock.drawings > 10


def test_keys_do_not_wait_until_it_is_drawn(view, clock, terminal):
    clock.cost = 1.0
    view.event(EVENT | {"seq": 1, "time_ns": 1})
    view.poll(lambda: Situation("running"))
    terminal.press(b"p")
    assert select.select([terminal.device], [], [], 10)[0]
    clock.now += 0.1
    view.event(EVENT | {"seq": 2, "time_ns": 1})
    assert view.poll(lambda: Situation("running")) == "p"


RECORDED = [
    {"session": FACTS | {"method": "vm-fd"}},
    *(EVENT | {"seq": seq, "time_ns": seq * 3_600_000_000_000} for seq in (1, 2, 3)),
]


def test_a_replay_can_be_paused_stepped_and_left(terminal, tmp_path):
    path = tmp_path / "r"
    path.write_text("\n".join(map(json.dumps, RECORDED)))
    before = termios.tcgetattr(terminal.device)

    def act():
        terminal.wait_for(r"1 events,.*")
        terminal.wait_for(" replay ")
        terminal.press(b" ")
        terminal.wait_for(" paused ")
        terminal.press(b"s")
        terminal.wait_for("2 events,")
        terminal.press(b"q")

    terminal.run("replay", str(path), "--speed", "1", while_it_runs=act)
    assert termios.tcgetattr(terminal.device) == before


def test_a_replay_on_a_terminal_ends_with_the_last_picture(terminal, tmp_path):
    path = tmp_path / "r"
    summary = {"events": 3, "by_kind": {}, "modes": {}, "seq_gaps": 0, "seq_repeated": 0, "ended": "count"}
    summary |= {"seconds": 1, "events_per_second": 3, "round_trip": {"samples": 0}}
    path.write_text("\n".join(map(json.dumps, [*RECORDED, {"summary": summary}])))
    terminal.run("replay", str(path), while_it_runs=lambda: terminal.wait_for("ended: count"))
    terminal.wait_for(r"3 events, 0/s, peak 1/s")
    assert re.search(r"3 +0 +hypercall +8 +0x0000000000001234", terminal.text)
