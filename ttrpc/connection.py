"""The ttrpc protocol as two state machines: bytes in and events out, method calls in and bytes out.

A client opens a stream by sending a Request on a new odd id and forgets the id when it has the outcome.
What goes over a stream depends on the kind of the method:

    kind           client sends                                server ends it with
    unary          Request, flags 0                            Response
    server stream  Request REMOTE_CLOSED                       Data..., then Data REMOTE_CLOSED|NO_DATA
    client stream  Request REMOTE_OPEN, Data..., closing Data  Response
    bidirectional  Request REMOTE_OPEN, Data..., closing Data  Data..., closing Data

and any call can end with a Response whose status is not OK. Nothing on the wire cancels a call: a client
that gives up forgets the id and later drops what still comes for it. There is no flow control either.

The rules of this file:
- A peer can break a stream, never the connection: `receive_data` takes every sequence of bytes without
  raising. A server answers what is wrong on the id that it came with.
- Each call has exactly one outcome. Moves for a call that is already over do nothing and return False,
  because peers, deadlines and handlers end calls without asking each other. Moves that are wrong for the
  kind of the method are bugs of the caller and raise LocalProtocolError.
- Taking an id and queueing its Request are one step, so ids leave in order, as servers demand.
- What a stream receives and nobody has consumed is counted; beyond the limit that stream fails.

Events are in `events`; all of this is h2's shape: `receive_data` returns a list of events, and what has
to be written, including answers that the protocol gives by itself, waits in `data_to_send`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from google.protobuf.message import DecodeError, Message

from protos.ttrpc import ttrpc_pb2
from ttrpc.events import (
    CallFailed,
    CallReceived,
    Event,
    MessageReceived,
    Metadata,
    ResponseReceived,
    StreamClosed,
)
from ttrpc.frames import (
    DATA,
    MAX_DATA_LENGTH,
    MAX_STREAM_ID,
    NO_DATA,
    REMOTE_CLOSED,
    REMOTE_OPEN,
    REQUEST,
    RESPONSE,
    Decoder,
    Frame,
    Oversized,
    encode_frame,
)
from ttrpc.status import Code, Status, StatusError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ttrpc.methods import AnyMethod

# Unconsumed messages of one stream, in bytes with MESSAGE_OVERHEAD each: four of the largest messages, or
# some ten thousands of small ones. A choice of ours; the Go implementation counts 64 messages of any size.
MAX_UNREAD = 16 << 20
MESSAGE_OVERHEAD = 256  # about what an empty message object takes

# Characters of a status message that are sent: keeps an error Response far below the frame's limit.
MAX_STATUS_MESSAGE = 64 << 10

_INT64_MAX = (1 << 63) - 1  # timeout_nano is an int64
_INT32_MAX = (1 << 31) - 1  # and a status code an int32

_M = TypeVar("_M", bound=Message)


class LocalProtocolError(Exception):
    """A move was asked for that the kind of the method does not have: a bug of the caller."""


class _StreamError(Exception):
    """What the peer sent is wrong; the stream ends with `status`."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.status = Status(code, message)


class _Stream:
    """State of one call that is not over."""

    __slots__ = ("local_open", "method", "remote_open", "unread")

    def __init__(self, method: AnyMethod, *, local_open: bool, remote_open: bool) -> None:
        self.method = method
        self.local_open = local_open  # we may send Data
        self.remote_open = remote_open  # the peer may send Data
        self.unread = 0


