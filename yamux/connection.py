"""A yamux connection without its line: bytes in, events out, and an outbox of bytes to send.

How yamux works. Either side opens a stream by a frame with SYN; the client takes odd ids, the server even
ones, and none is used twice. Data may follow at once. The other side answers with ACK when its application
accepts the stream, or with RST to refuse it; the ACK can be missing, so any frame on the stream counts as
one. Each direction of a stream is bounded by credit (`window`) and ended by FIN; RST ends both at once, and
what is still in flight for a stream that is gone is thrown away without an answer. Ping is answered with the
same value. GoAway 0 says "no new streams, please", and any other reason ends the session.

The rule of this file: it answers what the protocol answers by itself (Ping, refusals, credit for consumed
bytes), it never decides when to read or write, and nothing that the peer does makes it remember more than the
windows and the backlog that we granted. Bodies are handed out as they come and never kept here.

Source: hashicorp/yamux, spec.md; session.go and stream.go for what the specification leaves open. Where they
are lax and no honest peer can notice (the parity of ids), this is strict.
"""

from __future__ import annotations

from yamux.errors import LocalProtocolError, RemoteProtocolError
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
from yamux.frames import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    HEADER,
    HEADER_SIZE,
    INITIAL_WINDOW,
    MAX_UINT32,
    NORMAL,
    PING,
    PROTOCOL_ERROR,
    RST,
    SESSION_ID,
    SYN,
    VERSION,
    WINDOW_UPDATE,
    encode_header,
)
from yamux.stream import CLOSED, RECEIVE_FIN, SEND_FIN, StreamState

BACKLOG = 256  # opened and not accepted yet, each way: const.go, DefaultConfig, AcceptBacklog

# Answers that we may owe. A peer that was stopped (a paused VM) finds a ping for every second that it missed;
# the newest ones are answered, and nobody waits for the others any more.
MAX_PINGS_OWED = 16
# A peer that keeps to the backlog has at most that many opens which we can refuse. Twice that is an attack.
MAX_REFUSALS_OWED = 2 * BACKLOG


