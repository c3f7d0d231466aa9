"""A line that holds an older session's bytes: whatever they are, the new session gets only its own."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from yamux.connection import Connection
from yamux.errors import LocalProtocolError, RemoteProtocolError
from yamux.events import DataReceived, Event, GoAwayReceived, StreamOpened
from yamux.frames import (
    ACK,
    DATA,
    GO_AWAY,
    INITIAL_WINDOW,
    PING,
    PROTOCOL_ERROR,
    SYN,
    WINDOW_UPDATE,
    encode_header,
)
from yamux.resync import Initiator, Responder

NONCE = 0xC0FFEE01
FIRST_ANSWER = encode_header(PING, ACK, 0, NONCE)
ANSWER = encode_header(PING, ACK, 0, 0xFFFFFFFF - NONCE)
OPENING = encode_header(GO_AWAY, 0, 0, PROTOCOL_ERROR) + encode_header(PING, SYN, 0, NONCE)

FRAME_LIKE = st.builds(
    encode_header, st.integers(0, 5), st.integers(0, 15), st.integers(0, 3), st.sampled_from([0, 7, NONCE])
)
# Bytes that an old session may have left: noise, frames, and beginnings of what the other side hunts for
STALE = st.lists(
    st.one_of(
        st.binary(max_size=40),
        FRAME_LIKE,
        st.just(FIRST_ANSWER),
        st.integers(1, 11).map(lambda n: ANSWER[:n]),
        st.integers(1, 11).map(lambda n: OPENING[12 : 12 + n]),
    ),
    max_size=8,
).map(b"".join)
CUTS = st.lists(st.integers(1, 40), max_size=30)


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces = []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    return [piece for piece in [*pieces, data] if piece]


@given(STALE, st.binary(max_size=60), CUTS)
@example(ANSWER[:11], b"", [11])
@example(ANSWER[:4], b"x", [1] * 16)
def test_the_initiator_finds_the_answer_behind_any_stale_bytes(
    stale: bytes, session: bytes, sizes: list[int]
) -> None:
    whole = stale + ANSWER + session
    found = whole.index(ANSWER)
    initiator = Initiator(nonce=NONCE)
    assert initiator.data_to_send() == OPENING
    eaten = 0
    for piece in cut(whole, sizes):
        eaten += len(piece)
        assert initiator.receive_data(piece) is (eaten >= found + 12)
    assert initiator.done
    assert initiator.trailing_data == whole[found + 12 :]
    assert initiator.data_to_send() == b""


@given(STALE, st.binary(max_size=60), CUTS)
@example(OPENING[:23], b"", [23])
@example(OPENING[12:19], b"", [7])
def test_the_responder_starts_behind_the_first_ping_whatever_came_before(
    stale: bytes, session: bytes, sizes: list[int]
) -> None:
    whole = stale + OPENING + session
    found = whole.index(OPENING[12:20])
    responder = Responder()
    eaten = 0
    for piece in cut(whole, sizes):
        eaten += len(piece)
        assert responder.receive_data(piece) is (eaten >= found + 12)
    assert responder.nonce == int.from_bytes(whole[found + 8 : found + 12], "big")
    assert responder.data_to_send() == (
        encode_header(PING, ACK, 0, responder.nonce)
        + encode_header(PING, ACK, 0, 0xFFFFFFFF - responder.nonce)
    )
    assert responder.trailing_data == whole[found + 12 :]


def test_memory_is_bounded_while_hunting() -> None:
    for hunter in (Initiator(nonce=NONCE), Responder()):
        for _ in range(1000):
            assert not hunter.receive_data(bytes(1000))
        assert len(hunter._tail) < 12


def test_answers_to_other_nonces_are_stale() -> None:
    initiator = Initiator(nonce=NONCE)
    assert not initiator.receive_data(encode_header(PING, ACK, 0, NONCE - 1))
    assert initiator.receive_data(ANSWER)


def test_a_stock_peer_is_spared_the_go_away() -> None:
    initiator = Initiator(nonce=NONCE, stock_peer=True)
    assert initiator.data_to_send() == encode_header(PING, SYN, 0, NONCE)
    # A stock agent needs no Responder: any connection answers a ping.
    stock = Connection(client=False)
    assert stock.receive_data(encode_header(PING, SYN, 0, NONCE)) == []
    assert initiator.receive_data(stock.data_to_send())


def test_a_guest_of_ours_serves_a_host_that_takes_it_for_a_stock_one() -> None:
    initiator, responder = Initiator(nonce=NONCE, stock_peer=True), Responder()
    assert responder.receive_data(initiator.data_to_send())
    assert initiator.receive_data(responder.data_to_send())
    host = Connection(client=True)
    assert host.receive_data(initiator.trailing_data) == []


def test_an_answer_out_of_the_old_session_is_not_taken_for_the_new_ones() -> None:
    """The old frame lacks as many bytes as a GoAway has: the Ping behind it reaches the old session."""
    guest = Guest()
    host = shake_hands(guest, 1, b"", [])
    assert host is not None
    session_works(guest, host, 0)
    guest.receive(encode_header(DATA, 0, 1, 12))
    assert shake_hands(guest, 2, b"", []) is None
    guest.hang_up()
    host = shake_hands(guest, 3, b"", [])
    assert host is not None
    session_works(guest, host, 1)


def test_a_nonce_has_32_bits() -> None:
    with pytest.raises(LocalProtocolError):
        Initiator(nonce=1 << 32)


class Guest:
    """The guest's driver as it should be: hunt, carry a session, and hunt again when it ends."""

    def __init__(self) -> None:
        self.responder: Responder | None = Responder()
        self.connection: Connection | None = None
        self.output = b""
        self.events: list[Event] = []

    def receive(self, data: bytes) -> None:
        while data:
            if self.responder is not None:
                if not self.responder.receive_data(data):
                    return
                self.output += self.responder.data_to_send()
                data = self.responder.trailing_data
                self.responder, self.connection = None, Connection(client=False)
                continue
            assert self.connection is not None
            try:
                self.events += self.connection.receive_data(data)
            except RemoteProtocolError:
                self.hang_up()
                return
            self.output += self.connection.data_to_send()
            data = self.connection.trailing_data
            if self.connection.closed:
                self.hang_up()

    def hang_up(self) -> None:
        """The host closed the line, or the session is over."""
        self.responder, self.connection = Responder(), None


