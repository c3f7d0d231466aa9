"""How a session begins on a line that has no beginning: the handshake of `resync`, over a trio stream."""

from __future__ import annotations

import trio

from yamux.connection import BACKLOG
from yamux.frames import INITIAL_WINDOW
from yamux.resync import Initiator
from yamux.session import READ_SIZE, Session


async def open_over_serial(
    transport: trio.abc.Stream,
    *,
    nonce: int,
    timeout: float,
    stock_peer: bool = False,
    max_window: int = INITIAL_WINDOW,
    backlog: int = BACKLOG,
    keepalive: tuple[float, float] | None = None,
) -> Session:
    """Begin a session, as the client, on a line that may hold an older session's bytes (`resync`).

    Returns a session to be `run`. On failure the transport is closed: connect again and use another nonce.

    Raises:
        trio.TooSlowError: no answer within `timeout` seconds.
        trio.BrokenResourceError: the line failed or ended.

    """
    hello = Initiator(nonce=nonce, stock_peer=stock_peer)
    try:
        with trio.fail_after(timeout):
            await _shake_hands(transport, hello)
    except BaseException:
        await trio.aclose_forcefully(transport)
        raise
    return Session(
        transport,
        client=True,
        max_window=max_window,
        backlog=backlog,
        keepalive=keepalive,
        first_bytes=hello.trailing_data,
    )


async def _shake_hands(transport: trio.abc.Stream, hello: Initiator) -> None:
    """Send and hunt at the same time: the peer may be unable to read us before its stale output is taken."""
    failures: list[trio.BrokenResourceError] = []

    async def send() -> None:
        try:
            await transport.send_all(hello.data_to_send())
        except trio.BrokenResourceError as error:
            failures.append(error)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        try:
            while not hello.done:
                data = await transport.receive_some(READ_SIZE)
                if not data:
                    raise trio.BrokenResourceError("the line ended")
                hello.receive_data(bytes(data))
        except trio.BrokenResourceError as error:
            failures.append(error)
            nursery.cancel_scope.cancel()
    if failures:
        raise trio.BrokenResourceError(f"no yamux handshake: {failures[0]}") from failures[0]
