"""Logging programs: what they are given, and how long they are waited for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from shim.logger import END_GRACE
from tests.shim.streams import Setup
from vc.errors import InvalidArgument

LOGGER = """#!/bin/sh
echo "$0 $*" > {out}.argv
env | grep ^CONTAINER > {out}.env
{ready}
cat <&3 > {out}.out
cat <&4 > {out}.err
"""


def make_logger(directory: Path, ready: str) -> Path:
    path = directory / "logger"
    path.write_text(LOGGER.replace("{out}", str(directory / "log")).replace("{ready}", ready))
    path.chmod(0o755)
    return path


async def test_a_logging_program_gets_arguments_identity_and_both_outputs(setup: Setup) -> None:
    path = make_logger(setup.directory, "echo >&5; exec 5>&-")
    await setup.run(stdout=f"binary-v2://{path}?id=7&flag")
    await setup.guest.write(b"to stdout")
    await setup.guest.err.send_all(b"to stderr")
    await setup.guest.end()
    with trio.fail_after(20):
        await setup.io.wait_finished()
        while not (setup.directory / "log.err").exists() or not (setup.directory / "log.err").read_bytes():
            await trio.sleep(0.01)  # another program's file: nothing tells
    log = {name: (setup.directory / f"log.{name}").read_text() for name in ("argv", "env", "out", "err")}
    assert log["argv"] == f"{path} id 7 flag\n"
    assert sorted(log["env"].split()) == ["CONTAINER_ID=c1", "CONTAINER_NAMESPACE=ns"]
    assert (log["out"], log["err"]) == ("to stdout", "to stderr")


async def test_a_logging_program_gets_the_one_output_of_a_terminal(setup: Setup) -> None:
    """As with `nerdctl run -t -d`; the other pipe is there and stays empty."""
    path = make_logger(setup.directory, "exec 5>&-")
    await setup.run(stdout=f"binary://{path}", stderr="/nowhere/fifo", terminal=True)
    await setup.guest.write(b"of the terminal")
    await setup.guest.end()
    with trio.fail_after(20):
        await setup.io.wait_finished()
        await setup.io.close()
        await setup.io.end_logger()
    assert (setup.directory / "log.out").read_text() == "of the terminal"
    assert (setup.directory / "log.err").read_text() == ""


async def test_a_strict_logging_program_that_is_not_ready_is_an_error(setup: Setup) -> None:
    path = make_logger(setup.directory, "exit 3")
    io = setup.make(stdout=f"binary-v2://{path}")
    with pytest.raises(InvalidArgument, match="without saying that it is ready"):
        await io.open()


async def test_a_logging_program_that_does_not_end_is_ended(setup: Setup) -> None:
    path = make_logger(setup.directory, "exec 5>&-; exec sleep 1000")
    await setup.run(stdout=f"binary://{path}")
    await setup.guest.end()
    with trio.fail_after(20):
        await setup.io.close()
        await setup.io.end_logger()


# Reads a piece for each byte that it is given on one fifo, and says so on the other.
SLOW_LOGGER = """#!/bin/sh
exec 5>&- 6<{directory}/go 7>{directory}/done
while head -c 1 <&6 >/dev/null; do
    dd bs=65536 count=1 <&3 2>/dev/null >>{directory}/log
    echo >&7
done
"""


async def test_a_logging_program_that_goes_on_reading_is_not_ended(
    setup: Setup, mock_clock: MockClock
) -> None:
    """Symptom: on a slow machine the end of a log was missing, if the program died of SIGTERM at once."""
    path = setup.directory / "logger"
    path.write_text(SLOW_LOGGER.format(directory=setup.directory))
    path.chmod(0o755)
    go = os.open(setup.fifo("go"), os.O_RDWR | os.O_NONBLOCK)
    done = os.open(setup.fifo("done"), os.O_RDONLY | os.O_NONBLOCK)
    await setup.run(stdout=f"binary://{path}")
    pieces = 8
    await setup.guest.write(bytes(pieces * 65536))
    await setup.guest.end()
    await setup.io.wait_finished()
    await setup.io.close()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(setup.io.end_logger)
        for _ in range(pieces):
            os.write(go, b"x")
            await trio.lowlevel.wait_readable(done)
            assert os.read(done, 100) == b"\n", "it has ended"
            mock_clock.jump(END_GRACE)
            await wait_all_tasks_blocked()
        assert (setup.directory / "log").stat().st_size == pieces * 65536
        mock_clock.jump(END_GRACE)  # nothing is read any more, so it is sent a signal, which ends it
    os.close(go)
    os.close(done)
