# SPDX-License-Identifier: LGPL-2.1-or-later
"""Handlers as plugins: entry points of the group ``kvmi_host.handlers`` that any installed distribution may have.

A plugin is called once with the options of its table in the configuration, and gives what sets up a VM::

    def plugin(options: Mapping[str, object]) -> Setup:
        ...                                         # ValueError: the options are wrong, and why
        def set_up(vm: AsyncVm) -> None:
            @vm.on(CR3)
            async def handle(event: WatchedEvent) -> None: ...
        return set_up

So what is wrong with a configuration shows when it is read, not when a VM comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points

from kvmi_host.agent.errors import ConfigError
from kvmi_host.introspect.async_vm import AsyncVm

GROUP = "kvmi_host.handlers"

Setup = Callable[[AsyncVm], None]
"""Registers handlers with :meth:`AsyncVm.on`; called for each VM, and again when the configuration is read again."""

Plugin = Callable[[Mapping[str, object]], Setup]


def set_up_by(name: str, options: Mapping[str, object]) -> Setup:
    """What the plugin of that name makes of its options.

    :raise ConfigError: there is no such plugin, it cannot be imported, or it does not take the options.
    """
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name not in found:
        there = ", ".join(sorted(found)) or "none"
        raise ConfigError(f"no handler {name!r} is installed (entry points of {GROUP!r}); there are: {there}")
    try:
        plugin: Plugin = found[name].load()
        return plugin(options)
    except Exception as error:  # whatever a stranger's module raises when it is imported
        raise ConfigError(f"handler {name!r} ({found[name].value}): {error or type(error).__name__}") from error
