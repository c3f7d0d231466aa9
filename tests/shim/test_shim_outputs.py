"""Outputs on a host that hangs or has no descriptors left: nobody waits for ever, and nothing stays open."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest
import trio
import trio.testing

from shim.logger import open_logger
from shim.outputs import FILE_GRACE, FifoOutput, FileOutput
from shim.stdio_uri import parse_target
from vc.errors import InvalidArgument

MORE_THAN_A_PIPE = bytes(1 << 20)  # bytes


@pytest.fixture
def slow_file(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """A file whose writes hang until somebody reads the descriptor, which is what a fifo does."""
    path = tmp_path / "slow"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    yield str(path), reader
    os.set_blocking(reader, True)
    while os.read(reader, 1 << 16):  # until the last writer has ended
        pass
    os.close(reader)


async def test_closing_does_not_wait_for_a_write_that_hangs(
    slow_file: tuple[str, int], autojump_clock: trio.testing.MockClock
) -> None:
    output = FileOutput(slow_file[0], create=False)
    with trio.move_on_after(1) as scope:
        await output.write_all(MORE_THAN_A_PIPE)
    output.close()
    assert scope.cancelled_caught
    assert trio.current_time() - scope.deadline == pytest.approx(FILE_GRACE)


async def test_a_write_that_is_under_way_is_finished_before_the_end(slow_file: tuple[str, int]) -> None:
    path, reader = slow_file
    output = FileOutput(path, create=False)
    taken = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(output.write_all, MORE_THAN_A_PIPE)
        await trio.lowlevel.wait_readable(reader)
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            while taken < len(MORE_THAN_A_PIPE):
                await trio.lowlevel.wait_readable(reader)
                taken += len(os.read(reader, 1 << 16))
    output.close()
    assert taken == len(MORE_THAN_A_PIPE)


def descriptors() -> set[int]:
    """Return what is open, the listing itself included."""
    return {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}


@contextmanager
def room_for(count: int) -> Iterator[None]:
    """Let so many further descriptors be opened inside the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = (number for number in range(soft) if not os.path.lexists(f"/proc/self/fd/{number}"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(islice(free, count, None)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("room", range(12))
async def test_a_logging_program_that_descriptors_are_missing_for_leaves_none_open(room: int) -> None:
    before = descriptors()
    try:
        with room_for(room):
            logger = await open_logger(parse_target("binary:///bin/true"), container_id="c", namespace="n")
    except InvalidArgument as exc:
        assert "/bin/true" in str(exc) and "Too many open files" in str(exc)
    else:
        assert room > 6, "three pipes need more"
        await logger.end()
    assert descriptors() == before


@pytest.mark.parametrize("room", range(3))
async def test_a_fifo_that_descriptors_are_missing_for_leaves_none_open(room: int, tmp_path: Path) -> None:
    path = tmp_path / "out"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    before = descriptors()
    try:
        with room_for(room):
            output = FifoOutput(str(path))
    except OSError:
        assert room < 2
    else:
        assert room == 2
        output.close()
    assert descriptors() == before
    os.close(reader)
