"""A session over trio: streams as trio means them, fairness, and every way in which a session ends."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from yamux.connection import BACKLOG, Connection
from yamux.errors import RemoteProtocolError
from yamux.frames import DATA, GO_AWAY, PING, RST, SYN, WINDOW_UPDATE, encode_header
from yamux.resync import Responder
from yamux.serial import open_over_serial
from yamux.session import Session
from yamux.trio_stream import MAX_LINGERING, Stream
from yamux.turns import CHUNK


@asynccontextmanager
async def sessions() -> AsyncIterator[tuple[Session, Session]]:
    left, right = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        client, server = Session(left, client=True), Session(right, client=False)
        await nursery.start(client.run)
        await nursery.start(server.run)
        yield client, server
        nursery.cancel_scope.cancel()


async def stream_pair(client: Session, server: Session) -> tuple[Stream, Stream]:
    ours = await client.open_stream()
    return ours, await server.accept_stream()


async def clog(stream: Stream) -> None:
    """Send until the window is full."""
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def stop_when_stuck() -> None:
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()

            nursery.start_soon(stop_when_stuck)
            while True:
                await stream.send_all(bytes(65536))


@pytest.mark.parametrize("server_opens", [False, True])
async def test_a_stream_is_a_trio_half_closeable_stream(server_opens: bool) -> None:
    async with sessions() as (client, server):

        async def make() -> tuple[Stream, Stream]:
            return await (stream_pair(server, client) if server_opens else stream_pair(client, server))

        async def make_clogged() -> tuple[Stream, Stream]:
            sender, receiver = await make()
            await clog(sender)
            await clog(receiver)  # the checks also use the pair the other way round
            return sender, receiver

        await trio.testing.check_two_way_stream(make, make_clogged)
        await trio.testing.check_half_closeable_stream(make, make_clogged)


class Peer:
    """The other end of a session, moved by hand: what it sends and reads is up to the test."""

    def __init__(self, transport: trio.abc.Stream, *, client: bool) -> None:
        self.transport = transport
        self.connection = Connection(client=client)

    async def flush(self) -> None:
        await self.transport.send_all(self.connection.data_to_send())

    async def frames(self, count: int = 1) -> bytes:
        """Read frames without a body."""
        data = b""
        while len(data) < 12 * count:
            data += await self.transport.receive_some(12 * count - len(data))
        return data


@asynccontextmanager
async def session_and_peer(
    *, client: bool = True, lockstep: bool = False
) -> AsyncIterator[tuple[Session, Peer]]:
    left, right = (trio.testing.lockstep_stream_pair if lockstep else trio.testing.memory_stream_pair)()
    async with trio.open_nursery() as nursery:
        session = Session(left, client=client)
        await nursery.start(session.run)
        yield session, Peer(right, client=not client)
        nursery.cancel_scope.cancel()


async def receive_exactly(stream: trio.abc.ReceiveStream, n: int) -> bytes:
    data = bytearray()
    while len(data) < n:
        piece = await stream.receive_some(n - len(data))
        assert piece
        data += piece
    return bytes(data)


async def test_much_data_both_ways_over_a_socket_with_many_streams() -> None:
    left, right = (trio.SocketStream(trio.socket.from_stdlib_socket(s)) for s in socket.socketpair())
    pattern = bytes(range(251)) * 4000
    client, server = Session(left, client=True), Session(right, client=False, max_window=1 << 20)

    async def exchange(stream: Stream, salt: int) -> None:
        async def send() -> None:
            for _ in range(3):
                await stream.send_all(pattern[salt:])
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            got = bytearray()
            async for piece in stream:
                got += piece
        # The two ends of a stream send with different salts, known to both by parity.
        assert got == pattern[salt ^ 1 :] * 3
        await stream.aclose()

    async def serve() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                stream = await server.accept_stream()
                nursery.start_soon(exchange, stream, stream.stream_id + 1 ^ 1)

    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        await nursery.start(server.run)
        async with trio.open_nursery() as users:
            users.start_soon(serve)
            for _ in range(8):
                stream = await client.open_stream()
                users.start_soon(exchange, stream, stream.stream_id + 1)
        await trio.testing.wait_all_tasks_blocked()
        assert not client._shared.streams
        assert not server._shared.streams
        await client.aclose()


async def test_a_reader_that_stops_stops_only_its_stream() -> None:
    async with sessions() as (client, server):
        stuck, _unread = await stream_pair(client, server)
        await clog(stuck)
        live, other = await stream_pair(client, server)
        for _ in range(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(live.send_all, bytes(100_000))
                await receive_exactly(other, 100_000)


async def test_streams_with_data_take_turns_and_control_frames_go_first(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with session_and_peer(lockstep=True) as (session, peer), trio.open_nursery() as nursery:
        first, second = await session.open_stream(), await session.open_stream()
        assert await peer.frames(2) == b"".join(encode_header(WINDOW_UPDATE, SYN, i, 0) for i in (1, 3))
        for stream in (first, second):
            nursery.start_soon(stream.send_all, bytes(3 * CHUNK))
        header = await peer.frames()
        await peer.transport.send_all(encode_header(PING, SYN, 0, 5))
        order = []
        # Only the frame that was begun before the ping arrived may come before its answer.
        for _ in range(7):
            if header[1] == PING:
                order.append(0)
            else:
                order.append(header[7])
                await receive_exactly(peer.transport, int.from_bytes(header[8:], "big"))
            if len(order) < 7:
                header = await peer.frames()
        assert [i for i in order if i] in ([1, 3] * 3, [3, 1] * 3)
        assert order.index(0) == 1


async def test_both_sides_full_of_data_do_not_deadlock() -> None:
    async with sessions() as (client, server):
        ours, theirs = await stream_pair(client, server)
        size = 3_000_000
        async with trio.open_nursery() as nursery:
            for stream in (ours, theirs):
                nursery.start_soon(stream.send_all, bytes(size))
                nursery.start_soon(receive_exactly, stream, size)


async def test_a_cancelled_session_finishes_its_frame_and_says_go_away() -> None:
    left, right = trio.testing.lockstep_stream_pair()
    peer = Peer(right, client=False)
    async with trio.open_nursery() as nursery:
        session = Session(left, client=True)
        run = trio.CancelScope()

        async def run_until_cancelled() -> None:
            with run:
                await session.run()

        nursery.start_soon(run_until_cancelled)
        stream = await session.open_stream()
        await peer.frames()
        nursery.start_soon(stream.send_all, bytes(1000))
        await receive_exactly(right, 12 + 500)
        run.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert await receive_exactly(right, 500) == bytes(500)
        assert await peer.frames() == encode_header(GO_AWAY, 0, 0, 0)
        assert await right.receive_some() == b""


async def test_a_line_that_takes_nothing_holds_up_the_end_only_for_a_while(
    autojump_clock: trio.testing.MockClock,
) -> None:
    left, _right = trio.testing.lockstep_stream_pair()
    session = Session(left, client=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(session.run)
        await session.open_stream()
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(10):
            await session.aclose()


@pytest.mark.parametrize("how", ["eof", "cut frame", "garbage", "go away", "aclose"])
async def test_the_end_of_a_session_breaks_every_stream_and_every_wait(how: str) -> None:
    left, right = trio.testing.memory_stream_pair()
    session, peer = Session(left, client=True), Peer(right, client=False)
    causes: list[BaseException | None] = []
    outcome: list[Exception] = []

    async def run(task_status: trio.TaskStatus[None]) -> None:
        try:
            await session.run(task_status=task_status)
        except (trio.BrokenResourceError, RemoteProtocolError) as error:
            outcome.append(error)

    async def expect_broken(act: object, *args: object) -> None:
        assert callable(act)
        with pytest.raises(trio.BrokenResourceError) as caught:
            await act(*args)
        causes.append(caught.value.__cause__)

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        reading, full = await session.open_stream(), await session.open_stream()
        await clog(full)
        for _ in range(BACKLOG - 2):
            await session.open_stream()
        nursery.start_soon(expect_broken, reading.receive_some)
        nursery.start_soon(expect_broken, full.send_all, b"x")
        nursery.start_soon(expect_broken, session.open_stream)
        nursery.start_soon(expect_broken, session.accept_stream)
        nursery.start_soon(expect_broken, session.ping)
        await trio.testing.wait_all_tasks_blocked()
        if how == "eof":
            await peer.transport.aclose()
        elif how == "cut frame":
            await peer.transport.send_all(bytes(5))
            await peer.transport.aclose()
        elif how == "garbage":
            await peer.transport.send_all(b"\xff" * 12)
        elif how == "go away":
            await peer.transport.send_all(encode_header(GO_AWAY, 0, 0, 2))
        else:
            await session.aclose()
    expected = {
        "eof": EOFError,
        "cut frame": trio.BrokenResourceError,
        "garbage": RemoteProtocolError,
        "go away": trio.BrokenResourceError,
        "aclose": trio.ClosedResourceError,
    }[how]
    assert [type(cause) for cause in causes] == [expected] * 5
    assert [type(error) for error in outcome] == ([] if how in ("eof", "aclose") else [expected])
    with pytest.raises(trio.BrokenResourceError):
        await reading.send_all(b"x")


async def test_what_arrived_before_the_session_ended_can_still_be_read() -> None:
    async with session_and_peer(client=False) as (session, peer):
        whole, part = peer.connection.open_stream(), peer.connection.open_stream()
        peer.connection.send_data(whole, b"all of it")
        peer.connection.end_stream(whole)
        peer.connection.send_data(part, b"a part")
        await peer.flush()
        streams = [await session.accept_stream(), await session.accept_stream()]
        await peer.transport.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert await streams[0].receive_some() == b"all of it"
        assert await streams[0].receive_some() == b""
        assert await streams[1].receive_some() == b"a part"
        with pytest.raises(trio.BrokenResourceError):
            await streams[1].receive_some()


async def test_the_last_words_of_a_peer_that_reads_no_more_are_heard() -> None:
    """A write fails as soon as the peer is gone, while its last output still lies in the line."""
    left, right = trio.testing.memory_stream_pair()
    session, peer = Session(left, client=False), Peer(right, client=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(session.run)
        peer.connection.open_stream()
        await peer.flush()
        stream = await session.accept_stream()
        await peer.frames()
        assert isinstance(right, trio.StapledStream)
        await right.receive_stream.aclose()
        await session.open_stream()
        await trio.testing.wait_all_tasks_blocked()
        peer.connection.send_data(1, b"the end")
        await peer.flush()
        await right.aclose()
        assert await stream.receive_some() == b"the end"


async def test_a_reset_drops_what_was_received_and_a_stream_not_accepted_yet() -> None:
    async with session_and_peer(client=False) as (session, peer):
        for _ in range(2):
            stream_id = peer.connection.open_stream()
            peer.connection.send_data(stream_id, b"never read")
        await peer.flush()
        stream = await session.accept_stream()
        peer.connection.reset_stream(1)
        peer.connection.reset_stream(3)
        await peer.flush()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"x")
        assert not session._incoming
        assert not session._shared.streams
        await stream.aclose()


async def test_data_for_a_closed_stream_is_answered_by_one_reset() -> None:
    async with session_and_peer(client=False) as (session, peer):
        peer.connection.open_stream()
        await peer.flush()
        stream = await session.accept_stream()
        await stream.aclose()
        peer.connection.send_data(1, b"who listens?")
        await peer.flush()
        await peer.transport.send_all(encode_header(DATA, 0, 1, 1) + b"x" + encode_header(PING, SYN, 0, 9))
        ack_and_fin = await peer.frames(2)
        assert ack_and_fin[3] == 2 and ack_and_fin[15] == 4
        assert await peer.frames() == encode_header(WINDOW_UPDATE, RST, 1, 0)
        assert (await peer.frames())[1] == PING


async def test_closing_with_unread_data_resets_so_that_a_blocked_sender_learns_of_it() -> None:
    async with sessions() as (client, server):
        sender, receiver = await stream_pair(client, server)
        await clog(sender)
        async with trio.open_nursery() as nursery:

            async def expect_reset() -> None:
                with pytest.raises(trio.BrokenResourceError):
                    await sender.send_all(b"x")

            nursery.start_soon(expect_reset)
            await trio.testing.wait_all_tasks_blocked()
            await receiver.aclose()


async def test_a_cancelled_close_is_a_reset() -> None:
    async with sessions() as (client, server):
        ours, theirs = await stream_pair(client, server)
        await trio.aclose_forcefully(ours)
        with pytest.raises(trio.BrokenResourceError):
            await theirs.receive_some()


async def test_a_peer_that_never_ends_its_streams_does_not_grow_our_memory() -> None:
    async with session_and_peer(client=False) as (session, peer):

        async def read_and_forget() -> None:
            while await peer.transport.receive_some():
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_and_forget)
            for _ in range(MAX_LINGERING + 50):
                peer.connection.open_stream()
                await peer.flush()
                stream = await session.accept_stream()
                peer.connection.receive_data(encode_header(WINDOW_UPDATE, 2, stream.stream_id, 0))
                await stream.aclose()
            assert len(session._shared.streams) == MAX_LINGERING
            nursery.cancel_scope.cancel()


async def test_opening_waits_while_the_peer_has_a_backlog_to_accept() -> None:
    async with sessions() as (client, server):
        for _ in range(BACKLOG):
            await client.open_stream()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.open_stream)
            await trio.testing.wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == 1
            await server.accept_stream()


async def test_after_go_away_streams_live_on_and_new_ones_are_refused() -> None:
    async with sessions() as (client, server):
        ours, theirs = await stream_pair(client, server)
        late = await client.open_stream()
        await trio.testing.wait_all_tasks_blocked()
        server.go_away()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BrokenResourceError):
            await client.open_stream()
        await ours.send_all(b"still here")
        assert await theirs.receive_some() == b"still here"
        await server.open_stream()
        await client.accept_stream()
        assert (await server.accept_stream()).stream_id == late.stream_id


async def test_keepalive_ends_a_session_whose_peer_does_not_answer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    left, _right = trio.testing.memory_stream_pair()
    started = trio.current_time()
    with pytest.raises(trio.BrokenResourceError, match="ping"):
        await Session(left, client=True, keepalive=(30, 10)).run()
    assert trio.current_time() - started == pytest.approx(40)


async def test_keepalive_leaves_a_peer_that_answers_alone(autojump_clock: trio.testing.MockClock) -> None:
    left, right = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        client = Session(left, client=True, keepalive=(30, 10))
        await nursery.start(client.run)
        await nursery.start(Session(right, client=False).run)
        await trio.sleep(1000)
        await client.ping()
        await client.aclose()


async def test_closing_a_session_that_never_ran_closes_its_transport() -> None:
    left, right = trio.testing.memory_stream_pair()
    await Session(left, client=True).aclose()
    assert await right.receive_some() == b""


async def test_a_serial_line_is_opened_behind_stale_bytes_even_if_the_peer_must_write_first(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Neither side of a lockstep line can write before the other reads, as on a full serial port."""
    left, right = trio.testing.lockstep_stream_pair()
    sessions_opened: list[Session] = []

    async def host() -> None:
        sessions_opened.append(await open_over_serial(left, nonce=0xABCDEF, timeout=5))

    async def guest() -> None:
        await right.send_all(b"the rest of an old frame" * 1000)
        responder = Responder()
        while not responder.receive_data(bytes(await right.receive_some())):
            pass
        connection = Connection(client=False)
        opened = encode_header(WINDOW_UPDATE, SYN, 2, 0)
        await right.send_all(responder.data_to_send() + connection.data_to_send() + opened)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(host)
        nursery.start_soon(guest)
    async with trio.open_nursery() as nursery:
        await nursery.start(sessions_opened[0].run)
        assert (await sessions_opened[0].accept_stream()).stream_id == 2
        nursery.cancel_scope.cancel()


async def test_a_serial_line_without_an_answer_is_given_up_and_closed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    left, right = trio.testing.memory_stream_pair()
    with pytest.raises(trio.TooSlowError):
        await open_over_serial(left, nonce=1, timeout=5)
    assert len(await right.receive_some()) == 24
    assert await right.receive_some() == b""


async def test_a_serial_line_that_ends_is_reported_as_broken() -> None:
    left, right = trio.testing.memory_stream_pair()
    await right.aclose()
    with pytest.raises(trio.BrokenResourceError):
        await open_over_serial(left, nonce=1, timeout=5)
