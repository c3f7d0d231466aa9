"""A yamux session over a line, driven by threads: the guest's end of the virtio-serial port.

`yamux.connection` knows the protocol; this file moves its bytes. Two locks, and the rule that keeps them
from deadlocking: `lock` guards the protocol's state and is never held while waiting for the line;
`write_lock` is held while bytes are written, in the order in which they were taken. The reading thread
takes only the first one, so it goes on reading (and granting credit to writers) while the line is full.
"""

from __future__ import annotations

import os
import select
import threading
from typing import TYPE_CHECKING

from agent import log, threads
from agent.streams import ByteStream
from yamux.buffer import ByteQueue
from yamux.connection import Connection
from yamux.errors import LocalProtocolError, RemoteProtocolError
from yamux.events import (
    CreditGranted,
    DataReceived,
    Event,
    GoAwayReceived,
    StreamEnded,
    StreamEvent,
    StreamOpened,
    StreamReset,
)
from yamux.resync import Responder

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.streams import Buffer

# Bytes that are taken in at once. A virtio port gives a page at a time, and what comes after the reading (the
# protocol, waking a thread, a write to the process) costs the same for a page as for many.
READ_SIZE = 64 << 10
MAX_FRAME = 256 << 10  # bytes of one stream between two chances for the others


class Line:
    """A descriptor that bytes go through both ways. Whoever waits for it wakes when it is given up."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._gone = os.eventfd(0, os.EFD_CLOEXEC)
        self._buffer = memoryview(bytearray(READ_SIZE))

    def read(self) -> bytes:
        """Wait for bytes, and return all that have come by then; none means that the host has gone."""
        while True:
            try:
                return self._read_nowait()
            except BlockingIOError:
                self._wait(select.POLLIN)

    def _read_nowait(self) -> bytes:
        size = 0
        while size < READ_SIZE:
            try:
                came = os.readv(self._fd, [self._buffer[size:]])
            except OSError:
                if not size:
                    raise
                break  # an end that is there is found again
            if not came:
                break
            size += came
        return bytes(self._buffer[:size])

    def write(self, *pieces: Buffer) -> None:
        """Write all pieces, one behind the other."""
        views = [memoryview(piece) for piece in pieces if piece]
        while views:
            try:
                written = os.writev(self._fd, views)
            except BlockingIOError:
                self._wait(select.POLLOUT)
                continue
            while views and written >= len(views[0]):
                written -= len(views.pop(0))
            if written:
                views[0] = views[0][written:]

    def give_up(self) -> None:
        """Make everybody who waits or will wait fail."""
        os.eventfd_write(self._gone, 1)

    def _wait(self, events: int) -> None:
        poll = select.poll()
        poll.register(self._fd, events)
        poll.register(self._gone, select.POLLIN)
        for fd, ready in poll.poll():
            if fd == self._gone:
                raise ConnectionAbortedError("the session is over")
            # What the host left behind is still read; a port without a host polls as readable, too.
            if ready & select.POLLHUP and not ready & events:
                raise ConnectionResetError("the host has closed its end of the line")

    def __del__(self) -> None:
        os.close(self._gone)


class Session:
    """One session. `serve` runs it in the caller's thread; each stream of the host goes to `on_stream`."""

    def __init__(self, line: Line, on_stream: Callable[[ByteStream], None]) -> None:
        self.lock = threading.Lock()
        self.connection = Connection(client=False)
        self.over = False
        self._line = line
        self._on_stream = on_stream
        self._write_lock = threading.Lock()
        self._streams: dict[int, MuxStream] = {}

    def serve(self, first: bytes) -> bytes:
        """Run the session, whose first bytes are here already; returns what belongs to the next one."""
        try:
            data = first
            while True:
                if data and not self._receive(data):
                    break
                data = self._line.read()
                if not data:
                    break
        finally:
            self._end()
        return self.connection.trailing_data

    def flush(self) -> None:
        """Write what the protocol owes. Waits while the line is full."""
        self.write(0, b"")

    def write(self, stream_id: int, data: Buffer) -> None:
        """Write what the protocol owes, and data of a stream, whose credit must allow it."""
        with self._write_lock:
            with self.lock:
                connection = self.connection
                try:
                    head = connection.data_header(stream_id, len(data)) if data else connection.data_to_send()
                except LocalProtocolError as exc:  # the host has reset the stream since we looked
                    raise ConnectionResetError(f"stream {stream_id} is gone: {exc}") from exc
            if head:
                self._line.write(head, data)

    def _receive(self, data: bytes) -> bool:
        opened: list[MuxStream] = []
        with self.lock:
            try:
                events = self.connection.receive_data(data)
            except RemoteProtocolError as exc:
                log.warning("session ended", error=exc)
                events = exc.events
            for event in events:
                self._handle(event, opened)
            owing = self.connection.wants_to_send
        for stream in opened:
            threads.start("stream", self._on_stream, stream)
        if owing and not self.connection.closed:
            threads.start("flush", self.flush)
        return not self.connection.closed

    def _handle(self, event: Event, opened: list[MuxStream]) -> None:
        if isinstance(event, StreamOpened):
            stream = self._streams[event.stream_id] = MuxStream(self, event.stream_id)
            self.connection.accept_stream(event.stream_id)
            opened.append(stream)
        elif isinstance(event, (StreamEvent, DataReceived)):
            known = self._streams.get(event.stream_id)
            if known is None:
                return
            known.handle(event)
            self.forget(known)
        elif isinstance(event, GoAwayReceived):
            log.debug("the host says good-bye", reason=event.reason)

    def forget(self, stream: MuxStream) -> None:
        """Drop a stream that both sides have ended; under the lock."""
        if not self.connection.is_live(stream.stream_id):
            self._streams.pop(stream.stream_id, None)

    def _end(self) -> None:
        self._line.give_up()
        with self.lock:
            self.over = True
            for stream in self._streams.values():
                stream.abort()
            self._streams.clear()
        with self._write_lock:
            pass  # nobody writes any more when this returns