class Connection:
    """One end of a session. `receive_data`, act, then write what `data_to_send` returns, in this order.

    `max_window` is how many bytes per stream the peer may have in flight towards us, at least 256 KiB;
    `backlog` how many streams it may open before we accept them (0 refuses all).
    """

    def __init__(self, *, client: bool, max_window: int = INITIAL_WINDOW, backlog: int = BACKLOG) -> None:
        if not INITIAL_WINDOW <= max_window <= MAX_UINT32:
            raise LocalProtocolError(
                f"window of {max_window} bytes: the protocol allows {INITIAL_WINDOW} to {MAX_UINT32}"
            )
        self.client = client
        self.closed = False  # by a protocol error, or a GoAway other than 0, of either side
        self.trailing_data = b""  # what came behind a GoAway that ended the session; see `resync`
        self.peer_reason: int | None = None  # of the GoAway that came, if one came
        self._max_window = max_window
        self._backlog = backlog
        self._streams: dict[int, StreamState] = {}
        self._next_id = 1 if client else 2
        self._unacknowledged = 0  # streams of ours that the peer has not answered
        self._unaccepted = 0  # streams of the peer that our application has not accepted
        self._refusing = False  # we sent GoAway
        # What we owe
        self._outbox = bytearray()
        self._pings_owed: list[int] = []
        self._refusals_owed = 0
        self._pings_sent: list[int] = []
        # Where we are in the peer's bytes
        self._partial = bytearray()  # of a header
        self._body_left = 0
        self._body_stream = SESSION_ID
        self._body_fin = False

    # The outbox

    @property
    def wants_to_send(self) -> bool:
        """Whether `data_to_send` would return anything."""
        return bool(self._outbox or self._pings_owed)

    def data_to_send(self) -> bytes:
        """Take everything out of the outbox. The bytes must be written whole and in the order taken."""
        if self._pings_owed:
            for value in self._pings_owed:
                self._outbox += encode_header(PING, ACK, SESSION_ID, value)
            self._pings_owed.clear()
        self._refusals_owed = 0
        data = bytes(self._outbox)
        self._outbox.clear()
        return data

    def _queue(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        self._outbox += encode_header(kind, flags, stream_id, length)

    # What we do

    @property
    def open_slots(self) -> int:
        """How many streams may be opened before the peer answers on one of those that it has not accepted."""
        return BACKLOG - self._unacknowledged

    def open_stream(self) -> int:
        """Open a stream; returns its id. Data may be sent at once."""
        if self.closed:
            raise LocalProtocolError("cannot open a stream: the session is over")
        if self.peer_reason is not None:
            raise LocalProtocolError("cannot open a stream: the peer said GoAway and takes no new ones")
        if not self.open_slots:
            raise LocalProtocolError(
                f"cannot open a stream: {BACKLOG} await the peer's answer; wait for StreamAcknowledged"
            )
        if self._next_id > MAX_UINT32:
            raise LocalProtocolError("cannot open a stream: the session's ids are used up; start a new one")
        stream_id = self._next_id
        self._next_id += 2
        stream = self._streams[stream_id] = StreamState(ours=True, max_window=self._max_window)
        self._unacknowledged += 1
        self._queue(WINDOW_UPDATE, SYN, stream_id, stream.receive_window.announce())
        return stream_id

    def accept_stream(self, stream_id: int) -> None:
        """Tell the peer that a stream of its own, announced by StreamOpened, is ours to serve."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.acknowledged or stream.ours:
            raise LocalProtocolError(f"stream {stream_id} does not wait to be accepted")
        stream.acknowledged = True
        self._unaccepted -= 1
        self._queue(WINDOW_UPDATE, ACK, stream_id, stream.receive_window.announce())

    def is_live(self, stream_id: int) -> bool:
        """Whether the stream is known: opened, not reset, and not ended by both sides."""
        return stream_id in self._streams

    def send_credit(self, stream_id: int) -> int:
        """Bytes that may be sent on the stream now; 0 if it is gone or our direction has ended."""
        stream = self._streams.get(stream_id)
        return stream.send_window.credit if stream is not None and stream.can_send else 0

    def data_header(self, stream_id: int, n: int) -> bytes:
        """Spend `n` bytes of credit; returns what must be written directly before the `n` bytes of data.

        That is the whole outbox and the header, so that a large body needs no copy to be sent: write the
        returned bytes and the body in one go (`writev`), and nothing between them.
        """
        self._spend(stream_id, n)
        return self.data_to_send() + encode_header(DATA, 0, stream_id, n)

    def send_data(self, stream_id: int, data: bytes) -> None:
        """Put data into the outbox, within the stream's credit. For small pieces: it copies."""
        self._spend(stream_id, len(data))
        self._queue(DATA, 0, stream_id, len(data))
        self._outbox += data

    def _spend(self, stream_id: int, n: int) -> None:
        stream = self._may_send(stream_id)
        if n <= 0:
            raise LocalProtocolError(f"a Data frame of {n} bytes on stream {stream_id} would say nothing")
        if not stream.send_window.spend(n):
            raise LocalProtocolError(
                f"{n} bytes on stream {stream_id}, but its credit is {stream.send_window.credit}"
            )

    def end_stream(self, stream_id: int) -> None:
        """Say that we send nothing more on this stream (FIN). The other direction goes on."""
        stream = self._may_send(stream_id)
        stream.move(SEND_FIN)
        self._queue(WINDOW_UPDATE, FIN, stream_id, 0)
        if stream.state is CLOSED:
            self._forget(stream_id)

    def reset_stream(self, stream_id: int) -> None:
        """Abort a stream, or refuse one; nothing happens if it is gone already."""
        if stream_id in self._streams:
            self._forget(stream_id)
            self._queue(WINDOW_UPDATE, RST, stream_id, 0)

    def consumed(self, stream_id: int, n: int) -> None:
        """Give credit back for `n` bytes of DataReceived that the application took.

        Does nothing if the stream is gone.
        """
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        if not 0 <= n <= stream.delivered:
            raise LocalProtocolError(
                f"{n} bytes consumed on stream {stream_id}, but only {stream.delivered} are unconsumed"
            )
        stream.delivered -= n
        delta = stream.receive_window.consume(n)
        if delta and stream.can_receive:
            self._queue(WINDOW_UPDATE, 0, stream_id, delta)

    def ping(self, value: int) -> None:
        """Ask the peer to answer with this 32-bit value; PingAcknowledged brings the answer."""
        if not 0 <= value <= MAX_UINT32:
            raise LocalProtocolError(f"ping value {value} does not fit in 32 bits")
        self._pings_sent.append(value)
        del self._pings_sent[:-MAX_PINGS_OWED]  # the peer may never answer
        self._queue(PING, SYN, SESSION_ID, value)

    def go_away(self, reason: int = NORMAL) -> None:
        """Refuse streams from now on (0), or end the session (any other reason). Once is enough."""
        if self.closed or (self._refusing and reason == NORMAL):
            return
        self._refusing = True
        self._queue(GO_AWAY, 0, SESSION_ID, reason)
        if reason != NORMAL:
            self._close()

    def _may_send(self, stream_id: int) -> StreamState:
        stream = self._streams.get(stream_id)
        if stream is None:
            raise LocalProtocolError(f"no stream {stream_id}: never opened, closed by both sides, or reset")
        if not stream.can_send:
            raise LocalProtocolError(f"stream {stream_id} was ended by us already")
        if not stream.ours and not stream.acknowledged:
            raise LocalProtocolError(f"stream {stream_id} is not accepted yet")
        return stream

    def _forget(self, stream_id: int) -> None:
        stream = self._streams.pop(stream_id)
        if not stream.acknowledged:
            if stream.ours:
                self._unacknowledged -= 1
            else:
                self._unaccepted -= 1

    def _close(self) -> None:
        self.closed = True
        self._streams.clear()
        self._unacknowledged = self._unaccepted = 0
        self._pings_owed.clear()

    # What the peer does

    @property
    def mid_frame(self) -> bool:
        """Whether the peer's bytes stop inside a frame, so that an end of the line here is no orderly one."""
        return bool(self._partial or self._body_left)

    def receive_data(self, data: bytes) -> list[Event]:
        """Take in bytes of the peer, cut anywhere; returns what they mean, in order.

        Raises:
            RemoteProtocolError: the peer broke the protocol. The session is over; send the outbox and close.

        """
        if self.closed:
            return []
        events: list[Event] = []
        position, end = 0, len(data)
        try:
            while position < end and not self.closed:
                if self._body_left:
                    n = min(self._body_left, end - position)
                    self._body(data, position, n, events)
                elif self._partial or end - position < HEADER_SIZE:
                    n = min(HEADER_SIZE - len(self._partial), end - position)
                    self._partial += data[position : position + n]
                    if len(self._partial) == HEADER_SIZE:
                        header = HEADER.unpack(self._partial)
                        self._partial.clear()
                        self._frame(header, events)
                else:
                    n = HEADER_SIZE
                    self._frame(HEADER.unpack_from(data, position), events)
                position += n
        except RemoteProtocolError as error:
            error.events = events
            raise
        self.trailing_data = data[position:]
        return events

    def _body(self, data: bytes, position: int, n: int, events: list[Event]) -> None:
        self._body_left -= n
        stream = self._streams.get(self._body_stream)
        if stream is None:  # unknown, refused or reset: spec.md has us throw its data away
            return
        stream.delivered += n
        events.append(DataReceived(self._body_stream, data[position : position + n]))
        if self._body_fin and not self._body_left:
            self._fin(self._body_stream, stream, events)

    def _frame(self, header: tuple[int, int, int, int, int], events: list[Event]) -> None:
        version, kind, flags, stream_id, length = header
        if version != VERSION:
            raise self._broken(f"frame of version {version}, not {VERSION}", silently=True)
        if kind in (DATA, WINDOW_UPDATE):
            self._stream_frame(kind, flags, stream_id, length, events)
        elif kind == PING:
            self._ping_frame(flags, length, events)
        elif kind == GO_AWAY:
            self._go_away_frame(length, events)
        else:
            raise self._broken(f"frame of unknown type {kind}", silently=True)

    def _ping_frame(self, flags: int, value: int, events: list[Event]) -> None:
        if flags & SYN:
            self._pings_owed.append(value)
            del self._pings_owed[:-MAX_PINGS_OWED]
        elif value in self._pings_sent:
            self._pings_sent.remove(value)
            events.append(PingAcknowledged(value))

    def _go_away_frame(self, reason: int, events: list[Event]) -> None:
        if self.peer_reason is None or reason != NORMAL:
            self.peer_reason = reason
            events.append(GoAwayReceived(reason))
        if reason != NORMAL:
            self._close()

    def _stream_frame(self, kind: int, flags: int, stream_id: int, length: int, events: list[Event]) -> None:
        if flags & SYN:
            self._opened(stream_id, events)
        if kind == DATA:
            self._body_left, self._body_stream, self._body_fin = length, stream_id, False
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        if stream.ours and not stream.acknowledged:
            stream.acknowledged = True
            self._unacknowledged -= 1
            events.append(StreamAcknowledged(stream_id))
        if flags & RST:
            self._forget(stream_id)
            events.append(StreamReset(stream_id))
            return
        if length and kind == WINDOW_UPDATE:
            stream.send_window.grant(length)
            if stream.can_send:
                events.append(CreditGranted(stream_id))
        elif length:
            self._arrived(stream_id, stream, length)
        if flags & FIN:
            if kind == DATA and length:
                self._body_fin = True
            else:
                self._fin(stream_id, stream, events)

    def _opened(self, stream_id: int, events: list[Event]) -> None:
        if stream_id == SESSION_ID or stream_id % 2 == self.client:
            raise self._broken(f"SYN for stream {stream_id}, an id that is not the peer's to choose")
        if stream_id in self._streams:
            raise self._broken(f"SYN for stream {stream_id}, which is open already")
        if self._refusing or self._unaccepted >= self._backlog:
            self._refusals_owed += 1
            if self._refusals_owed > MAX_REFUSALS_OWED:
                raise self._broken(f"{MAX_REFUSALS_OWED} refusals of new streams not read")
            self._queue(WINDOW_UPDATE, RST, stream_id, 0)
            return
        self._streams[stream_id] = StreamState(ours=False, max_window=self._max_window)
        self._unaccepted += 1
        events.append(StreamOpened(stream_id))

    def _arrived(self, stream_id: int, stream: StreamState, length: int) -> None:
        if not stream.can_receive:
            raise self._broken(f"{length} bytes on stream {stream_id} after its FIN")
        if not stream.receive_window.arrive(length):
            raise self._broken(
                f"{length} bytes on stream {stream_id}, whose credit is {stream.receive_window.credit}"
            )

    def _fin(self, stream_id: int, stream: StreamState, events: list[Event]) -> None:
        if not stream.move(RECEIVE_FIN):
            raise self._broken(f"second FIN on stream {stream_id}")
        events.append(StreamEnded(stream_id))
        if stream.state is CLOSED:
            self._forget(stream_id)

    def _broken(self, what: str, *, silently: bool = False) -> RemoteProtocolError:
        """End the session because of the peer. `silently` if it would not understand."""
        if not silently:
            self._queue(GO_AWAY, 0, SESSION_ID, PROTOCOL_ERROR)
        self._close()
        return RemoteProtocolError(f"yamux peer broke the protocol: {what}")
