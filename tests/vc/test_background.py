"""A nursery inside a context manager does not change what comes out of the block."""

import pytest
import trio
import trio.testing

from vc.background import background


async def test_the_blocks_exception_comes_out_as_it_was() -> None:
    error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError) as caught:
        async with background() as outer, background():
            outer.start_soon(trio.sleep_forever)
            raise error
    assert caught.value is error and error.__context__ is None


async def test_a_group_that_the_block_raised_stays_one_group() -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    with pytest.RaisesGroup(ZeroDivisionError):
        async with background(), background(), trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(fail)


async def test_a_task_that_fails_is_not_lost() -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    with pytest.RaisesGroup(ZeroDivisionError):
        async with background() as nursery:
            nursery.start_soon(fail)
            await trio.sleep_forever()


async def test_both_failures_are_told() -> None:
    async def fail_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise KeyError

    with pytest.RaisesGroup(ZeroDivisionError, KeyError):
        async with background() as nursery:
            nursery.start_soon(fail_when_cancelled)
            await trio.testing.wait_all_tasks_blocked()
            raise ZeroDivisionError


async def test_a_cancellation_from_outside_is_one() -> None:
    with trio.move_on_after(0) as scope:
        async with background() as nursery:
            nursery.start_soon(trio.sleep_forever)
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_tasks_end_with_the_block() -> None:
    ended = trio.Event()

    async def run() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with background() as nursery:
        nursery.start_soon(run)
        await trio.testing.wait_all_tasks_blocked()
    assert ended.is_set()
