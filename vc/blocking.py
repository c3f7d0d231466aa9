"""Context managers of blocking code, used from trio: entering and leaving run in worker threads."""

from __future__ import annotations

from contextlib import AbstractContextManager, AsyncExitStack
from typing import TypeVar

import trio

T = TypeVar("T")

UNDO_TIMEOUT = 5.0  # seconds until clean-up gives up waiting for a worker thread


async def enter(stack: AsyncExitStack, manager: AbstractContextManager[T]) -> T:
    """Enter `manager` in a worker thread and put its exit, shielded and bounded, on `stack`."""
    value = await trio.to_thread.run_sync(manager.__enter__)

    async def leave() -> None:
        with trio.move_on_after(UNDO_TIMEOUT, shield=True):
            # Else the time limit would be for nothing: trio waits for a thread however long it takes.
            await trio.to_thread.run_sync(manager.__exit__, None, None, None, abandon_on_cancel=True)

    stack.push_async_callback(leave)
    return value
