"""The guest's end of a serial line, against the host's own session over a socket pair."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from agent.multiplex import serve_line
from agent.streams import ByteStream
from yamux.resync import Initiator
from yamux.session import Session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SIZE = 3 << 20  # bytes: many windows


def echo(stream: ByteStream) -> None:
    """Send back what comes, until its end."""
    while data := stream.receive(65536):
        stream.send(data)
    stream.close_sending()
    stream.close()


@asynccontextmanager
async def line() -> AsyncIterator[trio.SocketStream]:
    """A line whose guest end is served by the agent's code in a thread."""
    guest, host = socket.socketpair()
    fd = guest.detach()

    def serve() -> None:
        try:
            serve_line(fd, echo)
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
