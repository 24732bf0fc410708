# SPDX-License-Identifier: LGPL-2.1-or-later
"""The report of a night: a page for people, junit.xml for machines, and the history by which nights are compared.

It reads a night's folder, ``night.json`` and ``hosts/NAME/``, and trusts nothing that a host has left there.
"""

from __future__ import annotations

from pathlib import Path

from kvmi_host.report.errors import HistoryError, ReportError
from kvmi_host.report.merged import write_junit
from kvmi_host.report.page import page_of
from kvmi_host.report.past import NO_PAST, remember
from kvmi_host.report.results import read_results

__all__ = ["HistoryError", "ReportError", "write"]


def write(folder: Path, history: Path | None = None) -> int:
    """Write ``index.html`` and ``junit.xml`` into a night's folder.

    :param history: the file of the nights before, which the night is written to; it is made if it is not there.
    :return: 0 if the night passed, else 1.
    :raise NightError: there is no night.json, or it cannot be used.
    :raise HistoryError: the history cannot be used. Page and junit.xml are there, without it.
    :raise ReportError: they cannot be written.
    """
    results = read_results(folder)
    past = NO_PAST
    try:
        if history is not None:
            past = remember(results, history)
    finally:
        try:
            (folder / "index.html").write_text(page_of(results, past), encoding="utf-8")
            write_junit(results, folder)
        except OSError as error:
            raise ReportError(
                f"the report cannot be written to {folder}: {error.strerror}: is there room, and may you write there?"
            ) from error
    return 0 if results.passed else 1
