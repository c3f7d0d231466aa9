"""Which data goes out next: the streams that have some take turns, a chunk each.

For drivers with many senders and one writer. The rule: control frames leave before data, and neither the
memory nor the time of one write grows with what a stream has to say.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from yamux.connection import Connection

CHUNK = 64 * 1024  # bytes of data between two chances for control frames and other streams


class Turns:
    """Data that waits for credit and its turn: at most one buffer per stream, not copied."""

    __slots__ = ("_connection", "_ready", "_unsent")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._unsent: dict[int, memoryview] = {}
        self._ready: dict[int, None] = {}  # in order; streams with data and, as far as we know, credit

    def __bool__(self) -> bool:
        return bool(self._ready)

    def put(self, stream_id: int, data: memoryview) -> None:
        """Queue data (of format B, not empty) of a stream that has none queued."""
        self._unsent[stream_id] = data
        self._ready[stream_id] = None

    def waits(self, stream_id: int) -> bool:
        """Whether something of this stream has not left yet."""
        return stream_id in self._unsent

    def granted(self, stream_id: int) -> None:
        """Note that a stream has got credit."""
        if stream_id in self._unsent:
            self._ready[stream_id] = None

    def drop(self, stream_id: int) -> None:
        """Forget what a stream has queued."""
        self._unsent.pop(stream_id, None)
        self._ready.pop(stream_id, None)

    def next_write(self) -> tuple[list[bytes | memoryview], list[int]]:
        """Take what to write next, the outbox first; also returns the streams whose data is now all taken.

        The buffers must be written in order and whole (`writev`). None means that there is nothing to do.
        """
        buffers: list[bytes | memoryview] = []
        finished: list[int] = []
        room = CHUNK
        while self._ready and room > 0:
            stream_id = next(iter(self._ready))
            del self._ready[stream_id]
            data = self._unsent[stream_id]
            n = min(len(data), room, self._connection.send_credit(stream_id))
            if not n:
                continue  # `granted` brings it back
            buffers.append(self._connection.data_header(stream_id, n))
            buffers.append(data[:n])
            room -= n
            if n < len(data):
                self._unsent[stream_id] = data[n:]
                self._ready[stream_id] = None
            else:
                del self._unsent[stream_id]
                finished.append(stream_id)
        if not buffers and self._connection.wants_to_send:
            buffers.append(self._connection.data_to_send())
        return buffers, finished
