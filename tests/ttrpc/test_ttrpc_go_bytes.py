"""Bytes recorded from the Go implementation: we read them, however they are cut, and write the same ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from echo_service import CHAT, COLLECT, DO_NOTHING, ECHO, EXPAND, NAME, TABLE, value
from google.protobuf.empty_pb2 import Empty

from protos.ttrpc.ttrpc_pb2 import Request
from ttrpc.connection import MESSAGE_OVERHEAD, ClientConnection, ServerConnection
from ttrpc.events import CallFailed, CallReceived, Event, MessageReceived, ResponseReceived, StreamClosed
from ttrpc.frames import HEADER, REQUEST, encode_frame
from ttrpc.status import Code, Status

RECORDINGS = Path(__file__).parent.parent / "data" / "ttrpc"
METADATA = (("containerd-namespace-ttrpc", "default"), ("key", "one"), ("key", "two"))


def recording(name: str) -> bytes:
    data = b""
    for line in (RECORDINGS / f"{name}.hex").read_text().splitlines():
        if line.startswith("zeros "):
            data += bytes(int(line.removeprefix("zeros ")))
        elif not line.startswith("#"):
            data += bytes.fromhex(line)
    return data


def three_ways(
    make: Callable[[], ServerConnection | ClientConnection], data: bytes, behind: bytes, after: list[Event]
) -> list[Event]:
    """Feed `data` whole, byte by byte, and with another frame behind it; return the events of it alone."""
    whole = make().receive_data(data)
    pieces = make()
    head = data[:200]  # a 4 MiB recording has nothing but zeros after that
    bytewise = [event for index in range(len(head)) for event in pieces.receive_data(head[index : index + 1])]
    assert bytewise + pieces.receive_data(data[200:]) == whole
    assert make().receive_data(data + behind) == whole + after
    return whole


def received(name: str) -> list[Event]:
    """Return what a server makes of a recorded client."""
    next_call = encode_frame(99, REQUEST, 0, Request(service=NAME, method="DoNothing").SerializeToString())
    return three_ways(
        lambda: ServerConnection({NAME: TABLE}),
        recording(f"{name}.client"),
        next_call,
        [CallReceived(99, TABLE["DoNothing"], Empty())],
    )


def message(data: bytes) -> MessageReceived:
    return MessageReceived(1, value(data), len(value(data).SerializeToString()) + MESSAGE_OVERHEAD)


def same_calls(ours: list[Event], expected: list[Event]) -> bool:
    """Compare events; a method object of one table equals that of another by name."""
    return [repr(event) for event in ours] == [repr(event) for event in expected]


def test_server_reads_calls_of_a_go_client() -> None:
    assert same_calls(received("unary"), [CallReceived(1, TABLE["Echo"], value(b"hello"))])
    assert same_calls(received("empty"), [CallReceived(1, TABLE["DoNothing"], Empty())])
    assert received("unknown") == []


def test_server_reads_metadata_and_timeout_of_a_go_client() -> None:
    (event,) = received("meta")
    assert isinstance(event, CallReceived)
    assert event.metadata == METADATA
    assert 4_900_000_000 < event.timeout_nano < 5_000_000_000


def test_server_refuses_the_oversized_request_of_a_go_client_and_reads_on() -> None:
    assert received("over") == []


def test_server_reads_streams_of_a_go_client() -> None:
    assert same_calls(received("expand"), [CallReceived(1, TABLE["Expand"], value(b"abc"))])
    collect: list[Event] = [CallReceived(1, TABLE["Collect"], None)]
    collect += [message(b"x"), message(b""), message(b"y"), StreamClosed(1)]
    assert same_calls(received("collect"), collect)
    chat: list[Event] = [
        CallReceived(1, TABLE["Chat"], None),
        message(b"one"),
        message(b"two"),
        StreamClosed(1),
    ]
    assert same_calls(received("chat"), chat)


def answered(name: str, start: Callable[[ClientConnection], int]) -> list[Event]:
    """Return what a client makes of a recorded server, with a second call behind it."""

    def make() -> ClientConnection:
        client = ClientConnection()
        assert start(client) == 1
        client.start_call(DO_NOTHING, Empty())
        return client

    behind = bytes.fromhex("00000000000000030200")  # an empty Response on stream 3
    return three_ways(make, recording(f"{name}.server"), behind, [ResponseReceived(3, Empty())])


def test_client_reads_answers_of_a_go_server() -> None:
    assert answered("unary", lambda c: c.start_call(ECHO, value(b"hello"))) == [
        ResponseReceived(1, value(b"hello"))
    ]
    assert answered("empty", lambda c: c.start_call(DO_NOTHING, Empty())) == [ResponseReceived(1, Empty())]
    unknown = answered("unknown", lambda c: c.start_call(DO_NOTHING, Empty()))
    assert unknown == [CallFailed(1, Status(Code.UNIMPLEMENTED, "method NoSuch"))]


@pytest.mark.parametrize(
    ("name", "code"), [("over", Code.RESOURCE_EXHAUSTED), ("timeout", Code.DEADLINE_EXCEEDED)]
)
def test_client_reads_failures_of_a_go_server(name: str, code: Code) -> None:
    (event,) = answered(name, lambda c: c.start_call(ECHO, value(b"sleep")))
    assert isinstance(event, CallFailed)
    assert event.status.code == code


def test_client_reads_streams_of_a_go_server() -> None:
    expand = answered("expand", lambda c: c.start_call(EXPAND, value(b"abc")))
    assert expand == [message(b"a"), message(b"b"), message(b"c"), StreamClosed(1)]
    collect = answered("collect", lambda c: c.start_call(COLLECT, None))
    assert collect == [ResponseReceived(1, value(b"x..y."))]
    assert answered("chat", lambda c: c.start_call(CHAT, None)) == [
        message(b"one"),
        message(b"two"),
        StreamClosed(1),
    ]


def test_client_writes_what_a_go_client_writes() -> None:
    client = ClientConnection()
    client.start_call(ECHO, value(b"hello"))
    assert client.data_to_send() == recording("unary.client")

    client = ClientConnection()
    client.start_call(COLLECT, None)
    for data in (b"x", b"", b"y"):
        client.send_message(1, value(data))
    client.close_send(1)
    assert client.data_to_send() == recording("collect.client")

    meta = recording("meta.client")
    timeout_nano = Request.FromString(meta[HEADER.size :]).timeout_nano
    client = ClientConnection()
    client.start_call(ECHO, value(b"meta"), timeout_nano=timeout_nano, metadata=METADATA)
    assert client.data_to_send() == meta


def test_server_writes_what_a_go_server_writes() -> None:
    def connection(name: str) -> ServerConnection:
        server = ServerConnection({NAME: TABLE})
        server.receive_data(recording(f"{name}.client"))
        return server

    unary = connection("unary")
    unary.reply(1, value(b"hello"))
    assert unary.data_to_send() == recording("unary.server")

    expand = connection("expand")
    for letter in (b"a", b"b", b"c"):
        expand.send_message(1, value(letter))
    expand.finish(1)
    assert expand.data_to_send() == recording("expand.server")

    unknown = connection("unknown")
    assert unknown.data_to_send() == recording("unknown.server")
