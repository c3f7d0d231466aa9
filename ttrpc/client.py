"""A ttrpc client on one trio stream.

    async with trio.open_nursery() as nursery:
        client = Client(await trio.open_unix_socket(path))
        nursery.start_soon(client.run)
        answer = await client.call(CHECK, CheckRequest(), timeout=5)

`run` is the connection's reader and writer; it returns when the connection has ended, whatever ended it.
From then on `closed` is set, and every call, pending or new, raises ConnectionClosed. The reader hands
messages over without ever waiting for whom they are for.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Generic, TypeVar, cast

import trio
from google.protobuf.message import Message

from ttrpc.connection import MAX_UNREAD, ClientConnection, LocalProtocolError
from ttrpc.events import CallFailed, Event, MessageReceived, ResponseReceived
from ttrpc.frames import MAX_DATA_LENGTH
from ttrpc.status import Code, StatusError

if TYPE_CHECKING:
    from types import TracebackType

    from ttrpc.methods import AnyMethod, Method

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)
MetadataLike = Mapping[str, str] | Iterable[tuple[str, str]]

SEND_BUFFER = 1 << 20  # bytes; a stream's `send` waits while more than this is queued on the connection
LAST_WORDS = 1.0  # seconds; how long answers are still read after writing has failed


class ConnectionClosed(Exception):
    """The connection has ended, so this call can have no answer. Whether it was carried out is unknown."""


class _Call:
    """The receiving side of one call: messages, then how it ended."""

    __slots__ = ("changed", "deadline", "ended", "error", "messages", "method", "stream_id")

    def __init__(self, stream_id: int, method: AnyMethod, deadline: float) -> None:
        self.stream_id = stream_id
        self.method = method
        self.deadline = deadline
        self.messages: deque[tuple[Message, int]] = deque()  # with their costs
        self.ended = False
        self.error: Exception | None = None  # why it failed
        self.changed = trio.lowlevel.ParkingLot()

    def end(self, error: Exception | None = None) -> None:
        self.ended = True
        self.error = error
        self.changed.unpark_all()

    def failure(self) -> Exception | None:
        """Return why the call failed, as a new exception: a traceback belongs to one raise."""
        return None if self.error is None else type(self.error)(*self.error.args)


class Client:
    """Calls on a connection that `run` serves; calls made earlier wait for it."""

    def __init__(
        self,
        stream: trio.abc.Stream,
        *,
        max_unread: int = MAX_UNREAD,
        max_length: int = MAX_DATA_LENGTH,
    ) -> None:
        """`max_unread` and `max_length`: see `ClientConnection`."""
        self.closed = trio.Event()
        self._stream = stream
        self._connection = ClientConnection(max_unread=max_unread, max_length=max_length)
        self._calls: dict[int, _Call] = {}
        self._work = trio.lowlevel.ParkingLot()  # the writer, while there is nothing to write
        self._room = trio.lowlevel.ParkingLot()  # senders, while there is too much
        self._reading = trio.CancelScope()
        self._reason = "by this side"

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Read and write until the connection ends, or until cancelled; then close the stream."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                task_status.started()
                with self._reading:
                    await self._read()
                nursery.cancel_scope.cancel()
        finally:
            self._end()
            await trio.aclose_forcefully(self._stream)

    async def aclose(self) -> None:
        """Close the stream, which ends `run`."""
        await self._stream.aclose()

    async def call(
        self,
        method: Method[Q, R],
        request: Q,
        *,
        timeout: float | None = None,
        metadata: MetadataLike = (),
    ) -> R:
        """Make a unary call and return its answer.

        `timeout` is in seconds and binds both sides: the server is told, and this side stops waiting.
        Raises StatusError for an answer other than OK, and ConnectionClosed.
        """
        if method.client_streaming or method.server_streaming:
            raise LocalProtocolError(f"{method!r} is not unary: use open_stream")
        async with self.open_stream(method, request, timeout=timeout, metadata=metadata) as stream:
            return await stream.receive()

    def open_stream(
        self,
        method: Method[Q, R],
        request: Q | None = None,
        *,
        timeout: float | None = None,
        metadata: MetadataLike = (),
    ) -> ClientStream[Q, R]:
        """Start a call of any kind; use the result as an async context manager, or close it.

        `request` is given exactly if the client of this method does not stream. `timeout` is for the call
        as a whole. Does not block. Raises StatusError and ConnectionClosed.
        """
        if self.closed.is_set():
            raise self._closed_error(method)
        timeout_nano, deadline = _times(timeout, method)
        pairs = tuple(metadata.items() if isinstance(metadata, Mapping) else metadata)
        stream_id = self._connection.start_call(method, request, timeout_nano=timeout_nano, metadata=pairs)
        call = _Call(stream_id, method, deadline)
        self._calls[stream_id] = call
        self._work.unpark_all()
        return ClientStream(self, call)

    # What follows is for ClientStream and run.

    async def _send(self, call: _Call, message: Message) -> None:
        while self._connection.queued_bytes > SEND_BUFFER and not call.ended:
            await self._room.park()
        if not self._connection.send_message(call.stream_id, message):
            raise call.failure() or trio.ClosedResourceError(f"{call.method!r} is over")
        self._work.unpark_all()
        await trio.lowlevel.checkpoint()

    def _close_send(self, call: _Call) -> None:
        if self._connection.close_send(call.stream_id):
            self._work.unpark_all()

    async def _receive(self, call: _Call) -> Message:
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.move_on_at(call.deadline):
            while not call.messages and not call.ended:
                await call.changed.park()
        if call.messages:
            message, cost = call.messages.popleft()
            self._connection.acknowledge(call.stream_id, cost)
            return message
        if not call.ended:
            self._forget(call)
            text = f"no answer of {call.method!r} within its timeout"
            call.end(StatusError(Code.DEADLINE_EXCEEDED, text))
        raise call.failure() or trio.EndOfChannel

    def _forget(self, call: _Call) -> None:
        self._connection.forget(call.stream_id)
        self._calls.pop(call.stream_id, None)
        call.end(call.error)

    def _closed_error(self, method: AnyMethod) -> ConnectionClosed:
        return ConnectionClosed(f"{method!r}: the connection has been closed {self._reason}")

    async def _write(self) -> None:
        try:
            while True:
                while not self._connection.queued_bytes:
                    await self._work.park()
                await self._stream.send_all(self._connection.data_to_send())
                self._room.unpark_all()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            self._reason = f"by an error: {exc.__cause__ or exc}"
            # The server may have answered before it closed: those answers are in flight, and the reader
            # finds them before the end. It need not find an end at all, hence the limit.
            self._reading.deadline = trio.current_time() + LAST_WORDS

    async def _read(self) -> None:
        try:
            while data := await self._stream.receive_some():
                for event in self._connection.receive_data(data):
                    self._deliver(event)
            self._reason = "by the server"
        except trio.BrokenResourceError as exc:
            self._reason = f"by an error: {exc.__cause__ or exc}"
        except trio.ClosedResourceError:
            pass  # aclose

    def _deliver(self, event: Event) -> None:
        call = self._calls[event.stream_id]
        if isinstance(event, MessageReceived):
            call.messages.append((event.message, event.cost))
            call.changed.unpark_all()
            return
        del self._calls[event.stream_id]
        if isinstance(event, ResponseReceived):
            call.messages.append((event.response, 0))
        if isinstance(event, CallFailed):
            call.end(StatusError(event.status.code, event.status.message))
        else:
            call.end()
        self._room.unpark_all()

    def _end(self) -> None:
        self.closed.set()
        self._connection.receive_eof()
        for call in self._calls.values():
            call.end(self._closed_error(call.method))
        self._calls.clear()
        self._room.unpark_all()


class ClientStream(Generic[Q, R]):
    """One call as its client sees it. Leaving the `async with` block before the end gives the call up."""

    def __init__(self, client: Client, call: _Call) -> None:
        self._client = client
        self._call = call

    async def send(self, message: Q) -> None:
        """Send one message; waits while much is queued. Raises like `receive` if the call is over."""
        await self._client._send(self._call, message)

    def close_send(self) -> None:
        """Say that no more messages follow."""
        self._client._close_send(self._call)

    async def receive(self) -> R:
        """Return the next message, or the one answer of a method that has one.

        Raises trio.EndOfChannel after the last one, StatusError if the call fails, ConnectionClosed.
        """
        return cast("R", await self._client._receive(self._call))

    async def close_and_receive(self) -> R:
        """Say that no more messages follow, and return the answer."""
        self.close_send()
        return await self.receive()

    def __aiter__(self) -> ClientStream[Q, R]:
        return self

    async def __anext__(self) -> R:
        try:
            return await self.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None

    async def aclose(self) -> None:
        """Give the call up if it is not over. Does not block."""
        self._client._forget(self._call)

    async def __aenter__(self) -> ClientStream[Q, R]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _times(timeout: float | None, method: AnyMethod) -> tuple[int, float]:
    """Return a timeout as it goes over the wire, and as a deadline of trio's clock."""
    if timeout is None or timeout == math.inf:
        return 0, math.inf
    if timeout <= 0:
        raise StatusError(
            Code.DEADLINE_EXCEEDED, f"{method!r}: the timeout is {timeout} s, so it was not sent"
        )
    return max(1, int(timeout * 1e9)), trio.current_time() + timeout
