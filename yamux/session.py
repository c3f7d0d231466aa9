"""A yamux session over a trio stream: with `serial`, the only file here that does I/O.

Two tasks, owned by whoever runs `Session.run`: one reads and never waits for a consumer, one writes and is
the only one to do so. What the protocol answers waits in the connection's outbox and is written before data;
data of all streams goes out in turns of one chunk, taken straight from the caller's buffer. A frame that is
begun is finished, also when the session is cancelled, because the other end may outlive us on a line that has
no end (`resync`).
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import trio
from trio.lowlevel import ParkingLot, checkpoint, checkpoint_if_cancelled

from yamux.buffer import ByteQueue
from yamux.connection import BACKLOG, Connection
from yamux.errors import RemoteProtocolError
from yamux.events import (
    CreditGranted,
    DataReceived,
    Event,
    GoAwayReceived,
    PingAcknowledged,
    StreamAcknowledged,
    StreamEnded,
    StreamOpened,
    StreamReset,
)
from yamux.frames import INITIAL_WINDOW, MAX_UINT32, NORMAL
from yamux.turns import Turns

READ_SIZE = 128 * 1024  # bytes
GRACE = 1.0  # seconds; to finish a frame, to say GoAway, to read what is left, when the session ends
# Streams closed by us that the peer has not ended; beyond, the oldest is reset. A peer that never ends a
# stream would make each one cost us memory for ever.
MAX_LINGERING = 256


class Stream(trio.abc.HalfCloseableStream):
    """One stream of a session. Made by `Session.open_stream` and `Session.accept_stream`.

    `aclose` ends our direction and gives up the other: data that is unread, or comes later, is answered by a
    reset. To be sure that the peer has everything, `send_eof`, read to the end, then close. A cancelled
    `aclose` resets.
    """

    def __init__(self, session: Session, stream_id: int) -> None:
        self.stream_id = stream_id
        self._session = session
        self._received = ByteQueue()
        self._peer_ended = False
        self._reset = False
        self._ended = False
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
            turns = self._session._turns
            turns.put(self.stream_id, view)
            self._session._wake_writer()
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
            while not self._session._connection.send_credit(self.stream_id):
                await self._senders.park()
                self._check_can_send()

    async def send_eof(self) -> None:
        """Tell the peer that nothing more comes. Receiving goes on."""
        with self._one_sender():
            self._check_open()
            await checkpoint()
            self._check_open()
            if not self._ended:
                self._check_can_send()
                self._ended = True
                self._session._connection.end_stream(self.stream_id)
                self._session._wake_writer()
                self._session._prune(self)

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
            self._session._consumed(self.stream_id, len(data))
            return data
        if self._peer_ended and not self._reset:
            return b""
        return self._raise_broken()

    async def aclose(self) -> None:
        """Close both directions; a reset if the call is cancelled, or something was not sent or not read."""
        first, self._closed = not self._closed, True
        torn = self._session._turns.waits(self.stream_id)  # in another task's send_all
        self._wake()
        try:
            await checkpoint()
        except trio.Cancelled:
            self._session._abort(self)
            raise
        if first:
            self._session._closed_by_us(self, torn=torn)

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
        if self._ended:
            raise trio.ClosedResourceError(f"{self!r}: send_eof was called")
        if self._reset or self._session._cause is not None:
            self._raise_broken()

    def _raise_broken(self) -> NoReturn:
        if self._reset:
            raise trio.BrokenResourceError(f"{self!r} was reset by the peer")
        self._session._raise_ended(f"{self!r} is broken")

    def _nothing_to_tell(self) -> bool:
        return not (
            self._received
            or self._peer_ended
            or self._reset
            or self._closed
            or self._session._cause is not None
        )

    def _wake(self) -> None:
        self._senders.unpark_all()
        self._receivers.unpark_all()


class Session:
    """Many streams over one transport, which the session owns and closes.

    `client`: which end we are; the two must differ. `max_window`, `backlog`: see `Connection`. `keepalive`:
    seconds between pings and seconds to wait for an answer before the peer counts as gone. None sends no
    pings; a paused VM cannot answer. `first_bytes`: what a handshake on the transport has read already.
    """

    def __init__(
        self,
        transport: trio.abc.Stream,
        *,
        client: bool,
        max_window: int = INITIAL_WINDOW,
        backlog: int = BACKLOG,
        keepalive: tuple[float, float] | None = None,
        first_bytes: bytes = b"",
    ) -> None:
        self._transport = transport
        self._connection = Connection(client=client, max_window=max_window, backlog=backlog)
        self._keepalive = keepalive
        self._first_bytes = first_bytes
        self._streams: dict[int, Stream] = {}
        self._turns = Turns(self._connection)
        self._incoming: deque[Stream] = deque()
        self._lingering: dict[int, None] = {}  # closed by us, not ended by the peer; the oldest first
        self._writer = ParkingLot()
        self._openers = ParkingLot()
        self._acceptors = ParkingLot()
        self._pings: dict[int, trio.Event] = {}
        self._last_ping = 0
        self._cause: Exception | None = None  # why the session ended
        self._scope = trio.CancelScope()
        self._frame_scope = trio.CancelScope(shield=True)
        self._line_usable = True
        self._started = False
        self._finished = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry the session until it ends, then close the transport. Call once.

        Returns when the peer closed the line between two frames or `aclose` was called. Cancelling ends the
        session as orderly as `aclose` does.

        Raises:
            trio.BrokenResourceError: the transport failed, ended inside a frame, the peer ended the session
            with
                an error, or did not answer a keepalive.
            RemoteProtocolError: the peer broke the protocol.

        """
        assert not self._started, "a session runs once"
        self._started = True
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._until_broken, self._write)
                    if self._keepalive is not None:
                        nursery.start_soon(self._until_broken, self._keep_alive)
                    task_status.started()
                    await self._until_broken(self._read)
        finally:
            self._end(trio.ClosedResourceError("the session was closed on this side"))
            with trio.move_on_after(GRACE, shield=True):
                await self._leave()
            self._finished.set()
        if isinstance(self._cause, (trio.BrokenResourceError, RemoteProtocolError)):
            raise self._cause

    async def open_stream(self) -> Stream:
        """Open a stream; waits while the peer has not accepted 256 earlier ones.

        Raises:
            trio.BrokenResourceError: the session ended, or the peer takes no new streams.

        """
        await checkpoint()
        while True:
            self._check_running("cannot open a stream")
            if self._connection.peer_reason is not None:
                raise trio.BrokenResourceError("cannot open a stream: the peer takes no new ones (GoAway)")
            if self._connection.open_slots:
                break
            await self._openers.park()
        stream_id = self._connection.open_stream()
        self._wake_writer()
        stream = self._streams[stream_id] = Stream(self, stream_id)
        return stream

    async def accept_stream(self) -> Stream:
        """Wait for the peer to open a stream.

        Raises:
            trio.BrokenResourceError: the session ended.

        """
        await checkpoint()
        while True:
            self._check_running("cannot accept a stream")
            if self._incoming:
                break
            await self._acceptors.park()
        stream = self._incoming.popleft()
        self._connection.accept_stream(stream.stream_id)
        self._wake_writer()
        return stream

    def go_away(self) -> None:
        """Refuse streams that the peer opens from now on. The others go on."""
        self._connection.go_away(NORMAL)
        self._wake_writer()

    async def ping(self) -> None:
        """Wait for the peer to answer a ping."""
        self._check_running("cannot ping")
        value = self._last_ping = (self._last_ping + 1) & MAX_UINT32
        answered = self._pings[value] = trio.Event()
        self._connection.ping(value)
        self._wake_writer()
        try:
            await answered.wait()
        finally:
            del self._pings[value]
        self._check_running("no answer to a ping")

    async def aclose(self) -> None:
        """End the session: finish the frame being written, send GoAway, close the transport."""
        self._stop(trio.ClosedResourceError("the session was closed on this side"))
        if not self._started:
            self._started = True
            await self._transport.aclose()
            self._finished.set()
        await self._finished.wait()

    # The tasks

    async def _until_broken(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run a part of the session; its failure is the end of the session and not an exception here."""
        try:
            await task()
        except (trio.BrokenResourceError, RemoteProtocolError) as error:
            self._stop(error)

    async def _read(self) -> None:
        data = self._first_bytes
        try:
            while True:
                if data:
                    self._take_in(data)
                data = bytes(await self._transport.receive_some(READ_SIZE))
                if not data:
                    break
        except trio.BrokenResourceError:
            self._line_usable = False
            raise
        finally:
            # Only a cancelled or failed session comes here: the writer has this long to finish its frame.
            self._frame_scope.deadline = trio.current_time() + GRACE
        if self._connection.mid_frame:
            raise trio.BrokenResourceError("the line ended inside a frame")
        self._stop(
            EOFError("the peer closed the line; without GoAway, this can mean that it disliked a frame")
        )

    def _take_in(self, data: bytes) -> None:
        try:
            events = self._connection.receive_data(data)
        except RemoteProtocolError as error:
            self._dispatch(error.events)
            raise
        self._dispatch(events)
        if self._connection.wants_to_send:
            self._wake_writer()

    async def _write(self) -> None:
        while True:
            await checkpoint_if_cancelled()
            data = self._next_to_write()
            if not data:
                await self._writer.park()
                continue
            try:
                with trio.CancelScope(shield=True) as self._frame_scope:
                    self._line_usable = False
                    await self._transport.send_all(data)
                    self._line_usable = True
            except trio.BrokenResourceError:
                # The peer left, but its last words may still be in the line: let the reader get them.
                await trio.sleep(GRACE)
                raise
            if not self._line_usable:
                raise trio.BrokenResourceError(
                    f"a frame was not taken within {GRACE} s after the session ended"
                )

    def _next_to_write(self) -> bytes:
        buffers, finished = self._turns.next_write()
        for stream_id in finished:
            self._streams[stream_id]._senders.unpark_all()
        # One copy, and not two writes: for a chunk it costs less than a second system call.
        return b"".join(buffers)

    async def _keep_alive(self) -> None:
        assert self._keepalive is not None
        interval, timeout = self._keepalive
        while True:
            await trio.sleep(interval)
            with trio.move_on_after(timeout) as scope:
                await self.ping()
            if scope.cancelled_caught:
                raise trio.BrokenResourceError(f"the peer did not answer a ping within {timeout} s")

    async def _leave(self) -> None:
        try:
            if self._line_usable:
                self._connection.go_away(NORMAL)
                await self._transport.send_all(self._connection.data_to_send())
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the peer left first
        finally:
            await self._transport.aclose()

    # What the peer did

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, DataReceived):
                self._data(event)
            elif isinstance(event, GoAwayReceived):
                self._openers.unpark_all()
                if event.reason != NORMAL:
                    raise trio.BrokenResourceError(f"the peer ended the session with GoAway {event.reason}")
            elif isinstance(event, PingAcknowledged):
                if event.value in self._pings:
                    self._pings[event.value].set()
            elif isinstance(event, StreamOpened):
                stream = self._streams[event.stream_id] = Stream(self, event.stream_id)
                self._incoming.append(stream)
                self._acceptors.unpark()
            elif isinstance(event, (CreditGranted, StreamAcknowledged, StreamEnded, StreamReset)):
                self._stream_event(self._streams.get(event.stream_id), event)

    def _data(self, event: DataReceived) -> None:
        stream = self._streams.get(event.stream_id)
        if stream is None:
            return
        if stream._closed:
            self._abort(stream)
            return
        stream._received.append(event.data)
        stream._receivers.unpark_all()

    def _stream_event(self, stream: Stream | None, event: Event) -> None:
        if isinstance(event, (StreamAcknowledged, StreamReset)):
            self._openers.unpark_all()
        if stream is None:
            return
        if isinstance(event, CreditGranted):
            self._turns.granted(stream.stream_id)
            self._wake_writer()
            stream._senders.unpark_all()
        elif isinstance(event, StreamEnded):
            stream._peer_ended = True
            stream._receivers.unpark_all()
            if stream._ended or stream._closed:
                self._prune(stream)
            # else it lives, or a reset came in the same bytes, whose event must still find it
        elif isinstance(event, StreamReset):
            stream._reset = True
            stream._received.clear()
            if stream in self._incoming:
                self._incoming.remove(stream)
            stream._wake()
            self._prune(stream)

    # What our streams did

    def _wake_writer(self) -> None:
        self._writer.unpark_all()

    def _consumed(self, stream_id: int, n: int) -> None:
        self._connection.consumed(stream_id, n)
        if self._connection.wants_to_send:
            self._wake_writer()

    def _closed_by_us(self, stream: Stream, *, torn: bool) -> None:
        if not self._connection.is_live(stream.stream_id):
            return
        if stream._received or torn:
            self._abort(stream)
            return
        if not stream._ended:
            self._connection.end_stream(stream.stream_id)
            self._wake_writer()
        self._prune(stream)
        if stream.stream_id in self._streams:
            self._lingering[stream.stream_id] = None
            if len(self._lingering) > MAX_LINGERING:
                self._abort(self._streams[next(iter(self._lingering))])

    def _abort(self, stream: Stream) -> None:
        self._connection.reset_stream(stream.stream_id)
        self._wake_writer()
        self._prune(stream)

    def _prune(self, stream: Stream) -> None:
        if not self._connection.is_live(stream.stream_id):
            self._streams.pop(stream.stream_id, None)
            self._lingering.pop(stream.stream_id, None)

    # The end

    def _stop(self, cause: Exception) -> None:
        self._end(cause)
        self._scope.cancel()

    def _end(self, cause: Exception) -> None:
        """Break every stream and every wait. The first cause counts."""
        if self._cause is not None:
            return
        self._cause = cause
        for stream in self._streams.values():
            stream._wake()
        self._streams.clear()
        self._incoming.clear()
        self._openers.unpark_all()
        self._acceptors.unpark_all()
        for answered in self._pings.values():
            answered.set()

    def _check_running(self, what: str) -> None:
        if self._cause is not None:
            self._raise_ended(what)

    def _raise_ended(self, what: str) -> NoReturn:
        raise trio.BrokenResourceError(f"{what}: the session ended: {self._cause}") from self._cause
