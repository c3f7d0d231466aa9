"""A ttrpc server on trio streams.

    server = Server()
    server.add_service(health_pb2.DESCRIPTOR.services_by_name["Health"], Health())
    await server.serve_listeners([trio.SocketListener(sock)])

    class Health:
        async def check(self, request: CheckRequest, context: Context) -> HealthCheckResponse: ...

Each call is one task in the nursery of its connection; an exception of a handler becomes a status and
ends neither. What a handler looks like depends on the kind of its method:

    unary          async def name(self, request, context) -> response
    server stream  async def name(self, request, context) -> None        await context.send(message)
    client stream  async def name(self, requests, context) -> response   async for message in requests
    bidirectional  async def name(self, requests, context) -> None       both

and None stands for the response google.protobuf.Empty.

A client that has only stopped sending still gets its answers. When the connection is gone, its handlers
are cancelled, unless the server is told to let them finish.
"""

from __future__ import annotations

import logging
import math
import select
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple

import trio
from google.protobuf.empty_pb2 import Empty

from ttrpc import methods
from ttrpc.connection import MAX_UNREAD, ServerConnection
from ttrpc.events import CallFailed, CallReceived, Event, MessageReceived, Metadata
from ttrpc.frames import MAX_DATA_LENGTH
from ttrpc.status import Code, Status, StatusError, unexpected
from ttrpc.status import status_of as default_status_of

if TYPE_CHECKING:
    from google.protobuf.descriptor import ServiceDescriptor
    from google.protobuf.message import Message

logger = logging.getLogger("ttrpc")

StatusOf = Callable[[BaseException], Status | None]
# Which messages a handler takes and returns is known to its author and to the tables, not to the types.
Handler = Callable[[Any, "Context"], Awaitable["Message | None"]]

SEND_BUFFER = 1 << 20  # bytes; `Context.send` waits while more than this is queued on the connection
# Bytes; nothing more is read from a client that does not read its answers. Two frames of the largest size.
QUEUE_LIMIT = 2 * MAX_DATA_LENGTH


class PeerCredentials(NamedTuple):
    """Who was at the other end of a unix socket when it connected."""

    pid: int
    uid: int
    gid: int


_UCRED = Struct("iII")  # struct ucred: linux/socket.h


def peer_credentials(stream: trio.SocketStream) -> PeerCredentials:
    """Return the peer's process, effective user and group: SO_PEERCRED of unix(7)."""
    data = stream.socket.getsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_PEERCRED, _UCRED.size)
    return PeerCredentials(*_UCRED.unpack(data))


