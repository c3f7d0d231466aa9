"""A session over trio: streams as trio means them, fairness, and every way in which a session ends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from yamux.session import Session, Stream


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
