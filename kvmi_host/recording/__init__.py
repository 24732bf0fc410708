# SPDX-License-Identifier: LGPL-2.1-or-later
"""Recordings of sessions: what crossed the socket, as a pcapng file, which Wireshark and its kin open."""

from pathlib import Path

from kvmi_host.recording.errors import BadRecording, EndsEarly, RecordingError, RecordingFailed
from kvmi_host.recording.pcapng import FIRST_BYTE
from kvmi_host.recording.reader import Message, Note, read_recording
from kvmi_host.recording.recorder import Recorder

DISSECTOR = Path(__file__).with_name("kvmi.lua")
"""What shows KVMI messages in Wireshark and tshark: ``-X lua_script:PATH``."""

__all__ = [
    "DISSECTOR",
    "FIRST_BYTE",
    "BadRecording",
    "EndsEarly",
    "Message",
    "Note",
    "Recorder",
    "RecordingError",
    "RecordingFailed",
    "read_recording",
]