class Server:
    """Services, and how their handlers are treated.

    `status_of` makes a status of a handler's exception. None means that nobody foresaw it: it is logged with
    its traceback and answered with UNKNOWN. With `finish_handlers_on_disconnect` a handler goes on when its
    connection is gone, which is right where a half-done job is worse than an answer that nobody gets.
    """

    def __init__(
        self,
        *,
        status_of: StatusOf = default_status_of,
        finish_handlers_on_disconnect: bool = False,
        max_unread: int = MAX_UNREAD,
    ) -> None:
        self.finish_handlers_on_disconnect = finish_handlers_on_disconnect
        self.max_unread = max_unread
        self.tables: dict[str, methods.ServiceTable] = {}
        self._handlers: dict[methods.AnyMethod, Handler] = {}
        self._status_of = status_of

    def add_service(self, descriptor: ServiceDescriptor, implementation: object) -> None:
        """Serve a service with the methods of an object that bear the names of its methods in snake case.

        A method that the object lacks is answered with UNIMPLEMENTED. One object may serve several
        services, such as two versions of one.
        """
        name = descriptor.full_name
        if name in self.tables:
            raise ValueError(f"service {name} has been added before")
        table: methods.ServiceTable = {}
        for method in methods.service(descriptor).values():
            handler = getattr(implementation, method.attribute, None)
            if handler is not None:
                table[method.name] = method
                self._handlers[method] = handler
        self.tables[name] = table

    def handler(self, method: methods.AnyMethod) -> Handler:
        """Return what serves this method."""
        return self._handlers[method]

    def status(self, exc: BaseException, method: methods.AnyMethod) -> Status:
        """Return the status for a handler's exception, and log the exception if nobody foresaw it."""
        try:
            status = self._status_of(exc)
        except Exception:
            logger.exception("%r: status_of failed", method)
            status = None
        if status is None:
            logger.error("%r: unexpected exception in the handler", method, exc_info=exc)
            status = unexpected(exc)
        return status

    async def serve_stream(self, stream: trio.abc.Stream) -> None:
        """Serve one connection until it has ended and its handlers with it; then close the stream."""
        await _Connection(self, stream).serve()

    async def serve_listeners(
        self,
        listeners: Sequence[trio.abc.Listener[trio.SocketStream]],
        *,
        allow_peer: Callable[[PeerCredentials], bool] | None = None,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve every connection that comes in, until cancelled.

        Without a word, as the protocol has it, those of peers that `allow_peer` refuses are closed.
        """

        async def serve(stream: trio.SocketStream) -> None:
            try:
                if allow_peer is None or allow_peer(peer_credentials(stream)):
                    await self.serve_stream(stream)
                else:
                    await trio.aclose_forcefully(stream)
            except Exception:
                # A bug, but one connection's: the others must not pay for it.
                logger.exception("connection ended by an unexpected exception")

        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, serve, list(listeners))
            task_status.started()


class RequestStream:
    """The messages that a client sends, in order; an async iterator."""

    def __init__(self, connection: ServerConnection, stream_id: int) -> None:
        self._connection = connection
        self._stream_id = stream_id
        self._messages: deque[MessageReceived] = deque()
        self._end: Status | None = None  # OK: the client has finished
        self._changed = trio.lowlevel.ParkingLot()

    async def receive(self) -> Any:
        """Return the next message.

        Raises trio.EndOfChannel after the last one, StatusError if the client broke off.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._messages and self._end is None:
            await self._changed.park()
        if self._messages:
            event = self._messages.popleft()
            self._connection.acknowledge(self._stream_id, event.cost)
            return event.message
        assert self._end is not None
        if self._end.code == Code.OK:
            raise trio.EndOfChannel
        raise StatusError(self._end.code, self._end.message)

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None

    def add_nowait(self, event: MessageReceived) -> None:
        """For the connection: append a message."""
        self._messages.append(event)
        self._changed.unpark_all()

    def end_nowait(self, status: Status) -> None:
        """For the connection: nothing follows."""
        if self._end is None:
            self._end = status
        self._changed.unpark_all()


class Context:
    """What a handler knows of its call beside the request, and may do beside answering it."""

    def __init__(self, connection: _Connection, event: CallReceived) -> None:
        self.method: methods.AnyMethod = event.method
        self.metadata: Metadata = event.metadata
        timeout = event.timeout_nano / 1e9 if event.timeout_nano else math.inf
        self.scope = trio.CancelScope(deadline=trio.current_time() + timeout)
        self.requests = RequestStream(connection.protocol, event.stream_id)
        self.callbacks: list[Callable[[], object]] = []
        self._connection = connection
        self._stream_id = event.stream_id

    @property
    def deadline(self) -> float:
        """When the handler will be cancelled, on trio's clock; infinity if never."""
        return self.scope.deadline

    def get(self, key: str, default: str | None = None) -> str | None:
        """Return the first metadata value of a key."""
        return next((value for name, value in self.metadata if name == key), default)

    def after_reply(self, callback: Callable[[], object]) -> None:
        """Call `callback` once the answer has been handed to the stream, or once nobody can get it."""
        self.callbacks.append(callback)

    async def send(self, message: Message) -> None:
        """Send one message of a stream; waits while much is queued.

        Raises StatusError, RESOURCE_EXHAUSTED, for a message too large for a frame.
        """
        await self._connection.send(self._stream_id, message)


class _Connection:
    """One connection: a reader, a writer, and a task for each call."""

    def __init__(self, server: Server, stream: trio.abc.Stream) -> None:
        self.protocol = ServerConnection(server.tables, max_unread=server.max_unread)
        self._server = server
        self._stream = stream
        self._calls: dict[int, Context] = {}
        self._handlers: trio.Nursery
        self._reading = trio.CancelScope()
        self._watching = trio.CancelScope()
        self._work = trio.lowlevel.ParkingLot()  # the writer, while there is nothing to write
        self._room = trio.lowlevel.ParkingLot()  # reader and senders, while there is too much
        self._after_write: list[Callable[[], object]] = []
        self._gone = False  # nobody can get an answer any more
        self._answered = False  # all handlers have ended

    async def serve(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                async with trio.open_nursery() as self._handlers:
                    with self._reading:
                        await self._read()
                    if self._gone:
                        await trio.aclose_forcefully(self._stream)
                    else:
                        nursery.start_soon(self._watch_for_hangup)
                self._answered = True
                self._watching.cancel()
                self._work.unpark_all()
        finally:
            self._gone = True
            self._run_callbacks()
            await trio.aclose_forcefully(self._stream)

    async def send(self, stream_id: int, message: Message) -> None:
        while self.protocol.queued_bytes > SEND_BUFFER and not self._gone:
            await self._room.park()
        self.protocol.send_message(stream_id, message)
        self._work.unpark_all()
        await trio.lowlevel.checkpoint()

    async def _read(self) -> None:
        try:
            while True:
                while self.protocol.queued_bytes > QUEUE_LIMIT:
                    await self._room.park()
                data = await self._stream.receive_some()
                if not data:
                    break
                for event in self.protocol.receive_data(data):
                    self._dispatch(event)
                self._work.unpark_all()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._disconnected()
        for event in self.protocol.receive_eof():
            self._dispatch(event)

    def _dispatch(self, event: Event) -> None:
        if isinstance(event, CallReceived):
            context = Context(self, event)
            self._calls[event.stream_id] = context
            self._handlers.start_soon(self._handle, event, context)
            return
        call = self._calls.get(event.stream_id)
        if call is None:
            return  # answered, so its handler has ended
        if isinstance(event, MessageReceived):
            call.requests.add_nowait(event)
        elif isinstance(event, CallFailed):
            call.requests.end_nowait(event.status)
            if not self._server.finish_handlers_on_disconnect:
                call.scope.cancel()
        else:
            call.requests.end_nowait(Status(Code.OK))

    async def _handle(self, event: CallReceived, context: Context) -> None:
        try:
            with context.scope:
                await self._run_handler(event, context)
            if context.scope.cancelled_caught:
                text = f"{event.method!r} did not finish within {event.timeout_nano / 1e9} s"
                self.protocol.fail(event.stream_id, Status(Code.DEADLINE_EXCEEDED, text))
        finally:
            # No checkpoint since the answer was queued: the writer takes both at once.
            del self._calls[event.stream_id]
            self._after_write += context.callbacks
            if self._gone:
                self._run_callbacks()
            self._work.unpark_all()

    async def _run_handler(self, event: CallReceived, context: Context) -> None:
        method = event.method
        try:
            handler = self._server.handler(method)
            request = context.requests if method.client_streaming else event.request
            response = await handler(request, context)
            if method.server_streaming:
                self.protocol.finish(event.stream_id)
                return
            if response is None:
                if method.response_class is not Empty:
                    raise TypeError(f"the handler of {method!r} returned None")
                response = Empty()
            self.protocol.reply(event.stream_id, response)
        except Exception as exc:
            self.protocol.fail(event.stream_id, self._server.status(exc, method))

    async def _write(self) -> None:
        try:
            while True:
                while not self.protocol.queued_bytes and not self._after_write:
                    if self._answered:
                        return
                    await self._work.park()
                callbacks, self._after_write = self._after_write, []
                try:
                    await self._stream.send_all(self.protocol.data_to_send())
                finally:
                    _run(callbacks)
                self._room.unpark_all()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._disconnected()

    def _disconnected(self) -> None:
        self._gone = True
        self._run_callbacks()
        self._reading.cancel()
        if not self._server.finish_handlers_on_disconnect:
            self._handlers.cancel_scope.cancel()
        self._room.unpark_all()

    async def _watch_for_hangup(self) -> None:
        """After the end of input: notice when the client closes the other direction, too.

        Reading cannot tell the two apart, and writing only when there is something to write. An epoll
        instance with nothing asked for becomes readable at EPOLLHUP, which is both directions.
        """
        if not isinstance(self._stream, trio.SocketStream) or not self._calls:
            return
        with self._watching, select.epoll() as epoll:
            epoll.register(self._stream.socket.fileno(), 0)
            await trio.lowlevel.wait_readable(epoll.fileno())
            self._disconnected()

    def _run_callbacks(self) -> None:
        callbacks, self._after_write = self._after_write, []
        _run(callbacks)


def _run(callbacks: list[Callable[[], object]]) -> None:
    for callback in callbacks:
        try:
            callback()
        except Exception:  # a bug of one caller's: the others are called all the same
            logger.exception("a callback of after_reply failed: %r", callback)
