"""A client and a server joined in memory, and bytes that nobody would write by hand."""

from __future__ import annotations

import hypothesis.strategies as st
from echo_service import CHAT, COLLECT, DO_NOTHING, ECHO, EXPAND, NAME, TABLE, value
from google.protobuf.empty_pb2 import Empty
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from protos.ttrpc.ttrpc_pb2 import Request
from ttrpc.connection import ClientConnection, ServerConnection
from ttrpc.events import CallFailed, CallReceived, Event, MessageReceived, ResponseReceived, StreamClosed
from ttrpc.frames import DATA, REQUEST, RESPONSE, encode_frame
from ttrpc.methods import AnyMethod
from ttrpc.status import Code, Status, StatusError

METHODS: list[AnyMethod] = [ECHO, DO_NOTHING, EXPAND, COLLECT, CHAT]


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from([REQUEST, RESPONSE, DATA, 0, 77]))
    if kind == REQUEST and draw(st.booleans()):
        method = draw(st.sampled_from(METHODS)).name
        data = Request(service=NAME, method=method, payload=draw(st.binary(max_size=8))).SerializeToString()
    else:
        data = draw(st.binary(max_size=16))
    return encode_frame(draw(st.integers(0, 12)), kind, draw(st.integers(0, 255)), data)


def cut(data: bytes, draw: st.DataObject) -> list[bytes]:
    places = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=8)))
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


