"""A guest that misbehaves while its containers run: in what it tells, in their streams, on its console."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from protos.kata import agent_pb2
from shim.sandbox import OOM_INTERVAL
from tests.harness.hostile import RATE, Agent, Call, Host
from tests.harness.shim_process import ShimProcess

MIB = 1 << 20
MAX_UINT64 = 2**64 - 1


async def end(shim: ShimProcess) -> None:
    """Kill, wait and delete, as a client that wants to be rid of a pod."""
    await shim.call("Kill", id="c1", signal=9)
    assert (await shim.call("Wait", id="c1")).exit_status == 137
    await shim.call("Delete", id="c1")
    (exited,) = await shim.until("/tasks/exit")
    assert exited.exit_status == 137


class Fifo:
    """A client's stdout."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "stdout"
        os.mkfifo(self.path)
        self.descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)

    async def read(self, count: int) -> bytes:
        """Read so many bytes."""
        data = b""
        while len(data) < count:
            await trio.lowlevel.wait_readable(self.descriptor)
            data += os.read(self.descriptor, count - len(data))
        return data

    def close(self) -> None:
        os.close(self.descriptor)


# Exits


@pytest.mark.parametrize(
    ("status", "shown"), [(-1, 255), (-(2**31), 0), (2**31 - 1, 255), (256, 0), (0x1234, 0x34)]
)
async def test_an_exit_status_is_shown_as_the_byte_that_it_is(host: Host, status: int, shown: int) -> None:
    async def tell(call: Call) -> None:
        await call.answer(agent_pb2.WaitProcessResponse(status=status))

    async with host.guest(Agent(answers={"WaitProcess": tell})) as shim:
        await shim.call("Create", **shim.creation())
        await shim.call("Start", id="c1")
        assert (await shim.call("Wait", id="c1")).exit_status == shown
        await shim.call("Delete", id="c1")


@pytest.mark.parametrize("count", [1, 2**63, MAX_UINT64])
async def test_output_that_never_comes_delays_the_exit_by_a_limit_alone(
    host: Host, count: int, tmp_path: Path
) -> None:
    fifo = Fifo(tmp_path)

    async def promise(call: Call) -> None:
        await call.answer(agent_pb2.WaitProcessResponse(status=3, stdout_bytes=count, stderr_bytes=count))

    async with host.guest(Agent(answers={"WaitProcess": promise})) as shim:
        await shim.call("Create", **shim.creation(stdout=str(fifo.path)))
        await shim.call("Start", id="c1")
        assert (await shim.call("Wait", id="c1")).exit_status == 3
        await shim.call("Delete", id="c1")
        assert len(await shim.until("/tasks/exit")) == 1
    fifo.close()


# Streams


@pytest.mark.parametrize("reader", ["reads a little", "reads nothing", "is none"])
async def test_endless_output_takes_no_memory(host: Host, reader: str, tmp_path: Path) -> None:
    fifo = Fifo(tmp_path)
    stopped = trio.Event()

    async def write_for_ever(agent: Agent, stream: trio.abc.HalfCloseableStream, port: int) -> None:
        for _ in range(256):  # MiB: what a shim that takes all without a reader would have to hold
            with trio.move_on_after(1) as scope:
                await stream.send_all(bytes(MIB))
            if scope.cancelled_caught:
                stopped.set()  # nobody takes it any more
                await trio.sleep_forever()

    async with host.guest(Agent(on_stdio=write_for_ever)) as shim:
        stdout = "" if reader == "is none" else str(fifo.path)
        await shim.call("Create", **shim.creation(stdout=stdout))
        await shim.call("Start", id="c1")
        if reader == "reads a little":
            assert await fifo.read(MIB) == bytes(MIB)
        if reader != "is none":
            with trio.fail_after(20):
                await stopped.wait()
        await end(shim)
    fifo.close()


async def test_an_answer_longer_than_asked_for_is_not_passed_on(host: Host, tmp_path: Path) -> None:
    fifo = Fifo(tmp_path)

    async def answer_more(call: Call) -> None:
        assert isinstance(call.request, agent_pb2.ReadStreamRequest)
        await call.answer(agent_pb2.ReadStreamResponse(data=b"x" * (call.request.len + 1)))

    agent = Agent(answers={"ReadStdout": answer_more, "ReadStderr": answer_more}, streams=False)
    async with host.guest(agent) as shim:
        await shim.call("Create", **shim.creation(stdout=str(fifo.path)))
        await shim.call("Start", id="c1")
        with trio.fail_after(20):
            await trio.lowlevel.wait_readable(fifo.descriptor)
        assert os.read(fifo.descriptor, 10) == b""  # the end: a guest that lies is not read any further
        await end(shim)
    fifo.close()


