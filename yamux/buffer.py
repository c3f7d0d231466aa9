"""Received bytes that wait for their reader, at a cost that the peer cannot inflate.

The window bounds the bytes of a stream, but a peer that sends them one by one would make us keep a Python
object for each. Small pieces are therefore gathered; large ones are kept as they came, because copying them
costs time.
"""

from __future__ import annotations

GATHER_BELOW = (
    4096  # bytes; a smaller piece is appended to the one before it, so that overhead stays under 3 %
)


class ByteQueue:
    """Bytes in, bytes out, in order."""

    __slots__ = ("_first", "_pieces", "_size")

    def __init__(self) -> None:
        self._pieces: list[bytes | bytearray] = []
        self._first = 0  # how much of the first piece is taken already
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def append(self, piece: bytes) -> None:
        """Add bytes at the end."""
        if not piece:
            return
        self._size += len(piece)
        if len(piece) < GATHER_BELOW and self._pieces:
            last = self._pieces[-1]
            if len(last) < GATHER_BELOW:
                if not isinstance(last, bytearray):
                    last = self._pieces[-1] = bytearray(last)
                last += piece
                return
        self._pieces.append(piece)

    def take(self, max_bytes: int | None = None) -> bytes:
        """Remove and return bytes from the front, at most `max_bytes`, possibly fewer than are there."""
        if not self._pieces:
            return b""
        piece = self._pieces[0]
        start = self._first
        left = len(piece) - start
        if max_bytes is not None and left > max_bytes:
            self._first = start + max_bytes
            self._size -= max_bytes
            return bytes(memoryview(piece)[start : start + max_bytes])
        del self._pieces[0]
        self._first = 0
        self._size -= left
        if start:
            return bytes(memoryview(piece)[start:])
        return bytes(piece)  # no copy if it is a bytes object already

    def clear(self) -> None:
        """Forget everything."""
        self._pieces.clear()
        self._first = 0
        self._size = 0
