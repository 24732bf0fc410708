# SPDX-License-Identifier: LGPL-2.1-or-later
"""The log: one JSON object a line, and not too many of them."""

import json
import logging
from contextvars import copy_context

from kvmi_host.agent import logs


def line(level=logging.INFO, message="hello %s", arguments=("you",), **more):
    record = logging.LogRecord("a.logger", level, "a.py", 5, message, arguments, None)
    record.created = 1.5
    record.__dict__.update(more)
    return json.loads(logs.JsonLines().format(record))


def test_a_line_says_when_how_bad_who_and_what():
    assert line() == {
        "time": "1970-01-01T00:00:01.500000+00:00",
        "level": "info",
        "logger": "a.logger",
        "message": "hello you",
    }


def test_what_the_caller_adds_is_in_it():
    assert line(rip=5)["rip"] == 5


def test_what_json_does_not_have_is_text():
    assert line(where=ValueError("x"))["where"] == "x"


def test_a_line_stays_one_line():
    record = logging.makeLogRecord({"msg": "a\nb"})
    assert "\n" not in logs.JsonLines().format(record)


def test_the_vm_that_is_served_is_in_it():
    context = copy_context()
    context.run(logs.VM.set, "webserver")
    assert context.run(line)["vm"] == "webserver"


def test_an_exception_is_in_it():
    try:
        raise LookupError("a bug")
    except LookupError as error:
        record = logging.LogRecord("a", logging.ERROR, "a.py", 1, "failed", (), (type(error), error, None))
    assert "LookupError: a bug" in json.loads(logs.JsonLines().format(record))["exception"]


def warning(second, place=1):
    record = logging.LogRecord("a", logging.WARNING, "a.py", place, "again", (), None)
    record.created = second
    return record


def test_of_one_warning_only_so_many_a_second_are_logged():
    restraint = logs.Restraint()
    assert [restraint.filter(warning(0.0)) for _ in range(25)] == [True] * 20 + [False] * 5


def test_the_next_second_says_how_many_were_not():
    restraint = logs.Restraint()
    for _ in range(25):
        restraint.filter(warning(0.0))
    later = warning(1.0)
    assert restraint.filter(later)
    assert later.not_logged_before == 5


def test_other_places_are_not_restrained_by_it():
    restraint = logs.Restraint()
    for _ in range(25):
        restraint.filter(warning(0.0))
    assert restraint.filter(warning(0.0, place=2))


def test_what_is_no_warning_is_always_logged():
    restraint = logs.Restraint()
    info = logging.LogRecord("a", logging.INFO, "a.py", 1, "event", (), None)
    assert all(restraint.filter(info) for _ in range(100))
