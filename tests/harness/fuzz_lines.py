"""Fuzz targets: the protocols between host and guest, ttrpc, yamux and the handshakes of a line."""

from __future__ import annotations

import trio
import trio.testing

from protos.containerd import task_v2_pb2
from protos.kata import agent_pb2
from protos.ttrpc.ttrpc_pb2 import Request
from tests.harness.fuzz_inputs import Choices, captured, cut, target
from ttrpc import methods
from ttrpc.connection import MAX_UNREAD, MESSAGE_OVERHEAD, ClientConnection, ServerConnection
from ttrpc.events import CallReceived, MessageReceived
from ttrpc.frames import DATA, REQUEST, RESPONSE, encode_frame
from ttrpc.status import Code, Status
from vc.agent_client import transports
from yamux.connection import BACKLOG, Connection
from yamux.errors import RemoteProtocolError
from yamux.events import DataReceived, StreamOpened
from yamux.frames import HEADER_SIZE, INITIAL_WINDOW, MAX_UINT32, encode_header
from yamux.resync import Initiator, Responder
from yamux.session import Session

AGENT_SERVICE = agent_pb2.DESCRIPTOR.services_by_name["AgentService"]
TASK_SERVICE = task_v2_pb2.DESCRIPTOR.services_by_name["Task"]
AGENT_METHODS = methods.service(AGENT_SERVICE)
TABLES = {entry.full_name: methods.service(entry) for entry in (AGENT_SERVICE, TASK_SERVICE)}
CHAT = methods.Method("fuzz", "Chat", agent_pb2.Metrics, agent_pb2.Metrics, client_streaming=True,
                      server_streaming=True)  # fmt: skip


# ttrpc


@target(
    *map(cut, captured("ttrpc", ".client")),
    cut(encode_frame(1, REQUEST, 0, b"\x0a\x01x")),
    cut(
        b"".join(
            encode_frame(2 * number + 1, REQUEST, 0, Request(service=name, method=method).SerializeToString())
            for number, (name, method) in enumerate((name, next(iter(TABLES[name]))) for name in TABLES)
        )
    ),
)
def ttrpc_server(data: bytes) -> None:
    """A server answers, refuses or ends each call once, and owes its peer a bounded number of bytes."""
    choices = Choices(data)
    server = ServerConnection(TABLES)
    answered: set[int] = set()
    while choices.rest:
        for event in server.receive_data(choices.piece(256)):
            if not isinstance(event, CallReceived):
                continue
            assert event.stream_id not in answered
            answered.add(event.stream_id)
            if choices.number(3):
                server.reply(event.stream_id, event.method.response_class())
            else:
                server.fail(event.stream_id, Status(Code.INTERNAL, "\ud800"))
            assert not server.is_open(event.stream_id)
    server.receive_eof()
    assert server.queued_bytes <= 1000 + 40 * len(data)
    assert server.open_calls == 0


@target(
    *map(cut, captured("ttrpc", ".server")),
    cut(encode_frame(1, RESPONSE, 0, b"\x0a\x02\x08\x01") + encode_frame(7, DATA, 5, b"")),
)
def ttrpc_client(data: bytes) -> None:
    """Each call of a client ends exactly once, and what waits for its reader is bounded."""
    choices = Choices(data)
    client = ClientConnection()
    calls = [AGENT_METHODS[name] for name in ("WaitProcess", "StatsContainer", "CreateContainer")]
    ids = {client.start_call(method, method.request_class()) for method in calls}
    ids.add(client.start_call(CHAT, None))
    client.data_to_send()
    ended: list[int] = []
    unread = 0
    events = []
    while choices.rest:
        events += client.receive_data(choices.piece(256))
    for event in (*events, *client.receive_eof()):
        assert event.stream_id in ids
        if isinstance(event, MessageReceived):
            unread += event.cost
            assert event.cost >= MESSAGE_OVERHEAD
        else:
            ended.append(event.stream_id)
    assert sorted(ended) == sorted(ids)
    assert unread <= MAX_UNREAD


# yamux


