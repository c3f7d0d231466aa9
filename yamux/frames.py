"""The yamux frame header: constants, encoding, decoding. No state and no rule beyond the header lives here.

A frame is a 12-byte header, and a body if its type is Data. All numbers are big-endian:

    offset  size  field
    0       1     version, always 0
    1       1     type: 0 Data, 1 WindowUpdate, 2 Ping, 3 GoAway
    2       2     flags: 1 SYN, 2 ACK, 4 FIN, 8 RST
    4       4     stream id: odd if the client opened it, even if the server did, 0 for the session itself
    8       4     length: Data, bytes of the body; WindowUpdate, bytes of credit added;
                  Ping, an opaque value; GoAway, the reason

Source of every number here: hashicorp/yamux, spec.md ("Framing") and const.go.
"""

from __future__ import annotations

from struct import Struct

HEADER = Struct(">BBHII")
HEADER_SIZE = HEADER.size

VERSION = 0

# spec.md, "Type Field"
DATA = 0
WINDOW_UPDATE = 1
PING = 2
GO_AWAY = 3

# spec.md, "Flag Field"
SYN = 1
ACK = 2
FIN = 4
RST = 8

# spec.md, "Go Away": the reasons
NORMAL = 0
PROTOCOL_ERROR = 1
INTERNAL_ERROR = 2

SESSION_ID = 0  # spec.md, "StreamID Field"
MAX_UINT32 = 0xFFFFFFFF  # width of the stream id and length fields

INITIAL_WINDOW = (
    256 * 1024
)  # bytes per stream and direction: spec.md, "Flow Control"; const.go, initialStreamWindow


def encode_header(kind: int, flags: int, stream_id: int, length: int) -> bytes:
    """Return the 12 bytes of one header."""
    return HEADER.pack(VERSION, kind, flags, stream_id, length)
