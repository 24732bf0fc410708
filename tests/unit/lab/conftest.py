# SPDX-License-Identifier: LGPL-2.1-or-later
"""A cache of its own for every test here."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the test's cache is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("KVMI_LAB_MODULES", raising=False)
    return tmp_path / "cache" / "kvmi-host"
