"""A yamux session over a trio stream. It, `trio_stream` and `serial` are where trio lives here.

Two tasks, owned by whoever runs `Session.run`: one reads and never waits for a consumer, one writes and is
the only one to do so. What the protocol answers waits in the connection's outbox and is written before data;
data of all streams goes out in turns of one chunk, taken straight from the caller's buffer. A frame that is
begun is finished, also when the session is cancelled, because the other end may outlive us on a line that has
no end (`resync`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable

import trio
from trio.lowlevel import ParkingLot, checkpoint, checkpoint_if_cancelled

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
from yamux.trio_stream import Shared, Stream

READ_SIZE = 128 * 1024  # bytes
GRACE = 1.0  # seconds; to finish a frame, to say GoAway, to read what is left, when the session ends


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
        self._shared = Shared(self._connection)
        self._keepalive = keepalive
        self._first_bytes = first_bytes
        self._incoming: deque[Stream] = deque()
        self._openers = ParkingLot()
        self._acceptors = ParkingLot()
        self._pings: dict[int, trio.Event] = {}
        self._last_ping = 0
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
                with an error, or did not answer a keepalive.
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
        if isinstance(self._shared.cause, (trio.BrokenResourceError, RemoteProtocolError)):
            raise self._shared.cause

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
        self._shared.wake_writer()
        return self._shared.new_stream(stream_id)

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
        self._shared.wake_writer()
        return stream

    def go_away(self) -> None:
        """Refuse streams that the peer opens from now on. The others go on."""
        self._connection.go_away(NORMAL)
        self._shared.wake_writer()

    async def ping(self) -> None:
        """Wait for the peer to answer a ping."""
        self._check_running("cannot ping")
        value = self._last_ping = (self._last_ping + 1) & MAX_UINT32
        answered = self._pings[value] = trio.Event()
        self._connection.ping(value)
        self._shared.wake_writer()
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
            self._shared.wake_writer()

    async def _write(self) -> None:
        while True:
            await checkpoint_if_cancelled()
            data = self._next_to_write()
            if not data:
                await self._shared.writer.park()
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
        buffers, finished = self._shared.turns.next_write()
        for stream_id in finished:
            self._shared.streams[stream_id].on_credit()
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
                stream = self._shared.streams.get(event.stream_id)
                if stream is not None:
                    stream.on_data(event.data)
            elif isinstance(event, GoAwayReceived):
                self._openers.unpark_all()
                if event.reason != NORMAL:
                    raise trio.BrokenResourceError(f"the peer ended the session with GoAway {event.reason}")
            elif isinstance(event, PingAcknowledged):
                if event.value in self._pings:
                    self._pings[event.value].set()
            elif isinstance(event, StreamOpened):
                self._incoming.append(self._shared.new_stream(event.stream_id))
                self._acceptors.unpark()
            elif isinstance(event, (CreditGranted, StreamAcknowledged, StreamEnded, StreamReset)):
                self._stream_event(self._shared.streams.get(event.stream_id), event)

    def _stream_event(self, stream: Stream | None, event: Event) -> None:
        if isinstance(event, (StreamAcknowledged, StreamReset)):
            self._openers.unpark_all()
        if stream is None:
            return
        if isinstance(event, CreditGranted):
            self._shared.turns.granted(stream.stream_id)
            self._shared.wake_writer()
            stream.on_credit()
        elif isinstance(event, StreamEnded):
            stream.on_end()
        elif isinstance(event, StreamReset):
            if stream in self._incoming:
                self._incoming.remove(stream)
            stream.on_reset()

    # The end

    def _stop(self, cause: Exception) -> None:
        self._end(cause)
        self._scope.cancel()

    def _end(self, cause: Exception) -> None:
        """Break every stream and every wait. The first cause counts."""
        if self._shared.cause is not None:
            return
        self._shared.cause = cause
        for stream in self._shared.streams.values():
            stream.wake()
        self._shared.streams.clear()
        self._incoming.clear()
        self._openers.unpark_all()
        self._acceptors.unpark_all()
        for answered in self._pings.values():
            answered.set()

    def _check_running(self, what: str) -> None:
        if self._shared.cause is not None:
            self._shared.raise_ended(what)
