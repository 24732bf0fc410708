# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python3 -m kvmi_host.cli``."""

from kvmi_host.cli import main

main()
