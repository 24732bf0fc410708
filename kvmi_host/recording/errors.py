# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can go wrong with a recording. The root of the tree is drawn in :mod:`kvmi_host.protocol.errors`.

::

    RecordingError
    +-- RecordingFailed     the file cannot be made or written to
    +-- BadRecording        the file is no recording, or is damaged
        +-- EndsEarly       all that is there is good, and there should be more: who wrote it was killed
"""

from kvmi_host.protocol import KvmiError


class RecordingError(KvmiError):
    """A recording cannot be written or read."""


class RecordingFailed(RecordingError):
    """The file cannot be made or written to."""


class BadRecording(RecordingError):
    """The file is no recording, or is damaged: what came before is good."""


class EndsEarly(BadRecording):
    """The recording was cut off: what came before is good."""
