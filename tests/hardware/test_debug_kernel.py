# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel that checks itself does: what the other tests take from its silence is worth nothing otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmi_host.host import debug_kernel

pytestmark = [pytest.mark.hardware, pytest.mark.debug_kernel]


@pytest.mark.parametrize("check", [debug_kernel.KMEMLEAK, debug_kernel.LOCKDEP], ids=lambda check: check.name)
def test_the_kernel_has_the_check(check: Path) -> None:
    assert check.exists()
