"""Client and server over trio streams: outcomes, deadlines, ends of connections, and who is let in."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from echo_service import CHAT, COLLECT, DESCRIPTOR, DO_NOTHING, ECHO, EXPAND, NAME, value
from google.protobuf.empty_pb2 import Empty
from google.protobuf.wrappers_pb2 import BytesValue

from protos.ttrpc.ttrpc_pb2 import Request, Response
from ttrpc.client import Client, ConnectionClosed
from ttrpc.frames import HEADER, REQUEST, RESPONSE, encode_frame
from ttrpc.server import Context, RequestStream, Server, peer_credentials
from ttrpc.status import Code, Status, StatusError


class Echo:
    """Answers each kind of call; some requests make it behave in a special way."""

    def __init__(self) -> None:
        self.started = trio.Event()
        self.release = trio.Event()
        self.ended: list[str] = []
        self.contexts: list[Context] = []

    async def echo(self, request: BytesValue, context: Context) -> BytesValue:
        self.contexts.append(context)
        match request.value:
            case b"wait":
                try:
                    self.started.set()
                    await self.release.wait()
                    self.ended.append("finished")
                except trio.Cancelled:
                    self.ended.append("cancelled")
                    raise
            case b"status":
                raise StatusError(Code.NOT_FOUND, "no such thing")
            case b"bug":
                raise KeyError("the bug")
            case b"group":
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._fail)
            case b"none":
                return None  # type: ignore[return-value]
            case b"huge":
                return value(bytes(4 << 20))
        return request

    async def _fail(self) -> None:
        raise StatusError(Code.ABORTED, "in a group")

    async def do_nothing(self, request: Empty, context: Context) -> None:
        context.after_reply(lambda: self.ended.append("replied"))

    async def expand(self, request: BytesValue, context: Context) -> None:
        for letter in request.value:
            await context.send(value(bytes([letter])))

    async def collect(self, requests: RequestStream, context: Context) -> BytesValue:
        try:
            return value(b"".join([message.value async for message in requests]))
        except StatusError as exc:
            self.ended.append(str(exc))
            raise

    async def chat(self, requests: RequestStream, context: Context) -> None:
        async for message in requests:
            await context.send(message)


def make_server(echo: Echo, **options: Any) -> Server:
    server = Server(**options)
    server.add_service(DESCRIPTOR, echo)
    return server


@asynccontextmanager
async def connected(echo: Echo, **options: Any) -> AsyncIterator[Client]:
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(make_server(echo, **options).serve_stream, theirs)
        client = Client(ours)
        await nursery.start(client.run)
        yield client
        nursery.cancel_scope.cancel()


async def test_every_kind_of_call() -> None:
    async with connected(Echo()) as client:
        assert await client.call(ECHO, value(b"hello")) == value(b"hello")
        assert await client.call(DO_NOTHING, Empty()) == Empty()
        async with client.open_stream(EXPAND, value(b"abc")) as stream:
            assert [message.value async for message in stream] == [b"a", b"b", b"c"]
        async with client.open_stream(COLLECT) as stream:
            await stream.send(value(b"x"))
            await stream.send(value(b"y"))
            assert await stream.close_and_receive() == value(b"xy")
        async with client.open_stream(CHAT) as stream:
            for text in (b"one", b"two"):
                await stream.send(value(text))
                assert await stream.receive() == value(text)
            stream.close_send()
            with pytest.raises(trio.EndOfChannel):
                await stream.receive()


async def test_many_calls_at_once_each_get_their_own_answer() -> None:
    async def one(number: int) -> None:
        text = str(number).encode()
        assert await client.call(ECHO, value(text)) == value(text)
        done.append(number)

    done: list[int] = []
    async with connected(Echo()) as client:
        async with trio.open_nursery() as nursery:
            for number in range(300):
                nursery.start_soon(one, number)
        assert sorted(done) == list(range(300))


@pytest.mark.parametrize(
    ("request_value", "code", "text"),
    [
        (b"status", Code.NOT_FOUND, "no such thing"),
        (b"group", Code.ABORTED, "in a group"),
        (b"huge", Code.RESOURCE_EXHAUSTED, "does not fit"),
    ],
)
async def test_a_foreseen_failure_is_a_status_and_is_not_logged(
    request_value: bytes, code: Code, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(Echo()) as client:
        with pytest.raises(StatusError, match=text) as caught:
            await client.call(ECHO, value(request_value))
        assert caught.value.code == code
        assert caplog.records == []
        assert await client.call(ECHO, value()) == value()


@pytest.mark.parametrize("request_value", [b"bug", b"none"])
async def test_a_bug_is_unknown_to_the_caller_and_logged_once_with_its_traceback(
    request_value: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(Echo()) as client:
        with pytest.raises(StatusError) as caught:
            await client.call(ECHO, value(request_value))
        assert caught.value.code == Code.UNKNOWN
        (record,) = caplog.records
        assert (record.name, record.levelno) == ("ttrpc", logging.ERROR)
        assert record.exc_info is not None
        assert await client.call(ECHO, value()) == value()


async def test_the_application_chooses_the_status_of_its_exceptions(caplog: pytest.LogCaptureFixture) -> None:
    def status_of(exc: BaseException) -> Status | None:
        return Status(Code.UNKNOWN, "foreseen") if isinstance(exc, KeyError) else None

    async with connected(Echo(), status_of=status_of) as client:
        with pytest.raises(StatusError, match="foreseen"):
            await client.call(ECHO, value(b"bug"))
    assert caplog.records == []


async def test_a_method_that_the_implementation_lacks_is_unimplemented() -> None:
    class Partial:
        async def echo(self, request: BytesValue, context: Context) -> BytesValue:
            return request

    server = Server()
    server.add_service(DESCRIPTOR, Partial())
    with pytest.raises(ValueError, match=NAME):
        server.add_service(DESCRIPTOR, Partial())
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, theirs)
        client = Client(ours)
        await nursery.start(client.run)
        with pytest.raises(StatusError, match="method DoNothing") as caught:
            await client.call(DO_NOTHING, Empty())
        assert caught.value.code == Code.UNIMPLEMENTED
        nursery.cancel_scope.cancel()


async def test_metadata_and_deadline_reach_the_handler(autojump_clock: trio.testing.MockClock) -> None:
    echo = Echo()
    async with connected(echo) as client:
        await client.call(ECHO, value(), metadata={"key": "one"}, timeout=5)
        await client.call(ECHO, value(), metadata=[("key", "one"), ("key", "two")])
        first, second = echo.contexts
        assert first.get("key") == "one"
        assert first.deadline == trio.current_time() + 5
        assert second.metadata == (("key", "one"), ("key", "two"))
        assert second.deadline == float("inf")


# Deadlines


async def test_both_sides_keep_the_deadline(autojump_clock: trio.testing.MockClock) -> None:
    echo = Echo()
    async with connected(echo) as client:
        with pytest.raises(StatusError) as caught:
            await client.call(ECHO, value(b"wait"), timeout=3)
        assert caught.value.code == Code.DEADLINE_EXCEEDED
        assert trio.current_time() >= 3
        await trio.testing.wait_all_tasks_blocked()
        assert echo.ended == ["cancelled"]
        assert await client.call(ECHO, value()) == value()


async def test_the_server_answers_a_caller_whose_deadline_passed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(make_server(Echo()).serve_stream, theirs)
        payload = value(b"wait").SerializeToString()
        request = Request(service=NAME, method="Echo", payload=payload, timeout_nano=2_000_000_000)
        await ours.send_all(encode_frame(1, REQUEST, 0, request.SerializeToString()))
        response = Response.FromString(bytes((await ours.receive_some())[HEADER.size :]))
        assert response.status.code == Code.DEADLINE_EXCEEDED
        assert trio.current_time() == pytest.approx(2)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("timeout", [0, -1.5])
async def test_a_timeout_that_has_passed_sends_nothing(timeout: float) -> None:
    echo = Echo()
    async with connected(echo) as client:
        with pytest.raises(StatusError) as caught:
            await client.call(ECHO, value(), timeout=timeout)
        assert caught.value.code == Code.DEADLINE_EXCEEDED
        await trio.testing.wait_all_tasks_blocked()
        assert echo.contexts == []


async def test_a_call_given_up_does_not_disturb_the_others() -> None:
    echo = Echo()
    async with connected(echo) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.call, ECHO, value(b"wait"))
            await echo.started.wait()
            nursery.cancel_scope.cancel()
        echo.release.set()  # the answer is late now
        assert await client.call(ECHO, value(b"next")) == value(b"next")


# Ends of connections


async def test_the_end_of_the_connection_fails_pending_and_later_calls() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    client = Client(ours)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)

        async def pending() -> None:
            with pytest.raises(ConnectionClosed, match="Echo"):
                await client.call(ECHO, value())

        for _ in range(3):
            nursery.start_soon(pending)
        await theirs.receive_some()
        await theirs.aclose()
        await client.closed.wait()
        await pending()


async def test_answers_are_still_read_after_writing_has_failed() -> None:
    left, right = trio.socket.socketpair()
    peer = trio.SocketStream(right)
    client = Client(trio.SocketStream(left))
    answers: list[BytesValue] = []

    async def first() -> None:
        answers.append(await client.call(ECHO, value(b"first")))

    async def second() -> None:
        with pytest.raises(ConnectionClosed):
            await client.call(ECHO, value(b"second"))

    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        nursery.start_soon(first)
        await peer.receive_some()
        right.shutdown(trio.socket.SHUT_RD)  # what the client writes now is a broken pipe
        nursery.start_soon(second)
        await trio.testing.wait_all_tasks_blocked()
        response = Response(payload=value(b"first").SerializeToString())
        await peer.send_all(encode_frame(1, RESPONSE, 0, response.SerializeToString()))
        await peer.aclose()
    assert answers == [value(b"first")]


async def test_a_client_that_only_stops_sending_still_gets_its_answers() -> None:
    echo = Echo()
    left, right = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(make_server(echo).serve_stream, right)
        request = Request(service=NAME, method="Echo", payload=value(b"wait").SerializeToString())
        await left.send_all(encode_frame(1, REQUEST, 0, request.SerializeToString()))
        await left.send_eof()
        await echo.started.wait()
        echo.release.set()
        data = b""
        while piece := await left.receive_some():
            data += piece
        response = Response.FromString(data[HEADER.size :])
        assert response.payload == value(b"wait").SerializeToString()


@asynccontextmanager
async def listening(
    echo: Echo, path: Path, *, allow_peer: Callable[[Any], bool] | None = None, **options: Any
) -> AsyncIterator[None]:
    sock = trio.socket.socket(trio.socket.AF_UNIX)
    await sock.bind(str(path))
    sock.listen()
    server = make_server(echo, **options)
    async with trio.open_nursery() as nursery:

        async def serve(*, task_status: trio.TaskStatus[None]) -> None:
            listeners = [trio.SocketListener(sock)]
            await server.serve_listeners(listeners, allow_peer=allow_peer, task_status=task_status)

        await nursery.start(serve)
        yield
        nursery.cancel_scope.cancel()


async def start_and_hang_up(path: Path, echo: Echo, *, half_close_first: bool) -> None:
    stream = await trio.open_unix_socket(path)
    request = Request(service=NAME, method="Echo", payload=value(b"wait").SerializeToString())
    await stream.send_all(encode_frame(1, REQUEST, 0, request.SerializeToString()))
    await echo.started.wait()
    if half_close_first:
        await stream.send_eof()
        await trio.testing.wait_all_tasks_blocked()
        assert echo.ended == []
    await stream.aclose()


@pytest.mark.parametrize("half_close_first", [False, True])
async def test_handlers_are_cancelled_when_their_connection_is_gone(
    tmp_path: Path, half_close_first: bool
) -> None:
    echo = Echo()
    async with listening(echo, tmp_path / "sock"):
        await start_and_hang_up(tmp_path / "sock", echo, half_close_first=half_close_first)
        while not echo.ended:
            await trio.testing.wait_all_tasks_blocked()
        assert echo.ended == ["cancelled"]


async def test_handlers_finish_without_their_connection_if_told_so(tmp_path: Path) -> None:
    echo = Echo()
    async with listening(echo, tmp_path / "sock", finish_handlers_on_disconnect=True):
        await start_and_hang_up(tmp_path / "sock", echo, half_close_first=False)
        client = Client(await trio.open_unix_socket(tmp_path / "sock"))
        async with trio.open_nursery() as nursery:
            await nursery.start(client.run)
            assert await client.call(ECHO, value()) == value()
            echo.release.set()
            await trio.testing.wait_all_tasks_blocked()
            assert echo.ended == ["finished"]
            nursery.cancel_scope.cancel()


async def test_after_reply_runs_when_the_answer_has_been_handed_over() -> None:
    echo = Echo()
    left, right = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(make_server(echo).serve_stream, right)
        order: list[str] = []
        deliver = right.send_stream.send_all_hook
        assert deliver is not None

        async def sent() -> None:
            assert echo.ended == []
            order.append("sent")
            await deliver()

        right.send_stream.send_all_hook = sent
        request = Request(service=NAME, method="DoNothing")
        await left.send_all(encode_frame(1, REQUEST, 0, request.SerializeToString()))
        assert await left.receive_some()
        await trio.testing.wait_all_tasks_blocked()
        assert order + echo.ended == ["sent", "replied"]
        nursery.cancel_scope.cancel()


async def test_a_client_stream_that_breaks_off_fails_in_its_handler() -> None:
    echo = Echo()
    left, right = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(make_server(echo, finish_handlers_on_disconnect=True).serve_stream, right)
        request = Request(service=NAME, method="Collect")
        await left.send_all(encode_frame(1, REQUEST, 0, request.SerializeToString()))
        await left.send_eof()
    (text,) = echo.ended
    assert text.startswith("CANCELLED")


async def test_peers_are_known_by_their_credentials_and_can_be_refused(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def nobody(peer: Any) -> bool:
        seen.append((peer.uid, peer.gid))
        return False

    async with listening(Echo(), tmp_path / "sock", allow_peer=nobody):
        stream = await trio.open_unix_socket(tmp_path / "sock")
        assert await stream.receive_some() == b""
        mine = peer_credentials(stream)
        assert seen == [(mine.uid, mine.gid)]
        await stream.aclose()


async def test_garbage_does_not_end_the_server(tmp_path: Path) -> None:
    async with listening(Echo(), tmp_path / "sock"):
        noise = await trio.open_unix_socket(tmp_path / "sock")
        await noise.send_all(b"GET / HTTP/1.1\r\n\r\n" * 100)
        await noise.aclose()
        client = Client(await trio.open_unix_socket(tmp_path / "sock"))
        async with trio.open_nursery() as nursery:
            await nursery.start(client.run)
            assert await client.call(ECHO, value(b"still here")) == value(b"still here")
            await client.aclose()
            await client.closed.wait()
