"""One stream of a session as a trio stream, and what the session and its streams share.

The session tells a stream what the peer did (`on_...`). A stream knows no session: it changes what they share
and wakes the writer. It is in the table as long as the protocol knows it, until both directions have ended or
one end has reset it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import trio
from trio.lowlevel import ParkingLot, checkpoint

from yamux.buffer import ByteQueue
from yamux.connection import Connection
from yamux.turns import Turns

# Streams closed by us that the peer has not ended; beyond, the oldest is reset. A peer that never ends a
# stream would make each one cost us memory for ever.
MAX_LINGERING = 256


class Shared:
    """What a session and its streams share: the protocol, the table of streams, and why the session ended."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.turns = Turns(connection)
        self.streams: dict[int, Stream] = {}
        self.writer = ParkingLot()
        self.cause: Exception | None = None  # why the session ended
        self._lingering: dict[int, None] = {}  # closed by us, not ended by the peer; the oldest first

    def new_stream(self, stream_id: int) -> Stream:
        """Put a stream into the table."""
        stream = self.streams[stream_id] = Stream(self, stream_id)
        return stream

    def wake_writer(self) -> None:
        """Have the writer look for something to write."""
        self.writer.unpark_all()

    def consumed(self, stream_id: int, n: int) -> None:
        """Give the peer credit back."""
        self.connection.consumed(stream_id, n)
        if self.connection.wants_to_send:
            self.wake_writer()

    def end_stream(self, stream: Stream) -> None:
        """Tell the peer that nothing more comes on a stream."""
        self.connection.end_stream(stream.stream_id)
        self.wake_writer()
        self.prune(stream)

    def close_stream(self, stream: Stream, *, unread_or_unsent: bool) -> None:
        """End a stream that nobody uses any more, with a reset if it leaves something undone."""
        if not self.connection.is_live(stream.stream_id):
            return
        if unread_or_unsent:
            self.abort(stream)
            return
        if not stream.ended:
            self.end_stream(stream)
        self.prune(stream)
        if stream.stream_id in self.streams:
            self._lingering[stream.stream_id] = None
            if len(self._lingering) > MAX_LINGERING:
                self.abort(self.streams[next(iter(self._lingering))])

    def abort(self, stream: Stream) -> None:
        """Reset a stream."""
        self.connection.reset_stream(stream.stream_id)
        self.wake_writer()
        self.prune(stream)

    def prune(self, stream: Stream) -> None:
        """Forget a stream that the protocol has forgotten."""
        if not self.connection.is_live(stream.stream_id):
            self.streams.pop(stream.stream_id, None)
            self._lingering.pop(stream.stream_id, None)

    def raise_ended(self, what: str) -> NoReturn:
        """Raise what whoever uses an ended session gets."""
        raise trio.BrokenResourceError(f"{what}: the session ended: {self.cause}") from self.cause


