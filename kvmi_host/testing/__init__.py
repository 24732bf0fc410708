# SPDX-License-Identifier: LGPL-2.1-or-later
"""For tests of and with KVM introspection."""
