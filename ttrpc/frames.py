"""ttrpc frames: bytes to frames and back. This file does not know what a frame means.

    offset  size  field (big-endian)
    0       4     length of the data, header not counted, at most 4 MiB
    4       4     stream id: a client takes odd ones, upwards
    8       1     type: 1 request, 2 response, 3 data; others are skipped
    9       1     flags, whose meaning depends on the type
    10            data: a protobuf message

Nothing here can fail: every sequence of bytes is a sequence of frames. A frame whose announced length is
beyond the limit is reported at once and its data thrown away as it comes in, so 4 GiB can be announced
but never have to be stored.
"""

from __future__ import annotations

from struct import Struct

HEADER = Struct(">IIBB")  # ttrpc PROTOCOL.md, "Message Frame"
MAX_DATA_LENGTH = 4 << 20  # bytes; that length itself is legal: ttrpc channel.go, messageLengthMax
MAX_STREAM_ID = 0xFFFFFFFF  # the field's width

# Types: ttrpc PROTOCOL.md, "Message Types".
REQUEST = 1
RESPONSE = 2
DATA = 3

# Flags: ttrpc PROTOCOL.md, "Flags" of each type.
REMOTE_CLOSED = 0x01  # the sender sends nothing more on this stream
REMOTE_OPEN = 0x02  # on a request: data frames of the sender will follow
NO_DATA = 0x04  # on a data frame: there is no message in it, which is not the same as an empty message


class Frame:
    """One frame as it came in."""

    __slots__ = ("data", "flags", "kind", "stream_id")

    def __init__(self, stream_id: int, kind: int, flags: int, data: bytes) -> None:
        self.stream_id = stream_id
        self.kind = kind
        self.flags = flags
        self.data = data

    def __repr__(self) -> str:
        return f"Frame({self.stream_id}, {self.kind}, {self.flags:#04x}, {len(self.data)} bytes)"


class Oversized:
    """The header of a frame beyond the limit; its data will be skipped."""

    __slots__ = ("kind", "length", "stream_id")

    def __init__(self, stream_id: int, kind: int, length: int) -> None:
        self.stream_id = stream_id
        self.kind = kind
        self.length = length

    def __repr__(self) -> str:
        return f"Oversized({self.stream_id}, {self.kind}, {self.length} bytes)"


def encode_frame(stream_id: int, kind: int, flags: int, data: bytes = b"") -> bytes:
    """Return the bytes of a frame. The caller has checked the length of the data."""
    return HEADER.pack(len(data), stream_id, kind, flags) + data


class Decoder:
    """Cuts incoming bytes into frames. Holds less than one frame of the largest size."""

    __slots__ = ("_buffer", "_max_length", "_skip")

    def __init__(self, max_length: int = MAX_DATA_LENGTH) -> None:
        """`max_length`: bytes of data in a frame; a longer one is skipped."""
        self._max_length = max_length
        self._buffer = bytearray()
        self._skip = 0  # bytes of an oversized frame that are still to come

    def receive_data(self, data: bytes | bytearray | memoryview) -> list[Frame | Oversized]:
        """Take bytes in and return the frames that are complete with them."""
        if self._skip:
            dropped = min(self._skip, len(data))
            self._skip -= dropped
            data = memoryview(data)[dropped:]
        self._buffer += data
        frames: list[Frame | Oversized] = []
        # One deletion at the end: each deletion at the front of a bytearray may move the rest.
        offset = 0
        while len(self._buffer) - offset >= HEADER.size:
            length, stream_id, kind, flags = HEADER.unpack_from(self._buffer, offset)
            end = offset + HEADER.size + length
            if length > self._max_length:
                frames.append(Oversized(stream_id, kind, length))
                self._skip = max(0, end - len(self._buffer))
                offset = min(end, len(self._buffer))
                continue
            if end > len(self._buffer):
                break
            frames.append(Frame(stream_id, kind, flags, bytes(self._buffer[offset + HEADER.size : end])))
            offset = end
        del self._buffer[:offset]
        return frames
