"""Every way to the guest, against a peer that plays the guest's side with real sockets."""

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from vc.agent_client import transports
from vc.agent_client.transports import (
    AGENT_PORT,
    Address,
    HybridVsockAddress,
    SerialAddress,
    Transport,
    UnixAddress,
    check_answer_untrusted,
    format_connect,
    open_transport,
)
from vc.background import background
from vc.errors import GuestGone, NotFound, Timeout
from vc.unixsock import listen
from yamux.resync import Responder
from yamux.session import Session

Streams = tuple[trio.abc.HalfCloseableStream, trio.abc.HalfCloseableStream]


class Guest:
    """A guest whose ports all exist, except 9999, which is refused, and 8888, which never answers."""

    def __init__(self) -> None:
        self.streams: dict[int, list[trio.abc.HalfCloseableStream]] = {}
        self.arrived = trio.Event()

    async def greet(self, stream: trio.abc.HalfCloseableStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):  # a caller that has waited long enough is gone
            await self._answer(stream)

    async def _answer(self, stream: trio.abc.HalfCloseableStream) -> None:
        line = b""
        while not line.endswith(b"\n"):
            byte = await stream.receive_some(1)
            if not byte:
                return
            line += byte
        port = int(line.removeprefix(b"CONNECT "))
        self.streams.setdefault(port, []).append(stream)
        if port == 9999:
            await stream.send_all(b"ERR nobody listens\n")
            await stream.aclose()
        elif port != 8888:
            await stream.send_all(b"OK %d\n" % port)
        self.arrived.set()

    async def take(self, port: int) -> trio.abc.HalfCloseableStream:
        while not self.streams.get(port):
            await self.arrived.wait()
            self.arrived = trio.Event()
        return self.streams[port].pop()

    async def serve_sockets(self, listener: trio.SocketListener) -> None:
        await trio.serve_listeners(self._greet_and_keep, [listener])

    async def _greet_and_keep(self, stream: trio.SocketStream) -> None:
        await self.greet(stream)
        await trio.sleep_forever()

    async def serve_serial(self, listener: trio.SocketListener) -> None:
        while True:
            line = await listener.accept()
            responder = Responder()
            while not responder.receive_data(bytes(await line.receive_some(1000))):
                pass
            await line.send_all(b"stale" + responder.data_to_send())
            session = Session(line, client=False, first_bytes=responder.trailing_data)
            async with trio.open_nursery() as nursery:
                await nursery.start(session.run)
                with contextlib.suppress(trio.BrokenResourceError):
                    while True:
                        nursery.start_soon(self.greet, await session.accept_stream())


KINDS: dict[str, Callable[[Path], Address]] = {
    "serial": SerialAddress,
    "hybrid": HybridVsockAddress,
    "unix": UnixAddress,
}


def listener_at(path: Path) -> trio.SocketListener:
    return trio.SocketListener(trio.socket.from_stdlib_socket(listen(path)))


@contextlib.asynccontextmanager
async def reached(kind: str, path: Path) -> AsyncIterator[tuple[Transport, Guest]]:
    guest = Guest()
    async with listener_at(path) as listener, trio.open_nursery() as nursery:
        nursery.start_soon(guest.serve_serial if kind == "serial" else guest.serve_sockets, listener)
        async with open_transport(KINDS[kind](path), timeout=5) as transport:
            yield transport, guest
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_dialed_stream_is_a_stream(kind: str, tmp_path: Path) -> None:
    async with reached(kind, tmp_path / "sock") as (transport, guest):

        async def make() -> Streams:
            ours = await transport.dial(70000)
            return ours, await guest.take(70000)

        await trio.testing.check_half_closeable_stream(make, None)


@pytest.mark.parametrize("kind", KINDS)
async def test_no_byte_behind_the_answer_is_lost(kind: str, tmp_path: Path) -> None:
    async with reached(kind, tmp_path / "sock") as (transport, guest):
        ours = await transport.dial(5)
        theirs = await guest.take(5)
        await theirs.send_all(b"OK 1\nfirst")
        await theirs.send_eof()
        received = b""
        while piece := await ours.receive_some():
            received += piece
        assert received == b"OK 1\nfirst"
        await ours.aclose()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_refused_port_is_not_found_and_the_reason_is_told(kind: str, tmp_path: Path) -> None:
    async with reached(kind, tmp_path / "sock") as (transport, _):
        with pytest.raises(NotFound, match=r"port 9999 .*: nobody listens"):
            await transport.dial(9999)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_port_that_never_answers_is_a_timeout(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transports, "DIAL_TIMEOUT", 0.05)
    async with reached(kind, tmp_path / "sock") as (transport, _):
        with pytest.raises(Timeout, match="port 8888"):
            await transport.dial(8888)


async def test_the_first_connection_is_not_wasted(tmp_path: Path) -> None:
    async with reached("unix", tmp_path / "sock") as (transport, guest):
        ours = await transport.dial(AGENT_PORT)
        theirs = await guest.take(AGENT_PORT)
        await theirs.send_all(b"x")
        assert await ours.receive_some() == b"x"
        assert not guest.streams[AGENT_PORT]
        await ours.aclose()