class _Connection:
    """What both roles have: frames, an outbox and streams."""

    def __init__(self, max_unread: int, max_length: int = MAX_DATA_LENGTH) -> None:
        self._decoder = Decoder(max_length)
        self._max_length = max_length
        self._outbox: list[bytes] = []
        self._queued_bytes = 0
        self._streams: dict[int, _Stream] = {}
        self._max_unread = max_unread

    @property
    def queued_bytes(self) -> int:
        """How many bytes `data_to_send` would return."""
        return self._queued_bytes

    @property
    def open_calls(self) -> int:
        """How many calls are not over."""
        return len(self._streams)

    def is_open(self, stream_id: int) -> bool:
        """Tell whether this call is not over yet."""
        return stream_id in self._streams

    def data_to_send(self) -> bytes:
        """Take everything that has to be written to the peer, in this order and only once."""
        data = b"".join(self._outbox)
        self._outbox.clear()
        self._queued_bytes = 0
        return data

    def acknowledge(self, stream_id: int, cost: int) -> None:
        """Say that a message with this `MessageReceived.cost` has been consumed."""
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.unread -= cost

    def send_message(self, stream_id: int, message: Message) -> bool:
        """Queue one message of a stream that this side sends; False if the call is over.

        Raises StatusError, RESOURCE_EXHAUSTED, for a message too large for a frame; the call goes on.
        """
        stream = self._streams.get(stream_id)
        if stream is None:
            return False
        self._require_sending(stream_id, stream)
        data = message.SerializeToString()
        if len(data) > MAX_DATA_LENGTH:
            raise StatusError(Code.RESOURCE_EXHAUSTED, _too_large(stream.method, "message", len(data)))
        self._queue(stream_id, DATA, 0, data)
        return True

    def receive_data(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """Take bytes from the peer and return what they mean. Never raises, whatever they are."""
        events: list[Event] = []
        for frame in self._decoder.receive_data(data):
            try:
                self._receive(frame, events)
            except _StreamError as exc:
                self._peer_failed(frame.stream_id, exc.status, events)
        return events

    def _receive(self, frame: Frame | Oversized, events: list[Event]) -> None:
        raise NotImplementedError

    def _peer_failed(self, stream_id: int, status: Status, events: list[Event]) -> None:
        raise NotImplementedError

    def _queue(self, stream_id: int, kind: int, flags: int, data: bytes = b"") -> None:
        frame = encode_frame(stream_id, kind, flags, data)
        self._outbox.append(frame)
        self._queued_bytes += len(frame)

    def _require_sending(self, stream_id: int, stream: _Stream) -> None:
        if not stream.local_open:
            raise LocalProtocolError(f"stream {stream_id} of {stream.method!r} is not open for sending")

    def _receive_stream_data(
        self, frame: Frame, stream: _Stream, message_class: type[Message], events: list[Event]
    ) -> None:
        """Handle a Data frame of a stream that the peer may send on."""
        if not frame.flags & NO_DATA:
            # Counted before it is parsed, so that a peer cannot make us work on what will be thrown away.
            cost = len(frame.data) + MESSAGE_OVERHEAD
            if stream.unread + cost > self._max_unread:
                raise _StreamError(
                    Code.RESOURCE_EXHAUSTED,
                    f"stream buffer full: {stream.unread} bytes of {stream.method!r} wait to be read,"
                    f" the limit is {self._max_unread}",
                )
            message = _parse(message_class, frame.data, stream.method, Code.INTERNAL)
            stream.unread += cost
            events.append(MessageReceived(frame.stream_id, message, cost))
        if frame.flags & REMOTE_CLOSED:
            stream.remote_open = False
            events.append(StreamClosed(frame.stream_id))


class ServerConnection(_Connection):
    """The side that answers. `services` holds method tables (`methods.service`) by full service name.

    Requests that no table knows, or that cannot be decoded, are answered here and give no event.
    """

    def __init__(
        self, services: Mapping[str, Mapping[str, AnyMethod]], *, max_unread: int = MAX_UNREAD
    ) -> None:
        super().__init__(max_unread)
        self._services = services
        self._last_id = 0

    def reply(self, stream_id: int, response: Message) -> bool:
        """End a unary or client-streaming call with its answer; False if the call is over.

        An answer that is too large for a frame becomes the status RESOURCE_EXHAUSTED.
        """
        stream = self._streams.get(stream_id)
        if stream is None:
            return False
        if stream.method.server_streaming:
            raise LocalProtocolError(f"{stream.method!r} is ended with finish, not with one answer")
        payload = response.SerializeToString()
        data = ttrpc_pb2.Response(payload=payload).SerializeToString()
        if len(data) > MAX_DATA_LENGTH:
            text = _too_large(stream.method, "response", len(data))
            return self.fail(stream_id, Status(Code.RESOURCE_EXHAUSTED, text))
        del self._streams[stream_id]
        self._queue(stream_id, RESPONSE, 0, data)
        return True

    def finish(self, stream_id: int) -> bool:
        """End a server-streaming or bidirectional call well; False if the call is over."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return False
        self._require_sending(stream_id, stream)
        del self._streams[stream_id]
        self._queue(stream_id, DATA, REMOTE_CLOSED | NO_DATA)
        return True

    def fail(self, stream_id: int, status: Status) -> bool:
        """End any call with a status other than OK; False if the call is over."""
        if self._streams.pop(stream_id, None) is None:
            return False
        self._refuse(stream_id, status)
        return True

    def receive_eof(self) -> list[Event]:
        """Say that the peer has stopped sending: fails the calls whose client had not finished its stream.

        The others go on, for the peer may still be reading.
        """
        events: list[Event] = []
        for stream_id, stream in list(self._streams.items()):
            if stream.remote_open:
                text = f"the client closed the connection before its stream to {stream.method!r}"
                self._peer_failed(stream_id, Status(Code.CANCELLED, text), events)
        return events

    def _refuse(self, stream_id: int, status: Status) -> None:
        self._queue(stream_id, RESPONSE, 0, _encode_failure(status))

    def _peer_failed(self, stream_id: int, status: Status, events: list[Event]) -> None:
        if self._streams.pop(stream_id, None) is not None:
            events.append(CallFailed(stream_id, status))
        self._refuse(stream_id, status)

    def _receive(self, frame: Frame | Oversized, events: list[Event]) -> None:
        if frame.kind not in (REQUEST, DATA):
            return  # PROTOCOL.md reserves the other types; a server has no use for a Response
        if isinstance(frame, Oversized):
            if frame.kind == REQUEST:
                # It may carry the id of a call that runs, which is not to blame: refuse it, fail nothing.
                self._refuse(frame.stream_id, _oversized(frame, self._max_length))
                return
            raise _StreamError(Code.RESOURCE_EXHAUSTED, _oversized(frame, self._max_length).message)
        if frame.stream_id % 2 == 0:
            self._refuse_id(frame, "the ids of a client's streams are odd")
        elif frame.kind == REQUEST:
            if frame.stream_id <= self._last_id:
                self._refuse_id(frame, f"ids must go up, and {self._last_id} has been used")
            else:
                self._last_id = frame.stream_id
                self._receive_request(frame, events)
        else:
            self._receive_data_frame(frame, events)

    def _refuse_id(self, frame: Frame, why: str) -> None:
        self._refuse(frame.stream_id, Status(Code.INVALID_ARGUMENT, f"stream id {frame.stream_id}: {why}"))

    def _receive_data_frame(self, frame: Frame, events: list[Event]) -> None:
        stream = self._streams.get(frame.stream_id)
        if stream is None:
            self._refuse_id(frame, "no call is active on this stream")
        elif not stream.remote_open:
            text = f"{stream.method!r}: data after the end of the client's part"
            raise _StreamError(Code.INVALID_ARGUMENT, text)
        else:
            self._receive_stream_data(frame, stream, stream.method.request_class, events)

    def _receive_request(self, frame: Frame, events: list[Event]) -> None:
        request = _parse(ttrpc_pb2.Request, frame.data, None, Code.INVALID_ARGUMENT)
        table = self._services.get(request.service)
        if table is None:
            raise _StreamError(Code.UNIMPLEMENTED, f"service {request.service}")
        method = table.get(request.method)
        if method is None:
            raise _StreamError(Code.UNIMPLEMENTED, f"method {request.method}")
        # Whether the client streams is the method's matter: Go servers do not look at the flags either.
        # An empty payload of such a call stands for no message, as Go clients send it.
        message: Message | None = None
        if not method.client_streaming or request.payload:
            message = _parse(method.request_class, request.payload, method, Code.INTERNAL)
        if request.timeout_nano < 0:
            raise _StreamError(
                Code.DEADLINE_EXCEEDED, f"{method!r}: the deadline had passed when it was sent"
            )
        metadata = tuple((pair.key, pair.value) for pair in request.metadata)
        stream = _Stream(method, local_open=method.server_streaming, remote_open=method.client_streaming)
        self._streams[frame.stream_id] = stream
        first = None if method.client_streaming else message
        events.append(CallReceived(frame.stream_id, method, first, request.timeout_nano, metadata))
        if not method.client_streaming:
            return
        if message is not None:
            cost = len(request.payload) + MESSAGE_OVERHEAD
            stream.unread += cost
            events.append(MessageReceived(frame.stream_id, message, cost))
        if frame.flags & REMOTE_CLOSED:
            stream.remote_open = False
            events.append(StreamClosed(frame.stream_id))


class ClientConnection(_Connection):
    """The side that calls."""

    def __init__(self, *, max_unread: int = MAX_UNREAD, max_length: int = MAX_DATA_LENGTH) -> None:
        """`max_length`: bytes of an answer's frame; a server that sends more fails its call."""
        super().__init__(max_unread, max_length)
        self._next_id = 1

    def start_call(
        self,
        method: AnyMethod,
        request: Message | None,
        *,
        timeout_nano: int = 0,
        metadata: Metadata = (),
    ) -> int:
        """Queue a Request and return the id of its stream.

        `request` is None exactly if the client of this method sends a stream. `timeout_nano` is the time
        left, 0 for no limit.

        Raises StatusError, RESOURCE_EXHAUSTED, if the request is too large or all ids are used. Nothing
        has been queued then.
        """
        if (request is None) != method.client_streaming:
            raise LocalProtocolError(f"{method!r}: a request goes with a call whose client does not stream")
        payload = b"" if request is None else request.SerializeToString()
        data = ttrpc_pb2.Request(
            service=method.service,
            method=method.name,
            payload=payload,
            timeout_nano=min(timeout_nano, _INT64_MAX),
            metadata=[ttrpc_pb2.KeyValue(key=key, value=value) for key, value in metadata],
        ).SerializeToString()
        if len(data) > MAX_DATA_LENGTH:
            raise StatusError(Code.RESOURCE_EXHAUSTED, _too_large(method, "request", len(data)))
        if self._next_id > MAX_STREAM_ID:
            text = f"{method!r}: all stream ids of this connection are used; open a new one"
            raise StatusError(Code.RESOURCE_EXHAUSTED, text)
        stream_id = self._next_id
        self._next_id += 2
        stream = _Stream(method, local_open=method.client_streaming, remote_open=method.server_streaming)
        self._streams[stream_id] = stream
        flags = REMOTE_CLOSED if method.server_streaming else 0
        self._queue(stream_id, REQUEST, REMOTE_OPEN if method.client_streaming else flags, data)
        return stream_id

    def close_send(self, stream_id: int) -> bool:
        """End the client's part of a stream; False if the call is over."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return False
        self._require_sending(stream_id, stream)
        stream.local_open = False
        # A frame of its own: Go servers refuse a closing frame with a message in it.
        self._queue(stream_id, DATA, REMOTE_CLOSED | NO_DATA)
        return True

    def forget(self, stream_id: int) -> bool:
        """Give a call up: whatever still comes for it is dropped; False if it was over."""
        return self._streams.pop(stream_id, None) is not None

    def receive_eof(self) -> list[Event]:
        """Say that the peer has stopped sending: every call that is not over fails as UNAVAILABLE."""
        lost = sorted(self._streams.items())
        self._streams.clear()
        text = "the connection ended before the answer of"
        return [CallFailed(key, Status(Code.UNAVAILABLE, f"{text} {call.method!r}")) for key, call in lost]

    def _peer_failed(self, stream_id: int, status: Status, events: list[Event]) -> None:
        if self._streams.pop(stream_id, None) is not None:
            events.append(CallFailed(stream_id, status))

    def _receive(self, frame: Frame | Oversized, events: list[Event]) -> None:
        stream = self._streams.get(frame.stream_id)
        if stream is None or frame.kind not in (RESPONSE, DATA):
            return  # late, or of a type that PROTOCOL.md reserves
        if isinstance(frame, Oversized):
            text = _oversized(frame, self._max_length).message
            raise _StreamError(Code.RESOURCE_EXHAUSTED, f"{stream.method!r}: {text}")
        if frame.kind == RESPONSE:
            self._receive_response(frame, stream, events)
        elif not stream.method.server_streaming:
            raise _StreamError(
                Code.INTERNAL, f"{stream.method!r}: the server sent a stream instead of an answer"
            )
        else:
            self._receive_stream_data(frame, stream, stream.method.response_class, events)
            if not stream.remote_open:
                del self._streams[frame.stream_id]

    def _receive_response(self, frame: Frame, stream: _Stream, events: list[Event]) -> None:
        response = _parse(ttrpc_pb2.Response, frame.data, stream.method, Code.INTERNAL)
        # Success is no status to some servers and code 0 to others: ttrpc in Go and in Rust.
        if response.status.code != Code.OK:
            raise _StreamError(response.status.code, response.status.message)
        message = _parse(stream.method.response_class, response.payload, stream.method, Code.INTERNAL)
        del self._streams[frame.stream_id]
        if not stream.method.server_streaming:
            events.append(ResponseReceived(frame.stream_id, message))
            return
        if response.payload:
            events.append(MessageReceived(frame.stream_id, message, len(response.payload) + MESSAGE_OVERHEAD))
        events.append(StreamClosed(frame.stream_id))


def _parse(message_class: type[_M], data: bytes, method: AnyMethod | None, code: Code) -> _M:
    try:
        return message_class.FromString(data)
    except DecodeError as exc:
        where = f"{method!r}: " if method is not None else ""
        text = f"{where}{len(data)} bytes are no {message_class.DESCRIPTOR.full_name}: {exc}"
        raise _StreamError(code, text) from exc


def _encode_failure(status: Status) -> bytes:
    """Return an error Response, with whatever cannot travel replaced: this is the last resort of a call."""
    code, message = status.code, status.message
    if code == Code.OK or abs(code) > _INT32_MAX:
        message = f"{message} (with {code} as its status code, which is no failure's)"
        code = Code.UNKNOWN
    # Texts of exceptions may hold surrogates (names of files do), which are no UTF-8.
    message = message[:MAX_STATUS_MESSAGE].encode("utf-8", "replace").decode()
    return ttrpc_pb2.Response(status=ttrpc_pb2.Status(code=code, message=message)).SerializeToString()


def _oversized(frame: Oversized, limit: int) -> Status:
    text = f"a frame of {frame.length} bytes exceeds the limit of {limit}"
    return Status(Code.RESOURCE_EXHAUSTED, text)


def _too_large(method: AnyMethod, what: str, length: int) -> str:
    return f"{method!r}: a {what} of {length} bytes does not fit into a frame of {MAX_DATA_LENGTH}"
