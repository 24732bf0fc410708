# SPDX-License-Identifier: LGPL-2.1-or-later
"""Listening for VMs with asyncio: what the blocking listener does, and that nobody waits for another one."""

import asyncio
import os
from uuid import UUID

import pytest

from kvmi_host.introspect import async_listener
from kvmi_host.introspect.async_listener import Admission, AsyncListener
from kvmi_host.introspect.listener import listen_at
from kvmi_host.testing.event_loop import in_a_loop

UUID_BYTES = "00112233445566778899aabbccddeeff"
HELLO = bytes.fromhex(f"60000000 {UUID_BYTES} 00000000 00f1536500000000") + b"webserver".ljust(64, b"\0")
ANSWER = bytes.fromhex("18000000 e5e9fa1ba31ecd1ae84f75caaa474f3a663f05f4")  # the SHA-1 of "secret"


class Reception:
    """A listener, and what became of those who came."""

    def __init__(self, path, **admission):
        self.path = path
        self.admitted = asyncio.Queue()
        self.refused = asyncio.Queue()
        self.room = asyncio.Event()
        self.room.set()
        self._sock = listen_at(path)
        self.listener = AsyncListener(
            self._sock,
            Admission(**admission),
            make_room=self._make_room,
            admit=lambda sock, peer: self.admitted.put_nowait((sock, peer)),
            refused=self.refused.put_nowait,
        )

    async def _make_room(self, peer):
        await self.room.wait()

    async def __aenter__(self):
        self._task = asyncio.create_task(self.listener.serve())
        return self

    async def __aexit__(self, *error):
        self._task.cancel()
        await asyncio.wait([self._task])
        self._sock.close()
        while not self.admitted.empty():
            self.admitted.get_nowait()[0].close()

    async def call(self, said=b""):
        """A VM's side, which says something."""
        reader, writer = await asyncio.open_unix_connection(os.fspath(self.path))
        writer.write(said)
        return reader, writer


@pytest.fixture
def path(tmp_path):
    return tmp_path / "agent.sock"


@in_a_loop
async def test_a_vm_that_announces_itself_is_admitted(path):
    async with Reception(path, cookie=b"secret") as reception:
        reader, writer = await reception.call(HELLO)
        assert await reader.readexactly(len(ANSWER)) == ANSWER
        _, peer = await reception.admitted.get()
        assert (peer.uuid, peer.name, peer.start_time) == (UUID(UUID_BYTES), "webserver", 1_700_000_000)
        writer.close()


@in_a_loop
async def test_what_kvm_says_right_behind_the_handshake_is_left_to_the_session(path):
    async with Reception(path) as reception:
        _, writer = await reception.call(HELLO + b"kvm")
        sock, _ = await reception.admitted.get()
        assert await asyncio.get_running_loop().sock_recv(sock, 10) == b"kvm"
        writer.close()


@in_a_loop
async def test_silent_peers_hold_up_nobody(path):
    async with Reception(path) as reception:
        silent = [await reception.call(HELLO[:length]) for length in (0, 1, 50)]
        _, writer = await reception.call(HELLO)
        await reception.admitted.get()
        for _, each in [*silent, (None, writer)]:
            each.close()


@in_a_loop
async def test_a_silent_peer_is_dropped_after_the_deadline(path):
    async with Reception(path, timeout=0.05) as reception:
        reader, writer = await reception.call(HELLO[:50])
        assert "in time" in str(await reception.refused.get())
        assert await reader.read() == b""
        writer.close()


@in_a_loop
async def test_when_too_many_are_silent_who_took_longest_goes(path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(async_listener, "MAX_PENDING", 2)
        async with Reception(path) as reception:
            first, _second, _third = [await reception.call(b"\x60") for _ in range(3)]
            assert "who took longest" in str(await reception.refused.get())
            assert await first[0].read() == b""
            for _, writer in (first, _second, _third):
                writer.close()


@in_a_loop
async def test_a_peer_that_hangs_up_early_is_refused(path):
    async with Reception(path) as reception:
        _, writer = await reception.call(HELLO[:50])
        writer.close()
        assert "hung up" in str(await reception.refused.get())


@in_a_loop
async def test_a_peer_that_speaks_something_else_is_refused(path):
    async with Reception(path) as reception:
        _, writer = await reception.call(b"GET / HTTP/1.1\r\n\r\n")
        assert "does not speak" in str(await reception.refused.get())
        writer.close()


@in_a_loop
async def test_a_user_who_may_not_is_refused(path):
    async with Reception(path, users={os.geteuid() + 1}) as reception:
        _, writer = await reception.call(HELLO)
        assert f"user {os.geteuid()} may not" in str(await reception.refused.get())
        writer.close()


@in_a_loop
async def test_who_may_connect_can_be_changed_while_it_listens(path):
    async with Reception(path, users={os.geteuid() + 1}) as reception:
        reception.listener.admission = Admission()
        _, writer = await reception.call(HELLO)
        await reception.admitted.get()
        writer.close()


@in_a_loop
async def test_a_vm_is_answered_when_there_is_room_for_it(path):
    async with Reception(path) as reception:
        reception.room.clear()
        reader, writer = await reception.call(HELLO)
        answered = asyncio.ensure_future(reader.read(1))
        assert (await asyncio.wait([answered], timeout=0.05))[0] == set()
        reception.room.set()
        assert await answered == b"\x18"
        await reception.admitted.get()
        writer.close()


@in_a_loop
async def test_the_end_of_listening_drops_who_has_not_finished(path):
    async with Reception(path) as reception:
        reader, writer = await reception.call(HELLO[:50])
        _, other_writer = await reception.call(HELLO)
        await reception.admitted.get()  # so the first is in its handshake
    assert await reader.read() == b""
    for each in (writer, other_writer):
        each.close()
