"""Both state machines against bytes written by hand: what is refused, what is tolerated, what comes out."""

from __future__ import annotations

import pytest
from echo_service import CHAT, COLLECT, DO_NOTHING, ECHO, EXPAND, NAME, TABLE, value
from google.protobuf.empty_pb2 import Empty

from protos.ttrpc.ttrpc_pb2 import KeyValue, Request, Response
from ttrpc.connection import MESSAGE_OVERHEAD, ClientConnection, LocalProtocolError, ServerConnection
from ttrpc.events import CallFailed, CallReceived, MessageReceived, ResponseReceived, StreamClosed
from ttrpc.frames import (
    DATA,
    HEADER,
    MAX_DATA_LENGTH,
    NO_DATA,
    REMOTE_CLOSED,
    REMOTE_OPEN,
    REQUEST,
    RESPONSE,
    Decoder,
    Frame,
    encode_frame,
)
from ttrpc.methods import AnyMethod
from ttrpc.status import Code, Status, StatusError


def server(*, max_unread: int = 1 << 20) -> ServerConnection:
    return ServerConnection({NAME: TABLE}, max_unread=max_unread)


def request(
    stream_id: int, method: str, payload: bytes = b"", *, flags: int = 0, timeout_nano: int = 0
) -> bytes:
    message = Request(service=NAME, method=method, payload=payload, timeout_nano=timeout_nano)
    return encode_frame(stream_id, REQUEST, flags, message.SerializeToString())


def sent(connection: ServerConnection | ClientConnection) -> list[Frame]:
    frames = Decoder().receive_data(connection.data_to_send())
    assert all(isinstance(frame, Frame) for frame in frames)
    return [frame for frame in frames if isinstance(frame, Frame)]


def refusals(connection: ServerConnection) -> list[tuple[int, int, str]]:
    answers = []
    for frame in sent(connection):
        assert frame.kind == RESPONSE
        status = Response.FromString(frame.data).status
        answers.append((frame.stream_id, status.code, status.message))
    return answers


def refusal(connection: ServerConnection, data: bytes) -> tuple[int, int]:
    """Return the id and code of the one answer that the connection gives by itself."""
    assert connection.receive_data(data) == []
    ((stream_id, code, _),) = refusals(connection)
    return stream_id, code


# What a server answers by itself


@pytest.mark.parametrize("stream_id", [0, 2, 0xFFFFFFFE])
@pytest.mark.parametrize("kind", [REQUEST, DATA])
def test_an_even_id_is_refused_on_that_very_id(stream_id: int, kind: int) -> None:
    assert refusal(server(), encode_frame(stream_id, kind, 0)) == (stream_id, Code.INVALID_ARGUMENT)


def test_an_unknown_service_and_an_unknown_method_are_unimplemented_and_named() -> None:
    connection = server()
    unknown = Request(service="no.Such", method="Echo").SerializeToString()
    connection.receive_data(encode_frame(1, REQUEST, 0, unknown) + request(3, "NoSuch"))
    assert refusals(connection) == [(1, 12, "service no.Such"), (3, 12, "method NoSuch")]


def test_an_id_that_is_not_above_the_last_one_is_refused_and_the_first_call_goes_on() -> None:
    connection = server()
    connection.receive_data(request(7, "DoNothing"))
    assert refusal(connection, request(7, "DoNothing")) == (7, Code.INVALID_ARGUMENT)
    assert refusal(connection, request(5, "DoNothing")) == (5, Code.INVALID_ARGUMENT)
    assert connection.reply(7, Empty())


def test_a_request_that_is_no_message_is_refused_and_uses_its_id() -> None:
    connection = server()
    assert refusal(connection, encode_frame(1, REQUEST, 0, b"\xff")) == (1, Code.INVALID_ARGUMENT)
    assert refusal(connection, request(1, "DoNothing")) == (1, Code.INVALID_ARGUMENT)


@pytest.mark.parametrize("method", ["Echo", "Expand", "Collect", "Chat"])
def test_a_payload_that_is_no_message_is_an_internal_error(method: str) -> None:
    assert refusal(server(), request(1, method, b"\xff")) == (1, Code.INTERNAL)


def test_an_oversized_request_costs_one_call_and_not_the_next() -> None:
    connection = server()
    length = MAX_DATA_LENGTH + 1
    assert refusal(connection, HEADER.pack(length, 1, REQUEST, 0)) == (1, Code.RESOURCE_EXHAUSTED)
    (event,) = connection.receive_data(bytes(length) + request(3, "DoNothing"))
    assert isinstance(event, CallReceived)
    assert event.stream_id == 3