class Stream(trio.abc.HalfCloseableStream):
    """One stream of a session. Made by `Session.open_stream` and `Session.accept_stream`.

    `aclose` ends our direction and gives up the other: data that is unread, or comes later, is answered by a
    reset. To be sure that the peer has everything, `send_eof`, read to the end, then close. A cancelled
    `aclose` resets.
    """

    def __init__(self, shared: Shared, stream_id: int) -> None:
        self.stream_id = stream_id
        self.ended = False  # by our send_eof
        self._shared = shared
        self._received = ByteQueue()
        self._peer_ended = False
        self._reset = False
        self._closed = False
        self._sending = False
        self._receiving = False
        self._senders = ParkingLot()
        self._receivers = ParkingLot()

    def __repr__(self) -> str:
        return f"<yamux stream {self.stream_id}>"

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send data, waiting for the peer's credit. Returns when the last of it is with the writer."""
        with self._one_sender(), memoryview(data) as whole, whole.cast("B") as view:
            self._check_can_send()
            if not view:
                await checkpoint()
                return
            turns = self._shared.turns
            turns.put(self.stream_id, view)
            self._shared.wake_writer()
            try:
                while turns.waits(self.stream_id):
                    await self._senders.park()
                    self._check_can_send()
            finally:
                turns.drop(self.stream_id)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the peer has granted credit."""
        with self._one_sender():
            self._check_can_send()
            await checkpoint()
            self._check_can_send()
            while not self._shared.connection.send_credit(self.stream_id):
                await self._senders.park()
                self._check_can_send()

    async def send_eof(self) -> None:
        """Tell the peer that nothing more comes. Receiving goes on."""
        with self._one_sender():
            self._check_open()
            await checkpoint()
            self._check_open()
            if not self.ended:
                self._check_can_send()
                self.ended = True
                self._shared.end_stream(self)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive at least one byte, or b"" once the peer has ended its direction."""
        if max_bytes is not None:
            max_bytes = operator.index(max_bytes)
            if max_bytes < 1:
                raise ValueError(f"max_bytes must be at least 1, not {max_bytes}")
        if self._receiving:
            raise trio.BusyResourceError(f"another task receives on {self!r}")
        self._receiving = True
        try:
            self._check_open()
            if self._nothing_to_tell():
                while self._nothing_to_tell():
                    await self._receivers.park()
            else:
                await checkpoint()
            self._check_open()
        finally:
            self._receiving = False
        if self._received:
            data = self._received.take(max_bytes)
            self._shared.consumed(self.stream_id, len(data))
            return data
        if self._peer_ended and not self._reset:
            return b""
        return self._raise_broken()

    async def aclose(self) -> None:
        """Close both directions; a reset if the call is cancelled, or something was not sent or not read."""
        first, self._closed = not self._closed, True
        torn = self._shared.turns.waits(self.stream_id)  # in another task's send_all
        self.wake()
        try:
            await checkpoint()
        except trio.Cancelled:
            self._shared.abort(self)
            raise
        if first:
            self._shared.close_stream(self, unread_or_unsent=torn or bool(self._received))

    # What the session tells

    def on_data(self, data: bytes) -> None:
        """Keep what the peer sent for the reader."""
        if self._closed:
            self._shared.abort(self)
            return
        self._received.append(data)
        self._receivers.unpark_all()

    def on_credit(self) -> None:
        """The peer takes more, or has been sent all that was queued."""
        self._senders.unpark_all()

    def on_end(self) -> None:
        """The peer will send nothing more."""
        self._peer_ended = True
        self._receivers.unpark_all()
        if self.ended or self._closed:
            self._shared.prune(self)
        # else it lives, or a reset came in the same bytes, whose event must still find it

    def on_reset(self) -> None:
        """The peer aborted: what nobody has read is gone."""
        self._reset = True
        self._received.clear()
        self.wake()
        self._shared.prune(self)

    def wake(self) -> None:
        """Have both users look at how things are now."""
        self._senders.unpark_all()
        self._receivers.unpark_all()

    # What its own methods ask

    @contextmanager
    def _one_sender(self) -> Iterator[None]:
        if self._sending:
            raise trio.BusyResourceError(f"another task sends on {self!r}")
        self._sending = True
        try:
            yield
        finally:
            self._sending = False

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError(f"{self!r} was closed on this side")

    def _check_can_send(self) -> None:
        self._check_open()
        if self.ended:
            raise trio.ClosedResourceError(f"{self!r}: send_eof was called")
        if self._reset or self._shared.cause is not None:
            self._raise_broken()

    def _raise_broken(self) -> NoReturn:
        if self._reset:
            raise trio.BrokenResourceError(f"{self!r} was reset by the peer")
        self._shared.raise_ended(f"{self!r} is broken")

    def _nothing_to_tell(self) -> bool:
        return not (
            self._received
            or self._peer_ended
            or self._reset
            or self._closed
            or self._shared.cause is not None
        )