def session_works(guest: Guest, host: Connection, number: int) -> None:
    """Open a stream, send on it, and get data back on it, in the session that the two just began."""
    guest.events.clear()
    stream_id = host.open_stream()
    said = b"session %d" % number
    host.send_data(stream_id, said)
    guest.receive(host.data_to_send())
    assert guest.events == [StreamOpened(stream_id), DataReceived(stream_id, said)]
    assert guest.connection is not None
    guest.connection.accept_stream(stream_id)
    guest.connection.send_data(stream_id, said[::-1])
    events = host.receive_data(guest.connection.data_to_send())
    assert events[-1] == DataReceived(stream_id, said[::-1])


def shake_hands(guest: Guest, nonce: int, line: bytes, sizes: list[int]) -> Connection | None:
    """One attempt of the host on a line on which `line` waits for it; None if no answer would ever come."""
    initiator = Initiator(nonce=nonce)
    for piece in cut(initiator.data_to_send(), sizes):
        guest.receive(piece)
    for piece in cut(line + guest.output, sizes):
        initiator.receive_data(piece)
    guest.output = b""
    if not initiator.done:
        return None
    assert initiator.trailing_data == b""
    return Connection(client=True)


# How an old session may be left: the host's half-written frame has this much body to go, or there is none
OUTSTANDING = st.one_of(st.none(), st.integers(1, 60), st.integers(1, INITIAL_WINDOW))


@settings(deadline=None)
@given(st.lists(st.tuples(OUTSTANDING, STALE, STALE, st.booleans(), CUTS), min_size=1, max_size=6))
def test_either_side_restarts_again_and_again(
    rounds: list[tuple[int | None, bytes, bytes, bool, list[int]]],
) -> None:
    """Each round begins a session, uses it, and leaves it as a crash would."""
    guest = Guest()
    nonce = 1 << 20  # beyond the numbers in STALE
    line = b""
    for number, (outstanding, stale_input, stale_output, guest_restarts, sizes) in enumerate(rounds):
        nonce += 1
        host = shake_hands(guest, nonce, line, sizes)
        if host is None:
            # Time is out: the host closes the line, the guest notices, and is clean for the second attempt.
            guest.hang_up()
            nonce += 1
            host = shake_hands(guest, nonce, line, sizes)
        assert host is not None
        session_works(guest, host, number)
        if outstanding is not None:
            guest.receive(encode_header(DATA, 0, 1, outstanding))
        if guest_restarts:
            guest = Guest()
        guest.receive(stale_input)
        line = stale_output


def test_a_guest_between_two_frames_of_an_old_session_needs_no_second_attempt() -> None:
    guest = Guest()
    host = shake_hands(guest, 1, b"", [])
    assert host is not None
    session_works(guest, host, 0)
    guest.events.clear()
    host = shake_hands(guest, 2, b"stale output of the guest", [])
    assert guest.events == [GoAwayReceived(PROTOCOL_ERROR)]
    assert host is not None
    session_works(guest, host, 1)


def test_an_opening_that_lies_in_stale_input_fools_the_guest_only_once() -> None:
    guest = Guest()
    body = OPENING + encode_header(DATA, SYN, 1, 5000)
    guest.receive(b"end of an old frame" + body)
    assert shake_hands(guest, 5, b"", []) is None
    guest.hang_up()
    host = shake_hands(guest, 6, b"", [])
    assert host is not None
    session_works(guest, host, 0)


def test_an_earlier_attempt_in_the_line_is_passed_over() -> None:
    """The first initiator died after writing; its handshake is in front of the second one's."""
    guest = Guest()
    guest.receive(Initiator(nonce=1).data_to_send())
    host = shake_hands(guest, 2, b"", [3])
    assert host is not None
    session_works(guest, host, 0)


def test_a_window_update_that_looks_like_the_answer_in_other_bytes_is_not_it() -> None:
    initiator = Initiator(nonce=NONCE)
    assert not initiator.receive_data(encode_header(WINDOW_UPDATE, ACK, 0, NONCE))
    assert not initiator.receive_data(encode_header(GO_AWAY, ACK, 0, NONCE))