class MuxStream(ByteStream):
    """One stream of a session."""

    def __init__(self, session: Session, stream_id: int) -> None:
        self.stream_id = stream_id
        self._session = session
        self._changed = threading.Condition(session.lock)
        self._queue = ByteQueue()
        self._ended = False  # the host sends no more
        self._aborted = False  # by either side, or the session is over
        self._closed = False  # by us
        self._sending_ended = False  # by us; we may still receive

    def handle(self, event: Event) -> None:
        """Take note of what happened; under the session's lock."""
        if isinstance(event, DataReceived):
            if self._closed:
                self._session.connection.consumed(self.stream_id, len(event.data))
            else:
                self._queue.append(event.data)
        elif isinstance(event, StreamEnded):
            self._ended = True
        elif isinstance(event, StreamReset):
            self._aborted = True
        elif not isinstance(event, CreditGranted):
            return
        self._changed.notify_all()

    def abort(self) -> None:
        """Make all waits fail; under the session's lock."""
        self._aborted = True
        self._changed.notify_all()

    def receive(self, size: int) -> bytes:
        """Wait for some bytes."""
        session = self._session
        with session.lock:
            while not len(self._queue):
                if self._ended or self._closed:
                    return b""
                if self._aborted:
                    raise ConnectionResetError(f"stream {self.stream_id} is gone")
                self._changed.wait()
            data = self._queue.take(size)
            if not session.over:
                session.connection.consumed(self.stream_id, len(data))
            owing = session.connection.wants_to_send and not session.over
        if owing:
            try:
                session.flush()
            except OSError:
                pass  # what has been received is good
        return data

    def send(self, data: Buffer) -> None:
        """Send everything, as the host's window allows."""
        view = memoryview(data)
        while view:
            with self._session.lock:
                credit = self._wait_for_credit()
            n = min(credit, len(view), MAX_FRAME)
            self._session.write(self.stream_id, view[:n])
            view = view[n:]

    def _wait_for_credit(self) -> int:
        while True:
            if self._aborted or self._closed:
                raise ConnectionResetError(f"stream {self.stream_id} is gone")
            credit = self._session.connection.send_credit(self.stream_id)
            if credit:
                return credit
            self._changed.wait()

    def close_sending(self) -> None:
        """Half-close."""
        session = self._session
        with session.lock:
            if self._aborted or self._closed:
                raise ConnectionResetError(f"stream {self.stream_id} is gone")
            session.connection.end_stream(self.stream_id)
            session.forget(self)
            self._sending_ended = True
        session.flush()

    def close(self) -> None:
        """End our direction if that has not happened, and throw away what still comes."""
        session = self._session
        with session.lock:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            live = not self._aborted and session.connection.is_live(self.stream_id)
            if live:
                if not self._sending_ended:
                    session.connection.end_stream(self.stream_id)
                if len(self._queue):
                    session.connection.consumed(self.stream_id, len(self._queue))
                session.forget(self)
            self._queue.clear()
        if live:
            try:
                session.flush()
            except OSError:
                pass


def answer(line: Line, data: bytes, wait_for_host: Callable[[], None]) -> None:
    """Answer the opening of a session, which may be here before the news that there is a host.

    Bytes and news come to a virtio port by different queues. Until the news is there, it looks as if the host
    had gone; to forget its opening then would let it wait for an answer for seconds, until it comes again.
    """
    try:
        line.write(data)
    except ConnectionResetError:
        wait_for_host()
        line.write(data)


def serve_line(fd: int, on_stream: Callable[[ByteStream], None], wait_for_host: Callable[[], None]) -> None:
    """Serve sessions, one after the other, until the host hangs up. See `yamux.resync` for how one begins.

    `wait_for_host` blocks until there is a host at the other end.
    """
    trailing = b""
    while True:
        line = Line(fd)
        responder = Responder()
        data = trailing or line.read()
        while data and not responder.receive_data(data):
            data = line.read()
        if not data:
            return
        answer(line, responder.data_to_send(), wait_for_host)
        session = Session(line, on_stream)
        trailing = session.serve(responder.trailing_data)
        if not session.connection.closed:
            return
