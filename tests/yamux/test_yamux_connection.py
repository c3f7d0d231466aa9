"""One end of a connection, fed with what the Go implementation sent, and with what it never would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from yamux.connection import BACKLOG, MAX_PINGS_OWED, MAX_REFUSALS_OWED, Connection
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
    INITIAL_WINDOW,
    PING,
    PROTOCOL_ERROR,
    RST,
    SYN,
    WINDOW_UPDATE,
    encode_header,
)

CAPTURED = Path(__file__).parent.parent / "data" / "yamux"
MIB = 1 << 20


def captured(name: str) -> bytes:
    """Read a capture: one frame a line, xx*n for n times the byte xx."""
    data = bytearray()
    for line in (CAPTURED / f"{name}.hex").read_text().splitlines():
        for word in line.split() if not line.startswith("#") else ():
            byte, _, times = word.partition("*")
            data += bytes.fromhex(byte) * int(times or 1)
    return bytes(data)


def joined(events: list[Event]) -> list[Event]:
    """Put pieces of data together that only a cut of the input separates."""
    result: list[Event] = []
    for event in events:
        if isinstance(event, DataReceived) and result and isinstance(result[-1], DataReceived):
            last = result[-1]
            if last.stream_id == event.stream_id:
                result[-1] = DataReceived(event.stream_id, last.data + event.data)
                continue
        result.append(event)
    return result


def server() -> Connection:
    return Connection(client=False)


def opener(*, client: bool = True, streams: int = 1, max_window: int = INITIAL_WINDOW) -> Connection:
    connection = Connection(client=client, max_window=max_window)
    for _ in range(streams):
        connection.open_stream()
    connection.data_to_send()
    return connection


def pinger() -> Connection:
    connection = opener(streams=0)
    connection.ping(0)
    connection.data_to_send()
    return connection


def ended_opener(*, client: bool = True) -> Connection:
    connection = opener(client=client)
    connection.end_stream(1 if client else 2)
    connection.data_to_send()
    return connection


GO_SENT: list[tuple[str, Callable[[], Connection], list[Event]]] = [
    ("echo_c2s", server, [StreamOpened(1), DataReceived(1, b"hello"), StreamEnded(1)]),
    ("echo_s2c", opener, [StreamAcknowledged(1), DataReceived(1, b"world"), StreamEnded(1)]),
    (
        "window_c2s",
        server,
        [
            StreamOpened(1),
            DataReceived(1, b"a" * 50000 + b"b" * 50000 + b"c" * 50000),
            StreamEnded(1),
        ],
    ),
    ("window_s2c", ended_opener, [StreamAcknowledged(1), StreamEnded(1)]),
    (
        "large_window_c2s",
        lambda: opener(client=False),
        [StreamAcknowledged(2), CreditGranted(2), StreamEnded(2)],
    ),
    (
        "large_window_s2c",
        lambda: Connection(client=True),
        [StreamOpened(2), CreditGranted(2), DataReceived(2, b"x"), StreamEnded(2)],
    ),
    ("session_c2s", lambda: opener(client=False), [StreamAcknowledged(2), StreamEnded(2)]),
    (
        "session_s2c",
        pinger,
        [PingAcknowledged(0), GoAwayReceived(0), StreamOpened(2), StreamEnded(2)],
    ),
    ("refused_c2s", server, [StreamOpened(1), StreamOpened(3)]),
    ("refused_s2c", lambda: opener(streams=2), [StreamAcknowledged(3), StreamReset(3)]),
    # The reference sends no ACK here: the first Data stands for it.
    (
        "fin_before_accept_s2c",
        ended_opener,
        [StreamAcknowledged(1), DataReceived(1, b"late"), StreamEnded(1)],
    ),
    ("fin_before_accept_c2s", server, [StreamOpened(1), DataReceived(1, b"bye"), StreamEnded(1)]),
]


def named(rows: list[tuple[str, Callable[[], Connection], list[Event]]]) -> list[object]:
    return [pytest.param(*row, id=row[0]) for row in rows]


@pytest.mark.parametrize(("name", "make", "expected"), named(GO_SENT))
def test_captured_bytes_whole(name: str, make: Callable[[], Connection], expected: list[Event]) -> None:
    connection = make()
    assert joined(connection.receive_data(captured(name))) == expected
    assert not connection.mid_frame


@pytest.mark.parametrize(("name", "make", "expected"), named(GO_SENT))
def test_captured_bytes_one_by_one(name: str, make: Callable[[], Connection], expected: list[Event]) -> None:
    connection = make()
    data = captured(name)
    events = [event for i in range(len(data)) for event in connection.receive_data(data[i : i + 1])]
    assert joined(events) == expected


@pytest.mark.parametrize(("name", "make", "expected"), named(GO_SENT))
def test_captured_bytes_with_the_next_frame_behind(
    name: str, make: Callable[[], Connection], expected: list[Event]
) -> None:
    connection = make()
    assert joined(connection.receive_data(captured(name) + encode_header(PING, SYN, 0, 77))) == expected
    assert connection.data_to_send().endswith(encode_header(PING, ACK, 0, 77))


def test_we_send_what_go_sent_for_the_same_actions() -> None:
    client = Connection(client=True)
    client.open_stream()
    client.send_data(1, b"hello")
    client.receive_data(captured("echo_s2c"))
    client.end_stream(1)
    assert client.data_to_send() == captured("echo_c2s")
    assert not client.is_live(1)


def test_credit_is_given_back_as_go_gives_it() -> None:
    """The reference read 150,000 bytes in one go and gave them back in one update."""
    connection = server()
    events = connection.receive_data(captured("window_c2s")[: 12 + 3 * (12 + 50000)])
    connection.accept_stream(1)
    for event in events:
        if isinstance(event, DataReceived):
            connection.consumed(1, len(event.data))
    connection.end_stream(1)
    expected = [
        (WINDOW_UPDATE, ACK, 0),
        (WINDOW_UPDATE, 0, 150000),
        (WINDOW_UPDATE, FIN, 0),
    ]
    assert connection.data_to_send() == b"".join(encode_header(k, f, 1, n) for k, f, n in expected)
    assert captured("window_s2c") == b"".join(encode_header(k, f, 1, n) for k, f, n in expected)


def test_credit_is_given_back_only_from_half_a_window_on() -> None:
    connection = server()
    connection.receive_data(encode_header(WINDOW_UPDATE, SYN, 1, 0))
    connection.accept_stream(1)
    connection.receive_data(encode_header(DATA, 0, 1, 200000) + bytes(200000))
    connection.data_to_send()
    connection.consumed(1, INITIAL_WINDOW // 2 - 1)
    assert not connection.wants_to_send
    connection.consumed(1, 1)
    assert connection.data_to_send() == encode_header(WINDOW_UPDATE, 0, 1, INITIAL_WINDOW // 2)


def test_a_larger_window_is_announced_by_the_first_frame_both_ways() -> None:
    client = Connection(client=True, max_window=MIB)
    acceptor = Connection(client=False, max_window=MIB)
    client.open_stream()
    acceptor.receive_data(client.data_to_send())
    acceptor.accept_stream(1)
    client.receive_data(acceptor.data_to_send())
    assert client.send_credit(1) == acceptor.send_credit(1) == MIB
    client.send_data(1, bytes(MIB))
    assert (
        sum(len(e.data) for e in acceptor.receive_data(client.data_to_send()) if isinstance(e, DataReceived))
        == MIB
    )


def test_bodies_are_handed_out_before_the_frame_is_complete() -> None:
    connection = server()
    frame = encode_header(DATA, SYN | FIN, 1, 6) + b"abcdef"
    assert connection.receive_data(frame[:14]) == [StreamOpened(1), DataReceived(1, b"ab")]
    assert connection.mid_frame
    assert connection.receive_data(frame[14:]) == [DataReceived(1, b"cdef"), StreamEnded(1)]


def test_a_fin_ends_the_stream_of_its_own_frame_only() -> None:
    connection = server()
    data = encode_header(DATA, SYN | FIN, 1, 1) + b"a" + encode_header(DATA, SYN, 3, 1) + b"b"
    assert connection.receive_data(data) == [
        StreamOpened(1),
        DataReceived(1, b"a"),
        StreamEnded(1),
        StreamOpened(3),
        DataReceived(3, b"b"),
    ]


def test_a_peer_that_has_ended_its_direction_gets_no_more_credit() -> None:
    connection = server()
    connection.receive_data(encode_header(DATA, SYN | FIN, 1, INITIAL_WINDOW) + bytes(INITIAL_WINDOW))
    connection.accept_stream(1)
    connection.data_to_send()
    connection.consumed(1, INITIAL_WINDOW)
    assert not connection.wants_to_send


OPEN = encode_header(WINDOW_UPDATE, SYN, 1, 0)
# What the peer sends, and whether the reference answers with GoAway before it closes
FAULTS = [
    ("version", encode_header(PING, SYN, 0, 0).replace(b"\0", b"\1", 1), False),
    ("type", encode_header(4, 0, 0, 0), False),
    ("window", OPEN + encode_header(DATA, 0, 1, INITIAL_WINDOW + 1), True),
    ("duplicate SYN", OPEN + OPEN, True),
    ("own parity", encode_header(WINDOW_UPDATE, SYN, 2, 0), True),
    ("stream 0", encode_header(DATA, SYN, 0, 0), True),
    ("second FIN", OPEN + encode_header(WINDOW_UPDATE, FIN, 1, 0) * 2, True),
    ("data after FIN", OPEN + encode_header(WINDOW_UPDATE, FIN, 1, 0) + encode_header(DATA, 0, 1, 1), True),
]


@pytest.mark.parametrize(("data", "answered"), [pytest.param(d, a, id=n) for n, d, a in FAULTS])
@pytest.mark.parametrize("way", ["whole", "byte by byte", "next frame behind"])
def test_a_peer_that_breaks_the_protocol_ends_the_session(data: bytes, answered: bool, way: str) -> None:
    connection = server()
    with pytest.raises(RemoteProtocolError):
        if way == "byte by byte":
            for i in range(len(data)):
                connection.receive_data(data[i : i + 1])
        else:
            connection.receive_data(data + (OPEN if way == "next frame behind" else b""))
    assert connection.closed
    go_away = encode_header(GO_AWAY, 0, 0, PROTOCOL_ERROR)
    assert connection.data_to_send() == (go_away if answered else b"")
    assert connection.receive_data(OPEN) == []


def test_events_before_a_fault_are_not_lost() -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        server().receive_data(encode_header(DATA, SYN, 1, 1) + b"x" + b"\xff" * 12)
    assert caught.value.events == [StreamOpened(1), DataReceived(1, b"x")]


def test_a_whole_window_in_one_frame_is_legal() -> None:
    connection = server()
    events = connection.receive_data(OPEN + encode_header(DATA, 0, 1, INITIAL_WINDOW) + bytes(INITIAL_WINDOW))
    assert joined(events) == [StreamOpened(1), DataReceived(1, bytes(INITIAL_WINDOW))]


def test_frames_of_unknown_streams_are_discarded_without_an_answer() -> None:
    connection = server()
    for flags in (0, ACK, FIN, RST):
        frames = encode_header(DATA, flags, 7, 5) + b"stale" + encode_header(WINDOW_UPDATE, flags, 7, 5)
        assert connection.receive_data(frames) == []
    assert not connection.wants_to_send


def test_a_stream_reset_by_us_in_the_middle_of_a_frame_stays_silent() -> None:
    connection = server()
    frame = encode_header(DATA, SYN | FIN, 1, 4) + b"abcd"
    connection.receive_data(frame[:-2])
    connection.reset_stream(1)
    assert connection.data_to_send() == encode_header(WINDOW_UPDATE, RST, 1, 0)
    assert connection.receive_data(frame[-2:]) == []


def test_opens_beyond_the_backlog_are_refused() -> None:
    connection = Connection(client=False, backlog=2)
    opens = b"".join(encode_header(WINDOW_UPDATE, SYN, i, 0) for i in (1, 3, 5))
    assert connection.receive_data(opens) == [StreamOpened(1), StreamOpened(3)]
    assert connection.data_to_send() == encode_header(WINDOW_UPDATE, RST, 5, 0)
    connection.accept_stream(1)
    assert connection.receive_data(encode_header(WINDOW_UPDATE, SYN, 7, 0)) == [StreamOpened(7)]
    connection.receive_data(encode_header(WINDOW_UPDATE, RST, 3, 0))
    assert connection.receive_data(encode_header(WINDOW_UPDATE, SYN, 9, 0)) == [StreamOpened(9)]


def test_a_refused_open_with_data_loses_the_data_and_nothing_else() -> None:
    connection = Connection(client=False, backlog=0)
    data = encode_header(DATA, SYN, 1, 3) + b"abc" + encode_header(PING, SYN, 0, 1)
    assert connection.receive_data(data) == []
    assert connection.data_to_send() == encode_header(WINDOW_UPDATE, RST, 1, 0) + encode_header(
        PING, ACK, 0, 1
    )


def test_what_we_owe_to_a_peer_that_does_not_read_is_bounded() -> None:
    pinged = server()
    for value in range(100000):
        pinged.receive_data(encode_header(PING, SYN, 0, value))
    newest = range(100000 - MAX_PINGS_OWED, 100000)
    assert pinged.data_to_send() == b"".join(encode_header(PING, ACK, 0, value) for value in newest)

    flooded = Connection(client=False, backlog=0)
    with pytest.raises(RemoteProtocolError):
        for number in range(MAX_REFUSALS_OWED + 1):
            flooded.receive_data(encode_header(WINDOW_UPDATE, SYN, 2 * number + 1, 0))
    assert len(flooded.data_to_send()) == 12 * (MAX_REFUSALS_OWED + 1)


def test_credit_of_the_peer_is_capped_and_does_not_wrap() -> None:
    connection = opener()
    for _ in range(3):
        connection.receive_data(encode_header(WINDOW_UPDATE, 0, 1, 0xFFFFFFFF))
    assert connection.send_credit(1) == 0xFFFFFFFF


def test_go_away_zero_lets_streams_live_and_refuses_new_ones() -> None:
    connection = opener()
    assert connection.receive_data(encode_header(GO_AWAY, 0, 0, 0)) == [GoAwayReceived(0)]
    with pytest.raises(LocalProtocolError):
        connection.open_stream()
    connection.send_data(1, b"still here")
    connection.go_away()
    connection.go_away()
    connection.receive_data(encode_header(WINDOW_UPDATE, SYN, 2, 0))
    sent = encode_header(DATA, 0, 1, 10) + b"still here" + encode_header(GO_AWAY, 0, 0, 0)
    assert connection.data_to_send() == sent + encode_header(WINDOW_UPDATE, RST, 2, 0)


@pytest.mark.parametrize("reason", [1, 2, 99])
def test_any_other_go_away_ends_the_session_and_keeps_what_is_behind_it(reason: int) -> None:
    connection = opener()
    data = encode_header(GO_AWAY, 0, 0, reason) + b"the next session"
    assert connection.receive_data(data) == [GoAwayReceived(reason)]
    assert connection.closed
    assert connection.trailing_data == b"the next session"
    assert not connection.is_live(1)


def test_at_most_a_backlog_of_opens_waits_for_the_peer() -> None:
    connection = opener(streams=BACKLOG)
    assert connection.open_slots == 0
    with pytest.raises(LocalProtocolError):
        connection.open_stream()
    connection.receive_data(encode_header(WINDOW_UPDATE, ACK, 1, 0) + encode_header(WINDOW_UPDATE, RST, 3, 0))
    assert connection.open_slots == 2
    assert connection.open_stream() == 2 * BACKLOG + 1


def test_misuse_is_refused_and_changes_nothing() -> None:
    connection = Connection(client=True)
    wrong: list[Callable[[], object]] = [
        lambda: connection.send_data(1, b"x"),
        lambda: connection.end_stream(1),
        lambda: connection.accept_stream(2),
        lambda: connection.ping(1 << 32),
        lambda: Connection(client=True, max_window=INITIAL_WINDOW - 1),
    ]
    connection.open_stream()
    connection.data_to_send()
    wrong[:2] = [
        lambda: connection.data_header(1, INITIAL_WINDOW + 1),
        lambda: connection.data_header(1, 0),
        lambda: connection.consumed(1, 1),
    ]
    for act in wrong:
        with pytest.raises(LocalProtocolError):
            act()
    assert not connection.wants_to_send
    assert connection.send_credit(1) == INITIAL_WINDOW
    connection.end_stream(1)
    with pytest.raises(LocalProtocolError):
        connection.send_data(1, b"x")


def test_a_stream_of_the_peer_must_be_accepted_before_we_send_on_it() -> None:
    connection = server()
    connection.receive_data(OPEN)
    with pytest.raises(LocalProtocolError):
        connection.send_data(1, b"x")