@pytest.mark.parametrize("taken", [0, 2**32 - 1])
async def test_a_guest_that_lies_about_stdin_ends_it(host: Host, taken: int, tmp_path: Path) -> None:
    path = tmp_path / "stdin"
    os.mkfifo(path)

    async def take(call: Call) -> None:
        await call.answer(agent_pb2.WriteStreamResponse(len=taken))

    async with host.guest(Agent(answers={"WriteStdin": take}, streams=False)) as shim:
        await shim.call("Create", **shim.creation(stdin=str(path)))
        client = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        await shim.call("Start", id="c1")
        with pytest.raises(BrokenPipeError), trio.fail_after(20):  # nobody reads any more
            while True:
                await trio.lowlevel.wait_writable(client)
                os.write(client, b"hello")
                await shim.call("State", id="c1")
        await end(shim)
    os.close(client)


async def test_streams_that_are_reset_do_not_disturb_the_pod(host: Host) -> None:
    started = trio.Event()

    async def note_start(call: Call) -> None:
        started.set()
        await call.agent.killed.wait()
        await call.answer(agent_pb2.WaitProcessResponse(status=137))

    async def reset(agent: Agent, stream: trio.abc.HalfCloseableStream, port: int) -> None:
        await started.wait()
        await trio.aclose_forcefully(stream)

    async with host.guest(Agent(answers={"WaitProcess": note_start}, on_stdio=reset)) as shim:
        await shim.call("Create", **shim.creation())
        await shim.call("Start", id="c1")
        await end(shim)


# Events


async def test_a_flood_of_events_is_slowed_down_and_of_strangers_passed_over(host: Host) -> None:
    told: list[str] = []

    async def tell(call: Call) -> None:
        told.append("")
        name = "c1" if len(told) % 2 else "x" * 100_000
        await call.answer(agent_pb2.OOMEvent(container_id=name))

    async with host.guest(Agent(answers={"GetOOMEvent": tell})) as shim:
        await shim.call("Create", **shim.creation())
        await shim.call("Start", id="c1")
        events = await shim.until("/tasks/oom", count=5)
        assert {event.container_id for event in events} == {"c1"}
        # Ten in a second of the shim's clock: so many take this long at least, on however fast a machine.
        count, began = len(told), trio.current_time()
        with trio.fail_after(20):
            while len(told) < count + 50:
                await shim.call("State", id="c1")
        assert trio.current_time() - began > 48 * OOM_INTERVAL / RATE
        await end(shim)


# The console


async def test_a_talkative_console_costs_nothing_and_its_words_are_harmless(host: Host) -> None:
    agent = Agent()
    async with host.guest(agent) as shim:
        await shim.call("Create", **shim.creation())
        await shim.call("Start", id="c1")
        assert agent.machine is not None
        for line in (
            b"x" * MIB,
            b"\x1b[2J\x1b]0;owned\x07",
            b"\xff\xfe\0",
            b"\r\n",
            b"last words \x1b[31m\x9b",
        ):
            for _ in range(8):
                await agent.machine.console.send_all(line)
        await agent.machine.console.send_eof()
        agent.machine.control.socket.close()  # the VMM ends
        assert (await shim.call("Wait", id="c1")).exit_status == 137
        assert "last words" in shim.log and "owned" not in shim.log
        await shim.call("Delete", id="c1")


# QMP


@pytest.mark.parametrize(
    "words",
    [
        b"",
        b"\0" * 1000,
        b"{" * MIB,
        b'{"QMP": 5}\n',
        b'{"QMP": {"version": {}, "capabilities": []}}\n' + b"[]\n" * 1000,
    ],
    ids=["silence", "zeros", "braces", "no greeting", "no answers"],
)
async def test_a_monitor_that_talks_nonsense_does_no_harm(host: Host, words: bytes) -> None:
    agent = Agent()
    async with host.guest(agent) as shim, trio.open_nursery() as nursery:

        async def talk() -> None:
            await agent.started.wait()
            assert agent.machine is not None
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(agent.machine.qmp.dup()))
            async with listener, await listener.accept() as stream:
                try:
                    await stream.send_all(words)
                    await trio.sleep_forever()
                except trio.BrokenResourceError:
                    pass

        nursery.start_soon(talk)
        await shim.call("Create", **shim.creation())
        await shim.call("Start", id="c1")
        await end(shim)
        nursery.cancel_scope.cancel()
