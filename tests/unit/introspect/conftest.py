# SPDX-License-Identifier: LGPL-2.1-or-later
"""A session's rules hold with the compiled round trip and without."""

import os

import pytest

from kvmi_host.introspect import Session, async_session, roundtrip, session


@pytest.fixture(autouse=True, params=["compiled", "python"])
def form(request, monkeypatch) -> str:
    """Which form sessions have in the test."""
    if request.param == "compiled":
        built = roundtrip.RoundTrip.__module__.endswith("._roundtrip")
        assert built, "the compiled round trip is not there: python hatch_build.py builds it, with gcc and python3-dev"
    else:
        monkeypatch.setattr(Session, "reply", Session._reply)
        monkeypatch.setattr(Session, "next_event", _next_event)
        monkeypatch.setattr(async_session.AsyncSession, "reply", async_session.AsyncSession._reply)
        monkeypatch.setattr(session, "receive_pages", lambda fd, reads, milliseconds: os.readv(fd, reads.room()))
        monkeypatch.setattr(async_session, "event_in", lambda data, size: None)
    return request.param


def _next_event(session, timeout=None):
    return session._next_event(session.timeout if timeout is None else timeout)
