# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon: starts, reads its configuration again on SIGHUP, and stops on SIGTERM and SIGINT."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from pathlib import Path

from kvmi_host.agent import logs, systemd
from kvmi_host.agent.config import Config, load
from kvmi_host.agent.errors import ConfigError
from kvmi_host.agent.exposition import MetricsServer
from kvmi_host.agent.metrics import Metrics, Trouble
from kvmi_host.agent.sessions import Sessions
from kvmi_host.introspect.async_listener import Admission, AsyncListener
from kvmi_host.introspect.listener import listen_at
from kvmi_host.protocol import HandshakeError

_TICK_SECONDS = 1.0
_DAY_SECONDS = 86400.0

_log = logging.getLogger(__name__)


async def serve(path: Path) -> None:
    """Run the agent until it is told to stop. Logging is set up by the caller.

    :param path: of the configuration.
    :raise ConfigError: it cannot be used.
    :raise SessionError: the socket cannot be listened on.
    """
    config = load(path)
    listening = systemd.passed_socket()
    ours = None if listening else config.listen.socket
    if listening is None:
        if ours is None:
            raise ConfigError(f"{path}: listen.socket is missing: where do VMs announce themselves?")
        listening = listen_at(ours)
    with listening:
        try:
            await _Agent(path, config, listening).run()
        finally:
            if ours:
                ours.unlink(missing_ok=True)


class _Agent:
    def __init__(self, path: Path, config: Config, listening: socket.socket) -> None:
        self._path = path
        self._config = config
        self._listening = listening
        self._metrics = Metrics()
        self._exposition = MetricsServer(self._metrics.registry)
        self._sessions = Sessions(config, self._metrics)
        self._listener = AsyncListener(
            listening,
            _admission(config),
            make_room=self._sessions.make_room,
            admit=self._sessions.admit,
            refused=self._refused,
        )
        self._shown = -1

    async def run(self) -> None:
        """Serve whoever connects, until the signal to stop."""
        logs.set_level(self._config.level)
        if self._config.metrics:
            await self._exposition.start(self._config.metrics)
        loop, told = asyncio.get_running_loop(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, told.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload)

        stop = loop.create_task(told.wait())
        work = [loop.create_task(each) for each in (self._listener.serve(), self._tick(), _feed_watchdog())]
        where = {"socket": self._listening.getsockname(), "metrics": self._exposition.address}
        _log.info("ready", extra={**where, "rules": [rule.match for rule in self._config.rules]})
        systemd.notify("READY=1", self._status())
        done, _ = await asyncio.wait([stop, *work], return_when=asyncio.FIRST_COMPLETED)

        systemd.notify("STOPPING=1")
        loop.remove_signal_handler(signal.SIGHUP)
        for task in work:
            task.cancel()
        self._exposition.close()
        await self._sessions.close()
        _log.info("stopped")
        for ended in done:
            ended.result()  # work never ends, unless it raises

    def _reload(self) -> None:
        systemd.notify_reloading()
        try:
            config = load(self._path)
        except ConfigError as error:
            self._metrics.errors[Trouble.CONFIG] += 1
            _log.error("the configuration stays as it was: %s", error)
        else:
            for name, before, now in (
                ("listen.socket", self._config.listen.socket, config.listen.socket),
                ("metrics.address", self._config.metrics, config.metrics),
            ):
                if before != now:
                    _log.warning("%s changes when the agent is started again", name)
            self._config = config
            self._listener.admission = _admission(config)
            self._sessions.configure(config)
            logs.set_level(config.level)
            _log.info("the configuration was read again", extra={"rules": [rule.match for rule in config.rules]})
        systemd.notify("READY=1", self._status())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            await self._sessions.measure()
            if self._shown != len(self._sessions):
                systemd.notify(self._status())

    def _status(self) -> str:
        self._shown = len(self._sessions)
        return f"STATUS=VMs attached: {self._shown}"

    def _refused(self, error: HandshakeError) -> None:
        self._metrics.errors[Trouble.HANDSHAKE] += 1
        _log.warning("%s", error)


def _admission(config: Config) -> Admission:
    return Admission(config.listen.cookie, config.listen.users, config.listen.handshake_timeout)


async def _feed_watchdog() -> None:
    """Tell systemd that the event loop goes round, for as long as it wants to know."""
    interval = systemd.watchdog_interval()
    while True:
        systemd.notify("WATCHDOG=1")
        await asyncio.sleep(interval or _DAY_SECONDS)
