"""What a connection tells its owner. Immutable by convention; equal by type and value.

Plain classes instead of dataclasses: the guest's agent imports this file at each boot, and `dataclasses`
(with `inspect` behind it) costs more there than everything else in this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from ttrpc.methods import AnyMethod
    from ttrpc.status import Status

Metadata = tuple[tuple[str, str], ...]  # key and value; a key may occur several times


class Event:
    """Base of all events: each concerns one call, which `stream_id` names."""

    __slots__ = ("stream_id",)

    def __init__(self, stream_id: int) -> None:
        self.stream_id = stream_id

    def _values(self) -> list[object]:
        slots = [name for cls in reversed(type(self).__mro__) for name in getattr(cls, "__slots__", ())]
        return [getattr(self, name) for name in slots]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Event):
            return NotImplemented
        return type(self) is type(other) and self._values() == other._values()

    __hash__ = None  # type: ignore[assignment]  # messages are mutable

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self._values()))})"


class CallReceived(Event):
    """Server: a new call. End it with `reply` or `fail` (for a server stream: `finish` or `fail`).

    `request` is the message of a method whose client sends exactly one; it is None where the client
    sends a stream, whose messages follow as `MessageReceived`.
    `timeout_nano` is the time that the caller still waits, in nanoseconds; 0 means that it waits for ever.
    """

    __slots__ = ("metadata", "method", "request", "timeout_nano")

    def __init__(
        self,
        stream_id: int,
        method: AnyMethod,
        request: Message | None,
        timeout_nano: int = 0,
        metadata: Metadata = (),
    ) -> None:
        super().__init__(stream_id)
        self.method = method
        self.request = request
        self.timeout_nano = timeout_nano
        self.metadata = metadata


class MessageReceived(Event):
    """Both: one message of a stream. Give `cost` back with `acknowledge` once it is consumed."""

    __slots__ = ("cost", "message")

    def __init__(self, stream_id: int, message: Message, cost: int) -> None:
        super().__init__(stream_id)
        self.message = message
        self.cost = cost


class StreamClosed(Event):
    """Both: the peer sends no more messages on this stream. To a client it means that the call went well."""

    __slots__ = ()


class ResponseReceived(Event):
    """Client: the call went well and this is its answer."""

    __slots__ = ("response",)

    def __init__(self, stream_id: int, response: Message) -> None:
        super().__init__(stream_id)
        self.response = response


class CallFailed(Event):
    """Both: the call is over without success and its id is forgotten.

    To a server it means that the client broke the rules of this stream and has been answered.
    """

    __slots__ = ("status",)

    def __init__(self, stream_id: int, status: Status) -> None:
        super().__init__(stream_id)
        self.status = status
