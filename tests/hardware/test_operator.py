# SPDX-License-Identifier: LGPL-2.1-or-later
"""An operator's day, by the command line alone."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from kvmi_host.testing.live import DEADLINE, SharedGuests

pytestmark = [pytest.mark.hardware, pytest.mark.libvirt, pytest.mark.services]

SCRIPT = Path(__file__).with_name("operator.sh")


def test_an_operators_script_works_and_leaves_no_trace(shared: SharedGuests, capfd: pytest.CaptureFixture[str]) -> None:
    shared.stand_aside()
    environment = {**os.environ, "OPERATOR_DEADLINE": str(int(4 * DEADLINE))}
    with capfd.disabled():  # what it says is for the report, well or not
        result = subprocess.run(["bash", str(SCRIPT)], env=environment, timeout=15 * DEADLINE, check=False)
    assert result.returncode == 0