@pytest.mark.parametrize("kind", ["hybrid", "unix"])
async def test_an_agent_that_comes_late_is_waited_for(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    guest = Guest()
    polled = trio.testing.Sequencer()

    async def come_late(nursery: trio.Nursery) -> None:
        async with polled(0):
            await trio.testing.wait_all_tasks_blocked(0.01)
            nursery.start_soon(guest.serve_sockets, listener_at(path))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(come_late, nursery)
        async with open_transport(KINDS[kind](path), timeout=5):
            assert isinstance(await guest.take(AGENT_PORT), trio.abc.Stream)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kind", ["hybrid", "unix"])
async def test_nobody_there_is_a_timeout(kind: str, tmp_path: Path) -> None:
    with pytest.raises(Timeout, match="nobody answered"):
        async with open_transport(KINDS[kind](tmp_path / "sock"), timeout=0.05):
            pass


@pytest.mark.parametrize(
    "answer",
    [b"NO\n", b"", b"\n", b"x" * 100_000, b"ERR \x1b[2J" + b"e" * 300 + b"\n", b"\xff\xfe\n", b"OKAY 5\n"],
)
async def test_a_hostile_answer_is_a_refusal(answer: bytes, tmp_path: Path) -> None:
    path = tmp_path / "sock"

    async def answer_badly(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.receive_some(1000)
            await stream.send_all(answer)

    async with trio.open_nursery() as nursery:
        transport = transports._UnixTransport(UnixAddress(path))
        nursery.start_soon(trio.serve_listeners, answer_badly, [listener_at(path)])
        with pytest.raises(NotFound) as caught:
            await transport.dial(5)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 600
        nursery.cancel_scope.cancel()


def test_the_lines() -> None:
    assert format_connect(1024) == b"CONNECT 1024\n"
    check_answer_untrusted(b"OK 1073741824")  # Firecracker answers with the number of its own port
    check_answer_untrusted(b"OK")


# The serial line


async def serial_pair(path: Path, guest: Callable[[trio.SocketStream], Awaitable[None]]) -> None:
    """Open a transport to a guest that does as it is told, which must fail with GuestGone or Timeout."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, guest, [listener_at(path)])
        async with open_transport(SerialAddress(path), timeout=0.2):
            pass


async def test_a_line_that_says_nothing_is_a_timeout(tmp_path: Path) -> None:
    async def say_nothing(line: trio.SocketStream) -> None:
        await trio.sleep_forever()

    with pytest.RaisesGroup(Timeout):
        await serial_pair(tmp_path / "sock", say_nothing)


async def test_a_flood_of_garbage_is_a_timeout(tmp_path: Path) -> None:
    async def flood(line: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            while True:
                await line.send_all(os.urandom(10_000))

    with pytest.RaisesGroup(Timeout):
        await serial_pair(tmp_path / "sock", flood)


async def test_the_end_of_the_vmm_ends_the_handshake_at_once(tmp_path: Path) -> None:
    async def die(line: trio.SocketStream) -> None:
        await line.receive_some(1)
        await line.aclose()

    with pytest.RaisesGroup(GuestGone):
        await serial_pair(tmp_path / "sock", die)


async def test_a_line_without_vmm_is_gone(tmp_path: Path) -> None:
    with pytest.raises(GuestGone, match="cannot be opened"):
        async with open_transport(SerialAddress(tmp_path / "none"), timeout=5):
            pass


async def test_an_opening_that_was_swallowed_is_repeated_on_a_new_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transports, "FIRST_REPEAT", 0.02)
    path = tmp_path / "sock"
    guest = Guest()
    async with listener_at(path) as listener, trio.open_nursery() as nursery:

        async def swallow_then_serve() -> None:
            stuck = await listener.accept()
            while await stuck.receive_some(1000):
                pass
            await stuck.aclose()
            await guest.serve_serial(listener)

        nursery.start_soon(swallow_then_serve)
        async with open_transport(SerialAddress(path), timeout=5) as transport:
            await (await transport.dial(5)).aclose()
        nursery.cancel_scope.cancel()


async def test_dials_after_the_end_of_the_line_say_that_the_guest_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    lines: list[trio.SocketStream] = []
    guest = Guest()
    with listen(path) as server:
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                listener = trio.SocketListener(trio.socket.from_stdlib_socket(server.dup()))
                line = await listener.accept()
                await listener.aclose()
                lines.append(line)
                responder = Responder()
                while not responder.receive_data(bytes(await line.receive_some(1000))):
                    pass
                await line.send_all(responder.data_to_send())

            nursery.start_soon(serve)
            async with open_transport(SerialAddress(path), timeout=5) as transport:
                await lines[0].aclose()
                with pytest.raises(GuestGone, match="ended"):
                    await transport.dial(5)
                with pytest.raises(GuestGone, match="ended"):
                    await transport.dial(6)
    assert not guest.streams


async def test_paths_longer_than_a_socket_address_work(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    async with reached("unix", directory / "sock") as (transport, _):
        await (await transport.dial(5)).aclose()
    assert (directory / "sock").stat().st_mode & 0o777 == 0o600


async def test_an_exception_of_the_block_comes_out_as_it_was(tmp_path: Path) -> None:
    async with listener_at(tmp_path / "sock") as listener, background() as peer:
        peer.start_soon(Guest().serve_serial, listener)
        with pytest.raises(ZeroDivisionError):
            async with open_transport(SerialAddress(tmp_path / "sock"), timeout=5):
                raise ZeroDivisionError
