# SPDX-License-Identifier: LGPL-2.1-or-later
"""The agent: a daemon that introspects every VM which announces itself, with handlers that plugins bring."""
