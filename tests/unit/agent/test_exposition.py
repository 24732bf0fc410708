# SPDX-License-Identifier: LGPL-2.1-or-later
"""Metrics over HTTP: what is served, and that no client can hold the agent up."""

import asyncio
import os
from contextlib import asynccontextmanager

import pytest

from kvmi_host.agent import exposition
from kvmi_host.agent.errors import ConfigError
from kvmi_host.agent.exposition import MetricsServer
from kvmi_host.agent.metrics import Metrics
from kvmi_host.testing.event_loop import in_a_loop

GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


@asynccontextmanager
async def serving(where):
    server = MetricsServer(Metrics().registry)
    await server.start(where)
    yield server
    server.close()


async def ask(path, request=GET):
    reader, writer = await asyncio.open_unix_connection(os.fspath(path))
    writer.write(request)
    try:
        return await reader.read()
    except ConnectionError:  # it did not read all that we said
        return b""
    finally:
        writer.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.sock"


@in_a_loop
async def test_a_unix_socket_serves_its_owner(path):
    async with serving(path):
        assert path.stat().st_mode & 0o777 == 0o600
        head, _, body = (await ask(path)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4")
        assert f"Content-Length: {len(body)}".encode() in head
        assert b"\nkvmi_sessions 0.0\n" in body
    assert not path.exists()


@in_a_loop
async def test_a_tcp_port_is_chosen_where_none_is_given():
    async with serving(("127.0.0.1", 0)) as server:
        host, _, port = server.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(GET)
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK")
        writer.close()


@in_a_loop
async def test_a_port_that_is_taken_is_an_error_that_names_the_key():
    async with serving(("127.0.0.1", 0)) as server:
        port = int(server.address.rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"metrics.address: 127.0.0.1 port {port}: "):
            await MetricsServer(Metrics().registry).start(("127.0.0.1", port))


@in_a_loop
async def test_who_accepts_openmetrics_gets_it(path):
    async with serving(path):
        answer = await ask(path, GET[:-2] + b"accept: application/openmetrics-text; version=1.0.0\r\n\r\n")
        assert b"Content-Type: application/openmetrics-text; version=1.0.0" in answer
        assert answer.endswith(b"# EOF\n")


@in_a_loop
async def test_head_is_answered_without_a_body(path):
    async with serving(path):
        assert (await ask(path, b"HEAD /metrics HTTP/1.1\r\n\r\n")).endswith(b"\r\n\r\n")


@in_a_loop
@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET / HTTP/1.1", b"404"),
        (b"GET /metrics/../etc/passwd HTTP/1.1", b"404"),
        (b"GET /metrics?name=x HTTP/1.0", b"200"),
        (b"POST /metrics HTTP/1.1", b"405"),
        (b"\xff\x00", b"405"),
        (b"", b"405"),
    ],
)
async def test_anything_else_is_refused(path, request_line, status):
    async with serving(path):
        assert (await ask(path, request_line + b"\r\n\r\n")).startswith(b"HTTP/1.1 " + status)


@in_a_loop
@pytest.mark.parametrize("request_head", [b"GET /metrics HTTP/1.1\r\n" + b"x: y\r\n" * 20_000, b"x" * 200_000])
async def test_a_request_that_is_too_long_is_hung_up_on(path, request_head):
    async with serving(path):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncio.get_running_loop(), "call_exception_handler", pytest.fail)
            assert await ask(path, request_head) == b""


@in_a_loop
async def test_a_client_that_is_slow_is_hung_up_on(path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exposition, "_SECONDS", 0.05)
        async with serving(path):
            assert await ask(path, b"GET /metr") == b""


@in_a_loop
async def test_slow_clients_are_no_more_than_a_few(path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exposition, "_MAX_CLIENTS", 1)
        async with serving(path):
            _, slow = await asyncio.open_unix_connection(os.fspath(path))
            assert await ask(path) == b""
            slow.close()
