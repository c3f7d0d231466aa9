"""Start a session on a line that has no connection, and may be full of an older session's bytes.

A serial port between host and guest is open before either side runs and stays when one of them dies. What the
old session left in it (the rest of a frame, whole frames nobody read) would be taken for the new one's. So
each session begins with a handshake, in frames that a yamux peer understands in any case (`frames`):

    initiator (host)    GoAway(protocol error)    Ping SYN nonce
    responder (guest)                                               Ping ACK nonce    Ping ACK ~nonce    ...

The initiator throws away everything up to the exact 12 bytes of the last answer to its own nonce. The
responder throws away everything up to a Ping SYN, and answers. The session's first byte is the one behind the
last answer, or behind the Ping. A responder that is still in an older session leaves it because of the
GoAway; `Connection.trailing_data` then holds the bytes behind, which belong into the next Responder.

Why two answers: a guest in the middle of an old frame of which just 12 bytes are missing swallows the GoAway
and answers the Ping out of the old session, as any session does. Only a responder sends the second answer,
whose value is the nonce with all bits inverted, and nobody asks for it otherwise.

A guest that swallows the handshake sends no second answer. The initiator's driver then closes the line, which
the guest notices, and tries again with a new nonce. A Ping that lies in stale data can fool a responder once,
and the same retry cures it, because stale bytes are finite. A peer that knows nothing of all this (a stock
agent) gives the first answer; do without GoAway, which would end its session each time, and without the
second.

The rule of this file: memory is bounded by one frame header, whatever arrives. Time-outs, retries and the
choice of nonces are the driver's.
"""

from __future__ import annotations

from yamux.errors import LocalProtocolError
from yamux.frames import (
    ACK,
    GO_AWAY,
    HEADER,
    HEADER_SIZE,
    MAX_UINT32,
    PING,
    PROTOCOL_ERROR,
    SESSION_ID,
    SYN,
    encode_header,
)

# What the second answer's value is XORed with
SECOND_ANSWER = MAX_UINT32
# All of a Ping SYN but its value
PING_SYN = encode_header(PING, SYN, SESSION_ID, 0)[:8]


class _Side:
    """What both sides do: hunt for one frame, and keep what comes behind it."""

    def __init__(self) -> None:
        self.done = False
        self.trailing_data = b""  # the session's first bytes, once done
        self._tail = b""  # the last bytes, which may be the beginning of the frame
        self._outbox = b""

    def data_to_send(self) -> bytes:
        """Take the bytes to write."""
        data, self._outbox = self._outbox, b""
        return data

    def receive_data(self, data: bytes) -> bool:
        """Look for the frame; True once it is there. What came behind it is in `trailing_data`."""
        if self.done:
            self.trailing_data += data
            return True
        data = self._tail + data
        begin, self._tail = self._find(data)
        if begin < 0:
            return False
        self.done = True
        self.trailing_data = data[begin + HEADER_SIZE :]
        return True

    def _find(self, data: bytes) -> tuple[int, bytes]:
        """Return where the frame begins, -1 if it is not there, and what may be the beginning of it."""
        raise NotImplementedError


class Initiator(_Side):
    """The side that begins. Send `data_to_send`, feed what comes to `receive_data` until it returns True.

    `nonce` is a 32-bit value that no earlier attempt on this line used: take a random one.
    `stock_peer`: the peer has no Responder; send no GoAway, and be content with what any session answers.
    """

    def __init__(self, *, nonce: int, stock_peer: bool = False) -> None:
        super().__init__()
        if not 0 <= nonce <= MAX_UINT32:
            raise LocalProtocolError(f"nonce {nonce} does not fit in 32 bits")
        self._answer = encode_header(PING, ACK, SESSION_ID, nonce if stock_peer else nonce ^ SECOND_ANSWER)
        self._outbox = encode_header(PING, SYN, SESSION_ID, nonce)
        if not stock_peer:
            self._outbox = encode_header(GO_AWAY, 0, SESSION_ID, PROTOCOL_ERROR) + self._outbox

    def _find(self, data: bytes) -> tuple[int, bytes]:
        found = data.find(self._answer)
        return found, data[-(HEADER_SIZE - 1) :] if found < 0 else b""


class Responder(_Side):
    """The side that waits. Feed what comes to `receive_data` until it returns True, then send `data_to_send`.

    The answer must leave before the first byte of the new session, and after anything of the old one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nonce: int | None = None

    def _find(self, data: bytes) -> tuple[int, bytes]:
        found = data.find(PING_SYN)
        if found < 0:
            return -1, data[-(len(PING_SYN) - 1) :]
        if len(data) - found < HEADER_SIZE:
            return -1, data[found:]
        self.nonce = HEADER.unpack_from(data, found)[4]
        for value in (self.nonce, self.nonce ^ SECOND_ANSWER):
            self._outbox += encode_header(PING, ACK, SESSION_ID, value)
        return found, b""
