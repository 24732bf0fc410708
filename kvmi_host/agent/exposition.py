# SPDX-License-Identifier: LGPL-2.1-or-later
"""Metrics over HTTP, for Prometheus: one request a connection, on a TCP port or a UNIX socket.

It is served on the event loop that serves the VMs, so nobody can hold it up: requests are short or refused, and a
client that is slow is left alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from kvmi_host.agent.errors import ConfigError
from kvmi_host.introspect.listener import listen_at

_MAX_REQUEST = 16384  # bytes
_MAX_CLIENTS = 16
_SECONDS = 5.0  # for a whole request

_log = logging.getLogger(__name__)


class MetricsServer:
    """Serves ``/metrics``.

    :ivar address: where, as it is to be told people.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.address = ""
        self._registry = registry
        self._clients = 0
        self._server: asyncio.Server | None = None
        self._path: Path | None = None

    async def start(self, where: tuple[str, int] | Path) -> None:
        """Listen on an address and port (0: any), or on a UNIX socket of mode 0600.

        :raise ConfigError: that cannot be listened on.
        :raise SessionError: the UNIX socket's folder is open to others, or someone listens there already.
        """
        if isinstance(where, Path):
            self._path, sock = where, listen_at(where)
            self._server = await asyncio.start_unix_server(self._answer, sock=sock, limit=_MAX_REQUEST)
            self.address = str(where)
            return
        try:
            self._server = await asyncio.start_server(self._answer, *where, limit=_MAX_REQUEST)
        except OSError as error:
            raise ConfigError(f"metrics.address: {where[0]} port {where[1]}: {error.strerror}") from error
        host, port = self._server.sockets[0].getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def close(self) -> None:
        """Stop listening."""
        if self._server:
            self._server.close()
        if self._path:
            self._path.unlink(missing_ok=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients += 1
        try:
            # Who is gone, slow, or says too much is no news.
            with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                if self._clients <= _MAX_CLIENTS:
                    async with asyncio.timeout(_SECONDS):
                        writer.write(self._response(await reader.readuntil(b"\r\n\r\n")))
                        await writer.drain()
        finally:
            self._clients -= 1
            writer.close()

    def _response(self, request: bytes) -> bytes:
        first, *lines = request.decode("latin-1").split("\r\n")
        method, _, rest = first.partition(" ")
        if method not in ("GET", "HEAD"):
            return _message("405 Method Not Allowed", "Allow: GET, HEAD")
        if rest.partition(" ")[0].partition("?")[0] != "/metrics":
            return _message("404 Not Found", body=b"/metrics is all there is\n")
        fields = (line.partition(":") for line in lines)
        accept = ",".join(value.strip() for name, _, value in fields if name.lower() == "accept")
        encode, content_type = choose_encoder(accept)
        whole = _message("200 OK", f"Content-Type: {content_type}", body=encode(self._registry))
        return whole if method == "GET" else whole.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"


def _message(status: str, *fields: str, body: bytes = b"") -> bytes:
    head = [f"HTTP/1.1 {status}", *fields, f"Content-Length: {len(body)}", "Connection: close", "", ""]
    return "\r\n".join(head).encode("latin-1") + body