def test_an_oversized_request_with_the_id_of_a_running_call_does_not_end_that_call() -> None:
    connection = server()
    connection.receive_data(request(1, "DoNothing"))
    assert refusal(connection, HEADER.pack(MAX_DATA_LENGTH + 1, 1, REQUEST, 0)) == (
        1,
        Code.RESOURCE_EXHAUSTED,
    )
    assert connection.reply(1, Empty())


def test_oversized_data_fails_its_stream() -> None:
    connection = server()
    connection.receive_data(request(1, "Collect"))
    (event,) = connection.receive_data(HEADER.pack(MAX_DATA_LENGTH + 1, 1, DATA, 0))
    assert isinstance(event, CallFailed)
    assert event.status.code == Code.RESOURCE_EXHAUSTED


def test_a_request_of_exactly_the_limit_is_served() -> None:
    def frame(size: int) -> bytes:
        return request(1, "Echo", value(bytes(size)).SerializeToString())

    near = MAX_DATA_LENGTH - 100
    size = near + MAX_DATA_LENGTH - (len(frame(near)) - HEADER.size)
    assert HEADER.unpack_from(frame(size))[0] == MAX_DATA_LENGTH
    (event,) = server().receive_data(frame(size))
    assert isinstance(event, CallReceived)
    assert event.request == value(bytes(size))


@pytest.mark.parametrize("kind", [0, RESPONSE, 4, 255])
@pytest.mark.parametrize("stream_id", [0, 1, 2, 3])
def test_frames_of_other_types_are_ignored_even_if_oversized(kind: int, stream_id: int) -> None:
    connection = server()
    assert connection.receive_data(encode_frame(stream_id, kind, 0xFF, b"anything")) == []
    assert connection.receive_data(HEADER.pack(MAX_DATA_LENGTH + 1, stream_id, kind, 0)) == []
    assert connection.data_to_send() == b""


@pytest.mark.parametrize("flags", [REMOTE_CLOSED, REMOTE_OPEN, NO_DATA, 0xFF])
def test_flags_of_a_unary_request_mean_nothing(flags: int) -> None:
    connection = server()
    (event,) = connection.receive_data(request(1, "Echo", value(b"x").SerializeToString(), flags=flags))
    assert isinstance(event, CallReceived)
    assert event.request == value(b"x")


def test_data_for_a_stream_that_nobody_opened_is_refused() -> None:
    assert refusal(server(), encode_frame(9, DATA, 0)) == (9, Code.INVALID_ARGUMENT)


def test_data_for_a_unary_call_ends_that_call_and_its_answer_goes_nowhere() -> None:
    connection = server()
    connection.receive_data(request(1, "DoNothing"))
    (event,) = connection.receive_data(encode_frame(1, DATA, 0))
    assert isinstance(event, CallFailed)
    assert event.status.code == Code.INVALID_ARGUMENT
    assert [(key, code) for key, code, _ in refusals(connection)] == [(1, 3)]
    assert not connection.reply(1, Empty())
    assert connection.data_to_send() == b""


def test_a_call_whose_deadline_had_passed_is_answered_without_a_handler() -> None:
    assert refusal(server(), request(1, "DoNothing", timeout_nano=-1)) == (1, Code.DEADLINE_EXCEEDED)


def test_metadata_and_timeout_reach_the_application_in_order() -> None:
    pairs = [KeyValue(key="a", value="1"), KeyValue(key="B", value="2"), KeyValue(key="a", value="3")]
    message = Request(service=NAME, method="DoNothing", timeout_nano=5, metadata=pairs)
    (event,) = server().receive_data(encode_frame(1, REQUEST, 0, message.SerializeToString()))
    assert isinstance(event, CallReceived)
    assert event.timeout_nano == 5
    assert event.metadata == (("a", "1"), ("B", "2"), ("a", "3"))


def test_a_response_that_is_too_large_becomes_an_error_response() -> None:
    connection = server()
    connection.receive_data(request(1, "Echo"))
    assert connection.reply(1, value(bytes(MAX_DATA_LENGTH)))
    assert [(key, code) for key, code, _ in refusals(connection)] == [(1, Code.RESOURCE_EXHAUSTED)]


@pytest.mark.parametrize(
    "status",
    [
        Status(Code.OK, "no failure"),
        Status(1 << 40, "no int32"),
        Status(Code.NOT_FOUND, "\udcff"),
        Status(Code.NOT_FOUND, "x" * (5 << 20)),
    ],
)
def test_every_status_that_a_handler_fails_with_reaches_the_client_as_a_failure(status: Status) -> None:
    connection, client = server(), ClientConnection()
    client.start_call(ECHO, value())
    connection.receive_data(client.data_to_send())
    assert connection.fail(1, status)
    (event,) = client.receive_data(connection.data_to_send())
    assert isinstance(event, CallFailed)


