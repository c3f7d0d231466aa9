"""The guest's end of a serial line, against the host's own session over a socket pair."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from agent.multiplex import Line, answer, serve_line
from agent.streams import ByteStream
from yamux.resync import Initiator
from yamux.session import Session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agent.streams import Buffer

SIZE = 3 << 20  # bytes: many windows


def echo(stream: ByteStream) -> None:
    """Send back what comes, until its end."""
    while data := stream.receive(65536):
        stream.send(data)
    stream.close_sending()
    stream.close()


def nobody_comes() -> None:
    """Of a pair of sockets the other end is there, or has gone for good."""
    raise ConnectionResetError("the test has ended")


@asynccontextmanager
async def line() -> AsyncIterator[trio.SocketStream]:
    """A line whose guest end is served by the agent's code in a thread."""
    guest, host = socket.socketpair()
    fd = guest.detach()

    def serve() -> None:
        try:
            serve_line(fd, echo, nobody_comes)
        finally:
            os.close(fd)

    thread = threading.Thread(target=serve)
    thread.start()
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(host))
    try:
        with trio.fail_after(20):
            yield stream
    finally:
        await stream.aclose()
        await trio.to_thread.run_sync(thread.join)


async def handshake(stream: trio.SocketStream, nonce: int) -> bytes:
    """Open a session; returns its first bytes."""
    initiator = Initiator(nonce=nonce)
    await stream.send_all(initiator.data_to_send())
    while not initiator.receive_data(await stream.receive_some(65536)):
        pass
    return initiator.trailing_data


@asynccontextmanager
async def session(stream: trio.SocketStream, nonce: int = 1) -> AsyncIterator[Session]:
    """A session of the host."""
    first = await handshake(stream, nonce)
    async with trio.open_nursery() as nursery:
        made = Session(stream, client=True, first_bytes=first)
        nursery.start_soon(made.run)
        yield made
        nursery.cancel_scope.cancel()


async def test_a_stream_echoes_more_than_its_window() -> None:
    async with line() as stream, session(stream) as host, trio.open_nursery() as nursery:
        channel = await host.open_stream()
        sent = os.urandom(SIZE)

        async def send() -> None:
            await channel.send_all(sent)
            await channel.send_eof()

        nursery.start_soon(send)
        received = bytearray()
        while piece := await channel.receive_some(65536):
            received += piece
        assert received == sent


async def test_a_stream_that_the_host_resets_does_not_hold_the_others() -> None:
    async with line() as stream, session(stream) as host:
        blocked = await host.open_stream()
        with trio.move_on_after(0.2):
            while True:  # its echo fills the window that we do not empty, and then this direction's
                await blocked.send_all(bytes(65536))
        await trio.aclose_forcefully(blocked)
        other = await host.open_stream()
        await other.send_all(b"still here")
        await other.send_eof()
        assert await other.receive_some() == b"still here"
        assert await other.receive_some() == b""


async def test_a_new_handshake_ends_the_session_that_is_there() -> None:
    async with line() as stream:
        for nonce in (1, 2, 3):
            assert await handshake(stream, nonce) == b""
        async with session(stream, nonce=4) as host:
            channel = await host.open_stream()
            await channel.send_all(b"new")
            assert await channel.receive_some() == b"new"


async def test_garbage_before_the_handshake_is_thrown_away() -> None:
    async with line() as stream:
        await stream.send_all(os.urandom(5000))
        async with session(stream) as host:
            channel = await host.open_stream()
            await channel.send_all(b"hello")
            assert await channel.receive_some() == b"hello"


async def test_many_streams_at_once_do_not_mix() -> None:
    async def one(host: Session, index: int) -> None:
        channel = await host.open_stream()
        sent = bytes([index]) * 300_000
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                await channel.send_all(sent)
                await channel.send_eof()

            nursery.start_soon(send)
            received = bytearray()
            while piece := await channel.receive_some():
                received += piece
        assert received == sent

    async with line() as stream, session(stream) as host, trio.open_nursery() as nursery:
        for index in range(20):
            nursery.start_soon(one, host, index)


def test_an_opening_that_is_here_before_its_host_is_answered_when_the_host_is() -> None:
    """A pod on a busy machine waited four seconds for the VM that it had taken over."""
    host_is_known = False

    class Port(Line):
        """Behaves as a virtio port, which takes nothing until the kernel has heard of a host."""

        def write(self, *pieces: Buffer) -> None:
            if not host_is_known:
                raise ConnectionResetError("the host has closed its end of the line")
            super().write(*pieces)

    def host_comes() -> None:
        nonlocal host_is_known
        host_is_known = True

    guest, host = socket.socketpair()
    with guest, host:
        answer(Port(guest.fileno()), b"answer", host_comes)
        assert host.recv(100) == b"answer"
