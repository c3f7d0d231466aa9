"""Blocking clean-up is given up after a while, for a file system that hangs must not hang its pod."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager

import pytest
import trio
import trio.testing

from vc import blocking


async def test_an_undo_that_hangs_is_left_behind(autojump_clock: trio.testing.MockClock) -> None:
    go_on, ended = threading.Event(), threading.Event()

    @contextmanager
    def hanging() -> Iterator[str]:
        yield "value"
        go_on.wait(3)  # seconds of the world, where only the test's clock jumps
        ended.set()

    started = trio.current_time()
    async with AsyncExitStack() as stack:
        assert await blocking.enter(stack, hanging()) == "value"
    left_behind = not ended.is_set()
    go_on.set()
    assert left_behind
    assert trio.current_time() - started == pytest.approx(blocking.UNDO_TIMEOUT)
