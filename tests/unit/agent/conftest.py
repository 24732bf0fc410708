# SPDX-License-Identifier: LGPL-2.1-or-later
"""Plugins that are installed for a test."""

import pytest


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Makes a distribution with one plugin, from the source of its module."""

    def make(name, source):
        site = tmp_path / "site"
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[kvmi_host.handlers]\n{name} = {name}_plugin:plugin\n")
        (site / f"{name}_plugin.py").write_text(source)
        monkeypatch.syspath_prepend(str(site))

    return make
