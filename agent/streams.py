"""Connections to the host as blocking byte streams, whatever carries them."""

from __future__ import annotations

import _socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Buffer = bytes | memoryview

SHUT_WR = 1  # sys/socket.h
SHUT_RDWR = 2


class ByteStream:
    """A connection. Calls block, from any number of threads; a broken connection raises OSError."""

    def receive(self, size: int) -> bytes:
        """Wait for some bytes, at most `size`; none means that the host sends no more."""
        raise NotImplementedError

    def send(self, data: Buffer) -> None:
        """Send everything."""
        raise NotImplementedError

    def close_sending(self) -> None:
        """Tell the host that no more comes."""
        raise NotImplementedError

    def close(self) -> None:
        """Drop the connection; whoever waits in it gets the end or an error. Closing twice is fine."""
        raise NotImplementedError


class SocketStream(ByteStream):
    """A connected socket: unix or vsock."""

    def __init__(self, socket: _socket.socket) -> None:
        self._socket = socket

    def receive(self, size: int) -> bytes:
        """Wait for some bytes."""
        return self._socket.recv(size)

    def send(self, data: Buffer) -> None:
        """Send everything."""
        self._socket.sendall(data)

    def close_sending(self) -> None:
        """Half-close."""
        self._socket.shutdown(SHUT_WR)

    def close(self) -> None:
        """Shut down both directions, which wakes who waits; the descriptor goes with the last reference.

        Closing the descriptor here would let a waiting thread find another connection under its number.
        """
        try:
            self._socket.shutdown(SHUT_RDWR)
        except OSError:
            pass  # the host was faster
