# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can go wrong with the report of a night. The root of the tree is drawn in :mod:`kvmi_host.protocol.errors`.

::

    ReportError
    +-- SuiteUnreadable     a host's suite.json is not what a suite writes: the night's page says so, and goes on
    +-- HistoryError        the file of the nights before cannot be used
"""

from kvmi_host.protocol import KvmiError


class ReportError(KvmiError):
    """A night's folder cannot be read or written."""


class SuiteUnreadable(ReportError):
    """A host's suite.json is damaged, too large, or of another format."""


class HistoryError(ReportError):
    """The history is no history, is a newer one, or is busy or damaged."""
