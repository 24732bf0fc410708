# SPDX-License-Identifier: LGPL-2.1-or-later
"""What was kept of fuzzing is tried by every run, and the checks find what they are there for."""

from __future__ import annotations

from pathlib import Path
from struct import Struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmi_host.protocol import Event, Framer, handshake, messages
from kvmi_host.testing.parsers import CHECKS

CORPUS = Path(__file__).parents[2] / "fuzz" / "corpus"
FILES = sorted(CORPUS.glob("*/*"))
EVENT = bytes.fromhex("00 2002 0300 01 000000") + bytes(536) + bytes(24)


def test_every_check_has_a_corpus_and_no_corpus_is_without_a_check() -> None:
    assert {file.parent.name for file in FILES} == CHECKS.keys()


@pytest.mark.parametrize("check", CHECKS)
def test_what_was_kept_is_taken_well(check: str) -> None:
    for file in sorted((CORPUS / check).iterdir()):
        try:
            CHECKS[check](file.read_bytes())
        except Exception as error:
            error.add_note(f"of {file}")
            raise


@settings(deadline=None)
@given(st.sampled_from(sorted(CHECKS.keys() - {"simulated_kernel"})), st.binary(max_size=700))
def test_any_bytes_are_taken_well(check: str, data: bytes) -> None:
    CHECKS[check](data)


# -- the checks see what they look for


def test_a_framer_that_holds_more_than_a_message_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Framer, "next_frame", lambda _framer: None)
    with pytest.raises(AssertionError):
        CHECKS["framing"](bytes([90] * 4) + bytes(9000))


def test_a_stream_that_depends_on_its_pieces_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = Framer.feed
    monkeypatch.setattr(Framer, "feed", lambda framer, data: feed(framer, data[:4]))
    with pytest.raises(AssertionError):
        CHECKS["connection"](bytes([0, 0, 1, 1, 1, 1]) + bytes.fromhex("0500 0000 00000000") * 2)


def test_an_event_that_cannot_be_read_though_it_was_taken_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Event, "data", property(lambda event: Struct("<Q").unpack(b"")))
    with pytest.raises(Exception, match="unpack requires"):
        CHECKS["event"](EVENT)


def test_an_answer_whose_length_is_not_looked_at_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_require", lambda *_: None)
    with pytest.raises(Exception, match="unpack_from requires"):
        CHECKS["answer"](bytes([2, 0, 0]))


def test_a_greeting_that_reads_on_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "struct_length", lambda field: int.from_bytes(field, "little") + 1)
    with pytest.raises(AssertionError):
        CHECKS["greeting"](bytes.fromhex("60000000") + bytes(92) + b"more")
