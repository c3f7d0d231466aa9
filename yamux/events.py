"""What a connection tells its driver. Plain classes: dataclasses cost the guest too much to import."""

from __future__ import annotations


class Event:
    """One thing that the peer did. Equal to another if class and fields are; not to be changed."""

    __slots__: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and all(
            getattr(self, f) == getattr(other, f) for f in self.__slots__
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        fields = ", ".join(f"{field}={getattr(self, field)!r}" for field in self.__slots__)
        return f"{type(self).__name__}({fields})"


class StreamEvent(Event):
    """Something about one stream."""

    __slots__ = ("stream_id",)

    def __init__(self, stream_id: int) -> None:
        self.stream_id = stream_id


class StreamOpened(StreamEvent):
    """The peer opened a stream. Answer with `accept_stream`, or refuse with `reset_stream`."""

    __slots__ = ()


class StreamAcknowledged(StreamEvent):
    """The peer has answered on a stream that we opened. Data could be sent before, too."""

    __slots__ = ()


class CreditGranted(StreamEvent):
    """The peer lets us send more on this stream; how much now, `send_credit` tells."""

    __slots__ = ()


class StreamEnded(StreamEvent):
    """The peer will send nothing more on this stream. Our direction goes on, if we have not ended it."""

    __slots__ = ()


class StreamReset(StreamEvent):
    """The peer aborted the stream: what was received is to be dropped, and the stream is forgotten."""

    __slots__ = ()


class DataReceived(Event):
    """A piece of a stream's data, cut anywhere. Report it as `consumed` once the application took it."""

    __slots__ = ("data", "stream_id")

    def __init__(self, stream_id: int, data: bytes) -> None:
        self.stream_id = stream_id
        self.data = data

    def __repr__(self) -> str:
        shown = repr(self.data) if len(self.data) <= 32 else f"<{len(self.data)} bytes>"
        return f"DataReceived(stream_id={self.stream_id}, data={shown})"


class PingAcknowledged(Event):
    """The answer to a ping of ours."""

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value


class GoAwayReceived(Event):
    """The peer takes no new streams (reason 0), or has ended the session (any other reason)."""

    __slots__ = ("reason",)

    def __init__(self, reason: int) -> None:
        self.reason = reason
