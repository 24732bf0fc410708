# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a lab host is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

DEADLINE = 7200.0


@dataclass(frozen=True)
class LabHost:
    """A host of the lab."""

    name: str
    kind: Literal["ssh", "box"]
    address: str = ""
    ssh_config: Path | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    deadline: float = DEADLINE
