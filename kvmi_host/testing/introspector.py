# SPDX-License-Identifier: LGPL-2.1-or-later
"""The least that an introspector does, as a program of others would do it: nothing of ours is imported here.

    python introspector.py listen SOCKET [COOKIE]     as a server of QEMU's handshake
    python introspector.py fd                         with the socket that LISTEN_FDS says

It prints JSON lines: ``listening``; what the VM's side said in the handshake; the version, once it has asked for the
UNHOOK event; ``unhook`` when that comes; and ``closed``.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import sys
from hashlib import sha1

EVENT, GET_VERSION, CONTROL_VM_EVENTS = 1, 2, 8
"""Message ids."""

UNHOOK = 0
"""Event id."""

_HELLO = struct.Struct("<I16s4xq64s")
_ANSWER = struct.Struct("<I20s")
_HEADER = struct.Struct("<HHI")


def say(**fields: object) -> None:
    """One line."""
    os.write(1, json.dumps(fields).encode() + b"\n")


def exactly(sock: socket.socket, count: int) -> bytes:
    """So many bytes, or none when the peer hung up."""
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            return b""
        data += more
    return data


def shake_hands(sock: socket.socket, cookie: str | None) -> None:
    """Hear which VM it is; show the secret."""
    size, uuid, start_time, name = _HELLO.unpack(exactly(sock, _HELLO.size))
    say(struct_size=size, uuid=uuid.hex(), start_time=start_time, name=name.rstrip(b"\0").decode())
    digest = bytes(20) if cookie is None else sha1(cookie.encode()).digest()
    sock.sendall(_ANSWER.pack(_ANSWER.size, digest))


def introspect(sock: socket.socket) -> None:
    """Ask for the version and for the UNHOOK event, and stay until it comes or the session ends.

    What the session may do is said a moment after KVM has begun to speak: until then the answer is -EPERM.
    """
    version = 0
    ask_for_unhook = _HEADER.pack(CONTROL_VM_EVENTS, 8, 2) + struct.pack("<HB5x", UNHOOK, 1)
    sock.sendall(_HEADER.pack(GET_VERSION, 0, 1) + ask_for_unhook)
    while header := exactly(sock, _HEADER.size):
        number, size, _ = _HEADER.unpack(header)
        payload = exactly(sock, size)
        if number == GET_VERSION:
            (version,) = struct.unpack_from("<I", payload, 8)
        elif number == CONTROL_VM_EVENTS:
            (error,) = struct.unpack_from("<i", payload)
            if error == -errno.EPERM:
                sock.sendall(ask_for_unhook)
            else:
                say(error=error, version=version)
        elif number == EVENT:
            say(unhook=True)
            break
    sock.close()
    say(closed=True)


def main(how: str, *arguments: str) -> None:
    """As the module says."""
    if how == "fd":
        assert (os.environ["LISTEN_FDS"], os.environ["LISTEN_PID"]) == ("1", str(os.getpid()))
        say(names=os.environ["LISTEN_FDNAMES"])
        introspect(socket.socket(fileno=3))
        return
    path, cookie = arguments[0], arguments[1] if len(arguments) > 1 else None
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        say(listening=path)
        sock, _ = listening.accept()
    shake_hands(sock, cookie)
    introspect(sock)


if __name__ == "__main__":
    main(*sys.argv[1:])
