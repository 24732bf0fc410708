# SPDX-License-Identifier: LGPL-2.1-or-later
"""The same exchanges with the simulated kernel and with the live kernel part, which must agree.

``steps`` has what an introspector and a guest do in an exchange, and carries it out on either side; ``sides`` the two;
``scripts`` the exchanges: written ones, and those that a seed draws. The simulated side goes first, because it tells
when nothing more comes; then the live one has to come to the same::

    for name, script in written(scratch).items():
        assert disagreement(script, simulated, live) is None

What may differ is not looked at: values, addresses, and the order of different vCPUs. What must not: answers and their
sizes, error codes, which events come and how large, their numbers, what ends the session.
"""

from kvmi_host.testing.differential.scripts import Script, disagreement, drawn, written
from kvmi_host.testing.differential.sides import LiveSide, Side, SimulatedSide

__all__ = ["LiveSide", "Script", "Side", "SimulatedSide", "disagreement", "drawn", "written"]