@target(
    *(b"\0\2" + cut(stream, b"\0") for stream in captured("yamux", "_c2s")),
    *(b"\1\2\4" + cut(stream, b"\0") for stream in captured("yamux", "_s2c")),
    b"\0\2" + cut(encode_header(0, 1, 1, 3) + b"abc", b"\0") + b"\5\6\0\1",
)
def yamux_connection(data: bytes) -> None:
    """A peer breaks its own session at worst; it cannot make us hold more than it was granted."""
    choices = Choices(data)
    backlog = choices.number(3)
    connection = Connection(client=choices.number(2) == 1, backlog=backlog)
    ours: list[int] = []
    theirs: list[int] = []
    unconsumed: dict[int, int] = {}
    while choices.rest and not connection.closed:
        act = choices.number(8)
        try:
            events = connection.receive_data(choices.piece(256)) if act < 4 else []
        except RemoteProtocolError as error:
            assert str(error).isprintable()
            events = error.events
        for event in events:
            if isinstance(event, DataReceived):
                unconsumed[event.stream_id] = unconsumed.get(event.stream_id, 0) + len(event.data)
                assert unconsumed[event.stream_id] <= INITIAL_WINDOW
            elif isinstance(event, StreamOpened):
                theirs.append(event.stream_id)
        assert connection._unaccepted <= backlog and len(connection._streams) <= BACKLOG
        _act(connection, act, choices, ours, theirs)
        if act == 7:
            connection.data_to_send()
            for stream, size in unconsumed.items():
                connection.consumed(stream, size if connection.is_live(stream) else 0)
            unconsumed.clear()
    assert len(connection.data_to_send()) <= 4096 * HEADER_SIZE


def _act(connection: Connection, act: int, choices: Choices, ours: list[int], theirs: list[int]) -> None:
    """Do what an application may do in any state."""
    if act == 4 and not connection.closed and connection.peer_reason is None and len(ours) < 4:
        ours.append(connection.open_stream())
    elif act == 5 and theirs and connection.is_live(theirs[0]):
        connection.accept_stream(theirs.pop(0))
    elif act == 6 and ours and connection.is_live(stream := ours[choices.number(len(ours))]):
        if connection.send_credit(stream) > 3 and choices.number(2):
            connection.send_data(stream, b"abc")
        else:
            connection.reset_stream(stream)


@target(*map(cut, captured("yamux", "_s2c")))
def yamux_session(data: bytes) -> None:
    """A session whose line brings any bytes ends, and every reader and writer of a stream with it."""

    async def feed(line: trio.abc.Stream) -> None:
        choices = Choices(data)
        try:
            while choices.rest:
                await line.send_all(choices.piece(256) or b"\0")
            await line.aclose()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def use(session: Session) -> None:
        try:
            stream = await session.open_stream()
            await stream.send_all(b"x" * 100)
            while await stream.receive_some(10):
                pass
            await stream.aclose()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def main() -> None:
        near, far = trio.testing.memory_stream_pair()
        session = Session(near, client=True, backlog=0)
        with trio.fail_after(100):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(use, session)
                nursery.start_soon(feed, far)
                try:
                    await session.run()
                except (trio.BrokenResourceError, RemoteProtocolError):
                    pass
        await trio.aclose_forcefully(far)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@target(
    cut(encode_header(2, 1, 0, 7)),
    cut(encode_header(2, 2, 0, 7) + encode_header(2, 2, 0, 7 ^ MAX_UINT32) + b"x"),
)
def resync(data: bytes) -> None:
    """Both sides of the handshake find their frame, or remember less than a header."""
    initiator, responder = Initiator(nonce=7), Responder()
    choices = Choices(data)
    fed = 0
    while choices.rest:
        piece = choices.piece(40)
        fed += len(piece)
        for side in (initiator, responder):
            if not side.done:
                side.receive_data(piece)
            assert len(side._tail) < HEADER_SIZE
            assert len(side.trailing_data) <= fed
    responder.data_to_send()


@target(b"OK 1024\nrest", b"\xe2" * 256 + b"\n", b"ERR no such port\n", b"OK", b"\xff\n", b"x" * 300)
def connect_line(data: bytes) -> None:
    """The answer to CONNECT opens a stream at its first byte, or is refused in printable words."""

    async def main() -> None:
        near, far = trio.testing.memory_stream_pair()
        await far.send_all(data or b"\n")
        await far.send_stream.aclose()
        try:
            await transports._greet(near, 1024)
        except transports._Refused as refused:
            assert str(refused).isprintable() and len(str(refused)) <= 6 * transports.MAX_LINE_BYTES
        else:
            rest = b"".join([piece async for piece in near])
            assert data.startswith(b"OK") and data.partition(b"\n")[2] == rest

    trio.run(main)
