# SPDX-License-Identifier: LGPL-2.1-or-later
"""What keeps the agent from starting, or from taking over a new configuration."""

from kvmi_host.protocol import KvmiError


class ConfigError(KvmiError):
    """The configuration cannot be used: change the file. Says which key, what is there, and what may be."""