def test_the_end_of_input_leaves_unary_calls_open_and_breaks_unfinished_streams() -> None:
    connection = server()
    connection.receive_data(request(1, "DoNothing") + request(3, "Collect") + request(5, "Collect"))
    connection.receive_data(encode_frame(5, DATA, REMOTE_CLOSED | NO_DATA))
    (event,) = connection.receive_eof()
    assert isinstance(event, CallFailed)
    assert event.stream_id == 3
    assert connection.reply(1, Empty())
    assert connection.reply(5, value())


# Streams


def test_client_stream_delivers_empty_messages_and_its_end() -> None:
    connection = server()
    events = connection.receive_data(
        request(1, "Collect", flags=REMOTE_OPEN)
        + encode_frame(1, DATA, 0)
        + encode_frame(1, DATA, NO_DATA)
        + encode_frame(1, DATA, REMOTE_CLOSED | NO_DATA)
    )
    assert [type(event) for event in events] == [CallReceived, MessageReceived, StreamClosed]
    assert isinstance(events[0], CallReceived)
    assert events[0].request is None


def test_a_closing_frame_without_the_no_data_flag_carries_one_more_message() -> None:
    connection = server()
    connection.receive_data(request(1, "Collect", flags=REMOTE_OPEN))
    events = connection.receive_data(encode_frame(1, DATA, REMOTE_CLOSED))
    assert [type(event) for event in events] == [MessageReceived, StreamClosed]


def test_the_payload_of_a_request_that_opens_a_stream_is_its_first_message() -> None:
    connection = server()
    events = connection.receive_data(
        request(1, "Chat", value(b"first").SerializeToString(), flags=REMOTE_OPEN)
    )
    assert isinstance(events[1], MessageReceived)
    assert events[1].message == value(b"first")


def test_data_after_the_client_closed_fails_that_stream_only() -> None:
    connection = server()
    connection.receive_data(request(1, "Chat") + request(3, "Chat"))
    closing = encode_frame(1, DATA, REMOTE_CLOSED | NO_DATA)
    events = connection.receive_data(closing + encode_frame(1, DATA, 0) + encode_frame(3, DATA, 0))
    assert [type(event) for event in events] == [StreamClosed, CallFailed, MessageReceived]
    assert connection.is_open(3)


def test_a_full_buffer_fails_its_stream_and_consuming_makes_room() -> None:
    cost = MESSAGE_OVERHEAD
    connection = server(max_unread=2 * cost)
    connection.receive_data(request(1, "Collect") + request(3, "Collect"))
    for _ in range(10):
        (event,) = connection.receive_data(encode_frame(1, DATA, 0))
        assert isinstance(event, MessageReceived)
        connection.acknowledge(1, event.cost)
    events = connection.receive_data(encode_frame(3, DATA, 0) * 3 + encode_frame(1, DATA, 0))
    assert [type(event) for event in events] == [
        MessageReceived,
        MessageReceived,
        CallFailed,
        MessageReceived,
    ]
    assert isinstance(events[2], CallFailed)
    assert events[2].status.code == Code.RESOURCE_EXHAUSTED
    assert [(key, code) for key, code, _ in refusals(connection)] == [(3, 8)]


def test_a_server_stream_ends_with_an_empty_closing_frame() -> None:
    connection = server()
    connection.receive_data(request(1, "Expand", flags=REMOTE_CLOSED))
    assert connection.send_message(1, value(b"a"))
    assert connection.finish(1)
    assert not connection.send_message(1, value(b"b"))
    frames = sent(connection)
    assert [(frame.kind, frame.flags) for frame in frames] == [(DATA, 0), (DATA, REMOTE_CLOSED | NO_DATA)]
    assert frames[1].data == b""


def test_moves_of_another_kind_of_method_are_local_errors() -> None:
    connection, client = server(), ClientConnection()
    connection.receive_data(request(1, "Echo") + request(3, "Expand"))
    with pytest.raises(LocalProtocolError):
        connection.send_message(1, value())
    with pytest.raises(LocalProtocolError):
        connection.finish(1)
    with pytest.raises(LocalProtocolError):
        connection.reply(3, value())
    with pytest.raises(LocalProtocolError):
        client.start_call(ECHO, None)
    with pytest.raises(LocalProtocolError):
        client.start_call(COLLECT, value())
    with pytest.raises(LocalProtocolError):
        client.close_send(client.start_call(ECHO, value()))


# The client's side


