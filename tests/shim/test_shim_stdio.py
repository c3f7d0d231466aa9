"""Streams between the guest (memory) and the client (real fifos, files and programs)."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from trio.testing import (
    MemoryReceiveStream,
    wait_all_tasks_blocked,
)

from shim import stdio
from shim.outputs import PIPE_BYTES
from shim.stdio import ProcessIO
from shim.stdio_uri import Kind, Plan, Target, parse_target, plan
from shim.tasks import Stdio
from tests.shim.streams import Setup
from vc.errors import InvalidArgument
from vc.process import StdioRequest


def reader(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK)


def writer(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_NONBLOCK)


async def read_exactly(descriptor: int, count: int) -> bytes:
    data = b""
    with trio.fail_after(20):
        while len(data) < count:
            try:
                piece = os.read(descriptor, count - len(data))
            except BlockingIOError:
                await trio.lowlevel.wait_readable(descriptor)
                continue
            assert piece, f"the end came after {len(data)} of {count} bytes"
            data += piece
    return data


async def read_to_end(descriptor: int) -> bytes:
    data = b""
    with trio.fail_after(20):
        while True:
            try:
                piece = os.read(descriptor, 65536)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(descriptor)
                continue
            if not piece:
                return data
            data += piece


async def receive(stream: MemoryReceiveStream, count: int) -> bytes:
    data = b""
    with trio.fail_after(20):
        while len(data) < count:
            piece = await stream.receive_some()
            assert piece, f"the end came after {data!r}"
            data += bytes(piece)
    return data


async def test_output_reaches_the_client_and_ends_with_the_stream_not_with_delete(setup: Setup) -> None:
    out, err = setup.fifo("out"), setup.fifo("err")
    readers = reader(out), reader(err)
    await setup.run(stdout=out, stderr=err)
    await setup.guest.write(b"hello")
    await setup.guest.err.send_all(b"oops")
    await setup.guest.end()
    assert [await read_to_end(end) for end in readers] == [b"hello", b"oops"]
    for end in readers:
        os.close(end)


async def test_output_of_a_process_that_ended_waits_for_a_client_that_opens_late(setup: Setup) -> None:
    out = setup.fifo("out")
    io = await setup.run(stdout=out)
    await setup.guest.write(b"short life")
    await setup.guest.end()
    io.process_ended()
    await trio.testing.wait_all_tasks_blocked(0.05)
    end = reader(out)
    with trio.fail_after(10):
        await trio.lowlevel.wait_readable(end)  # without a writer yet, a read would say "end"
    assert await read_to_end(end) == b"short life"
    os.close(end)


async def test_a_burst_before_the_end_is_neither_lost_nor_buffered(setup: Setup) -> None:
    """The copier takes no more from the guest than the fifo holds, until somebody reads."""
    out = setup.fifo("out")
    end = reader(out)
    io = await setup.run(stdout=out)
    burst = os.urandom(1 << 20) * 8
    await setup.guest.write(burst)
    await setup.guest.end()
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert io._stdout is not None
    assert io._stdout.copied <= (1 << 20) + stdio.CHUNK
    waited = trio.Event()

    async def wait_copied() -> None:
        await io.wait_copied(len(burst), 0)
        waited.set()

    setup.nursery.start_soon(wait_copied)
    assert await read_to_end(end) == burst
    with trio.fail_after(10):
        await waited.wait()
    os.close(end)


async def test_both_outputs_in_one_fifo_wait_for_a_slow_reader(setup: Setup) -> None:
    """Symptom: all output stopped, and the rest of it was lost, when both had to wait for the reader."""
    out = setup.fifo("out")
    end = reader(out)
    await setup.run(stdout=out, stderr=out)
    size = 4 * PIPE_BYTES
    async with trio.open_nursery() as nursery:
        nursery.start_soon(setup.guest.out.send_all, b"o" * size)
        nursery.start_soon(setup.guest.err.send_all, b"e" * size)
        await wait_all_tasks_blocked()  # the fifo is full, and both wait
        data = await read_exactly(end, 2 * size)
    await setup.guest.end()
    assert await read_to_end(end) == b""
    assert (data.count(b"o"), data.count(b"e")) == (size, size)
    os.close(end)


async def test_a_client_that_leaves_and_another_that_comes_lose_nothing(setup: Setup) -> None:
    """containerd restarts: no EPIPE for the process, and the bytes wait in the fifo."""
    out = setup.fifo("out")
    end = reader(out)
    await setup.run(stdout=out)
    await setup.guest.write(b"one")
    assert await read_exactly(end, 3) == b"one"
    os.close(end)
    await setup.guest.write(b"two")
    await trio.testing.wait_all_tasks_blocked(0.05)
    end = reader(out)
    await setup.guest.write(b"three")
    await setup.guest.end()
    assert await read_to_end(end) == b"twothree"
    os.close(end)


async def test_the_exit_may_be_told_when_its_bytes_are_copied_although_a_child_keeps_the_pipe(
    setup: Setup,
) -> None:
    out = setup.fifo("out")
    end = reader(out)
    io = await setup.run(stdout=out)
    await setup.guest.write(b"before exit")
    with trio.fail_after(10):
        await io.wait_copied(11, 0)
    await setup.guest.write(b", after exit")
    await setup.guest.end()
    assert await read_to_end(end) == b"before exit, after exit"
    os.close(end)


async def test_silence_is_the_end_where_the_guest_counts_no_bytes(
    setup: Setup, autojump_clock: trio.testing.MockClock
) -> None:
    out = setup.fifo("out")
    end = reader(out)
    io = await setup.run(stdout=out)
    await setup.guest.write(b"x")
    started = trio.current_time()
    await io.wait_copied(None, None)
    assert trio.current_time() - started < stdio.DRAIN_LIMIT
    os.close(end)


async def test_a_client_that_does_not_read_holds_the_exit_up_for_a_limited_time(
    setup: Setup, autojump_clock: trio.testing.MockClock
) -> None:
    out = setup.fifo("out")
    end = reader(out)
    io = await setup.run(stdout=out)
    burst = bytes(4 << 20)
    await setup.guest.write(burst)
    started = trio.current_time()
    await io.wait_copied(len(burst), 0)
    assert trio.current_time() - started == pytest.approx(stdio.DRAIN_LIMIT)
    os.close(end)


async def test_closing_gives_up_on_a_client_that_never_came(setup: Setup) -> None:
    io = await setup.run(stdin=setup.fifo("in"), stdout=setup.fifo("out"))
    await setup.guest.write(b"nobody will see this")
    with trio.fail_after(10):
        await io.close()
        await io.close()


async def test_stdin_is_copied_and_ends_by_close_io_after_what_the_fifo_holds(setup: Setup) -> None:
    path = setup.fifo("in")
    io = await setup.run(stdin=path)
    end = writer(path)
    os.write(end, b"first")
    assert await receive(setup.guest.received, 5) == b"first"
    os.write(end, b"last")
    io.close_stdin()
    os.close(end)
    assert await receive(setup.guest.received, 4) == b"last"
    assert await setup.guest.received.receive_some() == b""


async def test_close_io_after_the_client_closed_its_end_delivers_everything_too(setup: Setup) -> None:
    path = setup.fifo("in")
    io = await setup.run(stdin=path)
    end = writer(path)
    os.write(end, b"last")
    os.close(end)
    io.close_stdin()
    io.close_stdin()
    assert await receive(setup.guest.received, 4) == b"last"
    assert await setup.guest.received.receive_some() == b""


async def test_a_client_that_detaches_does_not_end_stdin(setup: Setup) -> None:
    path = setup.fifo("in")
    await setup.run(stdin=path)
    for word in (b"one", b"two"):
        end = writer(path)
        os.write(end, word)
        os.close(end)
        assert await receive(setup.guest.received, 3) == word


async def test_close_io_before_open_is_remembered(setup: Setup) -> None:
    io = setup.make(stdin=setup.fifo("in"))
    io.close_stdin()
    await io.open()
    setup.nursery.start_soon(io.run, setup.guest)
    with trio.fail_after(10):
        assert await setup.guest.received.receive_some() == b""


async def test_close_io_before_open_does_not_lose_what_a_waiting_writer_has(setup: Setup) -> None:
    """A client blocked in open(2) counts as a writer for the kernel, so there is no end before its bytes."""
    path = setup.fifo("in")
    io = setup.make(stdin=path)
    io.close_stdin()
    opening = threading.Event()

    def write() -> None:
        opening.set()
        Path(path).write_bytes(b"late")

    thread = threading.Thread(target=write)
    thread.start()
    opening.wait()
    status = Path(f"/proc/self/task/{thread.native_id}/stat")
    with trio.fail_after(10):
        while status.read_text().rpartition(")")[2].split()[0] != "S":
            await trio.sleep(0)  # it tells nobody but /proc that it sleeps in open(2)
    await io.open()
    setup.nursery.start_soon(io.run, setup.guest)
    assert await receive(setup.guest.received, 4) == b"late"
    assert await setup.guest.received.receive_some() == b""
    thread.join()


async def test_when_the_process_ends_a_client_that_still_writes_gets_epipe(setup: Setup) -> None:
    path = setup.fifo("in")
    io = await setup.run(stdin=path)
    end = writer(path)
    await trio.testing.wait_all_tasks_blocked()
    io.process_ended()
    await trio.testing.wait_all_tasks_blocked()
    with pytest.raises(BrokenPipeError):
        os.write(end, b"anyone?")
    os.close(end)


async def test_a_terminal_has_no_stderr_whatever_its_path_says(setup: Setup) -> None:
    out = setup.fifo("out")
    end = reader(out)
    io = await setup.run(stdout=out, stderr="/no/such/fifo", terminal=True)
    assert io.plan.request == StdioRequest(stdin=False, stdout=True, stderr=False, terminal=True)
    await setup.guest.write(b"tty")
    await setup.guest.end()
    assert await read_to_end(end) == b"tty"
    os.close(end)


async def test_without_any_path_nothing_is_asked_for(setup: Setup) -> None:
    io = await setup.run()
    assert io.plan.request == StdioRequest()


async def test_a_terminal_without_a_path_is_drained(setup: Setup) -> None:
    io = await setup.run(terminal=True)
    await setup.guest.write(bytes(1 << 20))
    with trio.fail_after(10):
        await io.wait_copied(1 << 20, 0)


async def test_a_log_file_is_made_with_its_directories_and_takes_both_outputs(setup: Setup) -> None:
    path = setup.directory / "a" / "b" / "log"
    await setup.run(stdout=f"file://{path}")
    await setup.guest.write(b"out\n")
    await setup.guest.err.send_all(b"err\n")
    await setup.guest.end()
    with trio.fail_after(10):
        await setup.io.wait_finished()
    assert sorted(path.read_bytes().splitlines()) == [b"err", b"out"]
    assert stat.S_IMODE(path.stat().st_mode) & ~0o644 == 0


async def test_a_file_that_exists_is_appended_to(setup: Setup) -> None:
    path = setup.directory / "log"
    path.write_bytes(b"old ")
    await setup.run(stdout=str(path), stderr=str(path))
    await setup.guest.write(b"new")
    await setup.guest.end()
    with trio.fail_after(10):
        await setup.io.wait_finished()
    assert path.read_bytes() == b"old new"


async def test_a_full_disk_does_not_stop_the_process(setup: Setup) -> None:
    await setup.run(stdout="/dev/full")
    await setup.guest.write(bytes(1 << 20))
    await setup.guest.write(bytes(1 << 20))
    with trio.fail_after(10):
        await setup.io.wait_copied(2 << 20, 0)


@pytest.mark.parametrize(
    ("uri", "target"),
    [
        ("", Target()),
        ("/run/x", Target(Kind.PATH, "/run/x")),
        ("fifo:///run/x", Target(Kind.FIFO, "/run/x")),
        ("file:///a%20b", Target(Kind.FILE, "/a b")),
        ("binary:///bin/l", Target(Kind.BINARY, "/bin/l")),
        ("binary:///bin/l?a=b&c&a=d", Target(Kind.BINARY, "/bin/l", ("a", "b", "c"))),
        ("binary-v2:///bin/l", Target(Kind.BINARY, "/bin/l", strict=True)),
    ],
)
def test_uris_say_where_output_goes(uri: str, target: Target) -> None:
    assert parse_target(uri) == target


@pytest.mark.parametrize(
    "uri", ["ftp:///x", "relative", "file://", "binary://?x", "ttrpc+unix:///s?streaming_id=1"]
)
def test_uris_that_make_no_sense_are_named(uri: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_target(uri)
    assert uri in str(caught.value)


def test_the_scheme_of_stdout_decides_for_stderr() -> None:
    assert plan(Stdio(stdout="file:///a", stderr="/b")).stderr == Target(Kind.FILE, "/a")
    assert plan(Stdio(stdout="/a", stderr="/b")) == Plan(
        "", Target(Kind.PATH, "/a"), Target(Kind.PATH, "/b"), False
    )
    with pytest.raises(InvalidArgument, match="stdin"):
        plan(Stdio(stdin="file:///x"))


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.write_bytes(b"")])
async def test_a_fifo_uri_needs_a_fifo(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "x")
    io = ProcessIO(plan(Stdio(stdout=f"fifo://{tmp_path}/x")), process_id="c1", namespace="ns")
    with pytest.raises(InvalidArgument, match="no fifo"):
        await io.open()
