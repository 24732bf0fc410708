# SPDX-License-Identifier: LGPL-2.1-or-later
"""The plugin ``log``: every event of named kinds is a line in the log. Changes nothing in the guest.

Options: ``events``, names as ``kvmi-host attach --events`` takes them: ``["cr3", "msr:lstar", "hypercall"]``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from kvmi_host.agent.plugins import Setup
from kvmi_host.introspect import Interest, WatchedEvent
from kvmi_host.introspect.async_vm import AsyncVm
from kvmi_host.introspect.interests import parse
from kvmi_host.protocol import event_name

_log = logging.getLogger(__name__)


def plugin(options: Mapping[str, object]) -> Setup:
    """
    :raise ValueError: there are other options, or an event is not known.
    """
    names = options.get("events")
    if set(options) != {"events"} or not isinstance(names, list) or not names:
        raise ValueError('its one option is events, as in events = ["cr3", "hypercall"]')
    interests: list[Interest] = [interest for name in names for interest in parse(str(name))]

    def set_up(vm: AsyncVm) -> None:
        vm.on(*interests)(_handle)

    return set_up


def _handle(event: WatchedEvent) -> None:
    if not _log.isEnabledFor(logging.INFO):
        return
    data = event.data
    own = data._asdict() if data is not None else {}
    common = {"event": event_name(event.event), "vcpu": event.vcpu, "seq": event.seq, "mode": event.mode}
    _log.info("event", extra={**common, "rip": event.rip, **own})
