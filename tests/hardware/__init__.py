# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hardware suite, as the package ``kvmi_host.hwtest``: ``pytest --pyargs kvmi_host.hwtest``."""
