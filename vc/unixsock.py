"""Unix sockets by path, whatever the path's length, and private from the first moment.

A socket's address holds 107 bytes (unix(7)). A longer path is reached through a descriptor of its directory:
/proc/self/fd/N/name is short and means the same file.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

MAX_ADDRESS = 107  # bytes: sizeof(sun_path) less the zero at the end, unix(7)
BACKLOG = 4


@contextmanager
def short_address(path: Path) -> Iterator[str]:
    """Give an address for `path` that fits, valid inside the block."""
    if len(os.fsencode(path)) <= MAX_ADDRESS:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def listen(path: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """Listen at `path`, for our own user only. The caller closes the socket and removes the file."""
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    try:
        # The mode of an unbound socket becomes the file's: there is no moment at which others may connect.
        os.fchmod(listener.fileno(), 0o600)
        with short_address(path) as address:
            listener.bind(address)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def connect_nowait(path: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """Connect to a listening socket at `path`. Does not wait for the other side to accept."""
    client = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    try:
        client.settimeout(0)  # a full backlog is an error (EAGAIN) and not a wait
        with short_address(path) as address:
            client.connect(address)
        client.settimeout(None)
    except BaseException:
        client.close()
        raise
    return client


def connect_stream(path: Path) -> trio.SocketStream:
    """Connect to a listening socket at `path`, as a trio stream."""
    return trio.SocketStream(trio.socket.from_stdlib_socket(connect_nowait(path)))