@pytest.mark.parametrize(
    ("method", "flags"), [(ECHO, 0), (EXPAND, REMOTE_CLOSED), (COLLECT, REMOTE_OPEN), (CHAT, REMOTE_OPEN)]
)
def test_requests_carry_the_flags_of_their_kind(method: AnyMethod, flags: int) -> None:
    client = ClientConnection()
    client.start_call(method, None if method.client_streaming else value())
    (frame,) = sent(client)
    assert (frame.stream_id, frame.kind, frame.flags) == (1, REQUEST, flags)


def test_ids_are_odd_and_leave_in_the_order_they_were_taken() -> None:
    client = ClientConnection()
    ids = [client.start_call(ECHO, value()) for _ in range(3)]
    assert ids == [1, 3, 5] == [frame.stream_id for frame in sent(client)]


def test_a_request_that_is_too_large_fails_here_and_takes_no_id() -> None:
    client = ClientConnection()
    with pytest.raises(StatusError) as caught:
        client.start_call(ECHO, value(bytes(MAX_DATA_LENGTH)))
    assert caught.value.code == Code.RESOURCE_EXHAUSTED
    assert client.data_to_send() == b""
    assert client.start_call(ECHO, value()) == 1


def test_used_up_ids_are_an_error_and_do_not_wrap() -> None:
    client = ClientConnection()
    client._next_id = 0xFFFFFFFF
    assert client.start_call(ECHO, value()) == 0xFFFFFFFF
    with pytest.raises(StatusError, match="open a new one"):
        client.start_call(ECHO, value())


def answer(stream_id: int, payload: bytes = b"", *, code: int | None = None) -> bytes:
    response = Response(payload=payload)
    if code is not None:
        response.status.code = code
    return encode_frame(stream_id, RESPONSE, 0, response.SerializeToString())


@pytest.mark.parametrize("code", [None, 0])
def test_success_comes_without_a_status_or_with_code_zero(code: int | None) -> None:
    client = ClientConnection()
    client.start_call(DO_NOTHING, Empty())
    assert client.receive_data(answer(1, code=code)) == [ResponseReceived(1, Empty())]


def test_an_answer_without_any_data_is_an_empty_message() -> None:
    client = ClientConnection()
    client.start_call(DO_NOTHING, Empty())
    assert client.receive_data(encode_frame(1, RESPONSE, 0)) == [ResponseReceived(1, Empty())]


def test_answers_may_come_in_any_order_and_once() -> None:
    client = ClientConnection()
    for _ in range(2):
        client.start_call(DO_NOTHING, Empty())
    events = client.receive_data(answer(3) + answer(1) + answer(3) + answer(99))
    assert events == [ResponseReceived(3, Empty()), ResponseReceived(1, Empty())]


def test_a_late_answer_for_a_forgotten_call_is_dropped() -> None:
    client = ClientConnection()
    client.start_call(DO_NOTHING, Empty())
    assert client.forget(1)
    assert client.receive_data(answer(1) + HEADER.pack(MAX_DATA_LENGTH + 1, 1, RESPONSE, 0)) == []


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (answer(1, code=5), 5),
        (answer(1, code=77), 77),
        (encode_frame(1, RESPONSE, 0, b"\xff"), Code.INTERNAL),
        (answer(1, b"\xff"), Code.INTERNAL),
        (HEADER.pack(MAX_DATA_LENGTH + 1, 1, RESPONSE, 0), Code.RESOURCE_EXHAUSTED),
        (encode_frame(1, DATA, 0), Code.INTERNAL),
    ],
)
def test_whatever_is_wrong_with_an_answer_fails_that_call(frame: bytes, code: int) -> None:
    client = ClientConnection()
    client.start_call(ECHO, value())
    client.start_call(ECHO, value())
    (event,) = client.receive_data(frame)
    assert isinstance(event, CallFailed)
    assert (event.stream_id, event.status.code) == (1, code)
    assert client.is_open(3)


def test_a_response_ends_a_server_stream_too() -> None:
    client = ClientConnection()
    client.start_call(EXPAND, value())
    client.start_call(EXPAND, value())
    events = client.receive_data(answer(1) + answer(3, value(b"x").SerializeToString()))
    assert [type(event) for event in events] == [StreamClosed, MessageReceived, StreamClosed]
    assert client.open_calls == 0


def test_the_end_of_input_fails_every_call_that_is_not_over() -> None:
    client = ClientConnection()
    for _ in range(3):
        client.start_call(DO_NOTHING, Empty())
    client.receive_data(answer(3))
    events = client.receive_eof()
    assert [event.stream_id for event in events] == [1, 5]
    assert client.receive_eof() == []