@given(st.lists(st.one_of(frames(), st.binary(max_size=30)), max_size=12), st.data())
def test_events_and_answers_do_not_depend_on_where_the_bytes_are_cut(
    parts: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(parts)
    whole, pieces = ServerConnection({NAME: TABLE}), ServerConnection({NAME: TABLE})
    expected = whole.receive_data(stream)
    assert [event for piece in cut(stream, data) for event in pieces.receive_data(piece)] == expected
    assert pieces.data_to_send() == whole.data_to_send()


@given(st.lists(st.one_of(frames(), st.binary(max_size=30)), max_size=12), st.data())
def test_a_client_survives_any_bytes_and_ends_each_call_at_most_once(
    parts: list[bytes], data: st.DataObject
) -> None:
    client = ClientConnection()
    for method in METHODS:
        client.start_call(method, None if method.client_streaming else method.request_class())
    events: list[Event] = []
    for piece in cut(b"".join(parts), data):
        events += client.receive_data(piece)
    events += client.receive_eof()
    ended = [event.stream_id for event in events if not isinstance(event, MessageReceived)]
    assert sorted(ended) == [1, 3, 5, 7, 9]


class Pair(RuleBasedStateMachine):
    """Calls of all kinds, with the bytes between the two ends delayed at will.

    What is checked: messages arrive in order, every call has exactly one outcome at the client, and it is
    the one that the server gave unless the client had already forgotten the call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.client = ClientConnection()
        self.server = ServerConnection({NAME: TABLE})
        self.to_server = b""
        self.to_client = b""
        self.methods: dict[int, AnyMethod] = {}
        self.outcomes: dict[int, str] = {}  # at the client
        self.given: dict[int, str] = {}  # by the server
        self.forgotten: set[int] = set()
        self.sending: set[int] = set()
        self.received: dict[int, list[bytes]] = {}  # by the server, of each stream
        self.sent: dict[int, list[bytes]] = {}
        self.counter = 0

    @rule(method=st.sampled_from(METHODS))
    def call(self, method: AnyMethod) -> None:
        message = None if method.client_streaming else method.request_class()
        stream_id = self.client.start_call(method, message)
        assert stream_id == 2 * len(self.methods) + 1
        self.methods[stream_id] = method
        if method.client_streaming:
            self.sending.add(stream_id)

    @rule(data=st.data())
    def client_sends(self, data: st.DataObject) -> None:
        if self.sending:
            stream_id = data.draw(st.sampled_from(sorted(self.sending)))
            self.counter += 1
            if self.client.send_message(stream_id, value(b"%d" % self.counter)):
                self.sent.setdefault(stream_id, []).append(b"%d" % self.counter)

    @rule(data=st.data())
    def client_closes(self, data: st.DataObject) -> None:
        if self.sending:
            stream_id = data.draw(st.sampled_from(sorted(self.sending)))
            self.sending.discard(stream_id)
            self.client.close_send(stream_id)

    @rule(data=st.data())
    def client_forgets(self, data: st.DataObject) -> None:
        if self.methods:
            stream_id = data.draw(st.sampled_from(sorted(self.methods)))
            if self.client.forget(stream_id):
                self.forgotten.add(stream_id)

    @rule(data=st.data(), fail=st.booleans())
    def server_answers(self, data: st.DataObject, fail: bool) -> None:
        waiting = sorted(key for key in self.methods if self.server.is_open(key))
        if not waiting:
            return
        stream_id = data.draw(st.sampled_from(waiting))
        method = self.methods[stream_id]
        if fail:
            done = self.server.fail(stream_id, Status(Code.NOT_FOUND, "x"))
        elif method.server_streaming:
            done = self.server.finish(stream_id)
        else:
            done = self.server.reply(stream_id, method.response_class())
        assert done
        self.given[stream_id] = "failed" if fail else "ok"

    @rule(data=st.data())
    def bytes_reach_the_server(self, data: st.DataObject) -> None:
        self.to_server += self.client.data_to_send()
        size = data.draw(st.integers(0, len(self.to_server)))
        piece, self.to_server = self.to_server[:size], self.to_server[size:]
        for event in self.server.receive_data(piece):
            if isinstance(event, MessageReceived):
                self.received.setdefault(event.stream_id, []).append(event.message.value)
                self.server.acknowledge(event.stream_id, event.cost)
            else:
                assert isinstance(event, (CallReceived, StreamClosed))

    @rule(data=st.data())
    def bytes_reach_the_client(self, data: st.DataObject) -> None:
        self.to_client += self.server.data_to_send()
        size = data.draw(st.integers(0, len(self.to_client)))
        piece, self.to_client = self.to_client[:size], self.to_client[size:]
        for event in self.client.receive_data(piece):
            assert isinstance(event, (ResponseReceived, StreamClosed, CallFailed))
            assert event.stream_id not in self.outcomes
            assert event.stream_id not in self.forgotten
            self.outcomes[event.stream_id] = "failed" if isinstance(event, CallFailed) else "ok"

    @invariant()
    def messages_arrive_in_order(self) -> None:
        for stream_id, messages in self.received.items():
            assert messages == self.sent[stream_id][: len(messages)]

    def teardown(self) -> None:
        self._deliver_everything()
        for stream_id in self.methods:
            if self.server.is_open(stream_id):
                self.server.fail(stream_id, Status(Code.ABORTED, "end"))
                self.given[stream_id] = "failed"
        self._deliver_everything()
        assert self.client.open_calls == 0
        assert self.given.keys() == self.methods.keys()
        assert self.outcomes == {key: how for key, how in self.given.items() if key not in self.forgotten}

    def _deliver_everything(self) -> None:
        for event in self.server.receive_data(self.to_server + self.client.data_to_send()):
            assert not isinstance(event, CallFailed)
        self.to_server = b""
        for event in self.client.receive_data(self.to_client + self.server.data_to_send()):
            assert event.stream_id not in self.outcomes
            self.outcomes[event.stream_id] = "failed" if isinstance(event, CallFailed) else "ok"
        self.to_client = b""


TestPair = Pair.TestCase
TestPair.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_message_that_is_too_large_leaves_its_stream_open() -> None:
    client = ClientConnection()
    client.start_call(COLLECT, None)
    client.data_to_send()
    try:
        client.send_message(1, value(bytes(5 << 20)))
    except StatusError as exc:
        assert exc.code == Code.RESOURCE_EXHAUSTED
    else:
        raise AssertionError("5 MiB fitted into a frame")
    assert client.data_to_send() == b""
    assert client.send_message(1, value(b"fits"))


def test_an_empty_response_class_needs_no_bytes() -> None:
    server = ServerConnection({NAME: TABLE})
    request = Request(service=NAME, method="DoNothing")
    server.receive_data(encode_frame(1, REQUEST, 0, request.SerializeToString()))
    server.reply(1, Empty())
    assert server.data_to_send() == bytes.fromhex("00000000000000010200")
