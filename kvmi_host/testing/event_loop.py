# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that are coroutines."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any

DEADLINE = 20.0
"""Seconds that such a test may take."""


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A decorator that runs the test in an event loop of its own, and ends it at the deadline."""

    @functools.wraps(test)
    def run(*arguments: object, **fixtures: object) -> None:
        asyncio.run(asyncio.wait_for(test(*arguments, **fixtures), DEADLINE))

    return run
