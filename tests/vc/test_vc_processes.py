"""Containers and processes of the library on the real agent, over a unix socket and without a VM.

Each test runs twice: with a stream of its own for each of a process's stdio, and by the agent's read and
write calls, which is what another agent offers. Both must behave the same.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from protos.kata import agent_pb2, oci_pb2
from tests.harness.agent import DEADLINE, RunningAgent, missing, running_agent
from vc.agent_client.client import AgentClient, connected
from vc.agent_client.transports import UnixAddress, open_transport
from vc.background import background
from vc.container import Container
from vc.errors import AlreadyExists, GuestGone, InvalidArgument, NotFound, VCError, WrongState
from vc.oci.translate import guest_process
from vc.process import Process, StdioRequest
from vc.states import ContainerState, ProcessState

pytestmark = pytest.mark.integration

MIB = 1 << 20
OUTPUT = StdioRequest(stdout=True, stderr=True)
ALL = StdioRequest(stdin=True, stdout=True, stderr=True)
TERMINAL = StdioRequest(stdin=True, stdout=True, terminal=True)


def process(*args: str, **fields: Any) -> dict[str, Any]:
    """The process object of a spec."""
    return {"args": args, "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}, **fields}


@dataclass
class Host:
    """What a sandbox gives its containers."""

    client: AgentClient
    nursery: trio.Nursery
    rootfs: Path
    streams: bool
    forgotten: list[str] = field(default_factory=list)
    started: list[Process] = field(default_factory=list)

    async def aclose(self) -> None:
        """Close the streams: they belong to whoever started the process."""
        for process in self.started:
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    await trio.aclose_forcefully(stream)

    async def create(
        self, *args: str, stdio: StdioRequest = OUTPUT, container_id: str | None = None
    ) -> Container:
        container_id = container_id or f"c-{os.urandom(6).hex()}"
        container = Container(
            container_id,
            self.client,
            self.nursery,
            streams=self.streams,
            forget=lambda: self.forgotten.append(container_id),
        )
        request = agent_pb2.CreateContainerRequest(
            container_id=container_id,
            exec_id=container_id,
            OCI=oci_pb2.Spec(
                Version="1.1.0",
                Process=guest_process(process(*args, terminal=stdio.terminal)),
                Root=oci_pb2.Root(Path=str(self.rootfs)),
                Mounts=[
                    oci_pb2.Mount(destination="/proc", type="proc", source="proc"),
                    oci_pb2.Mount(destination="/dev", type="tmpfs", source="tmpfs", options=["mode=755"]),
                    oci_pb2.Mount(
                        destination="/dev/pts",
                        type="devpts",
                        source="devpts",
                        options=["newinstance", "ptmxmode=0666", "mode=0620"],
                    ),
                ],
                Linux=oci_pb2.Linux(
                    Namespaces=[oci_pb2.LinuxNamespace(Type=kind) for kind in ("ipc", "uts", "mount")],
                    Resources=oci_pb2.LinuxResources(),
                ),
            ),
        )
        await container.create(request, stdio, DEADLINE)
        self.started.append(container.init)
        return container

    async def start(self, *args: str, stdio: StdioRequest = OUTPUT) -> Container:
        container = await self.create(*args, stdio=stdio)
        await container.start()
        return container

    async def exec(self, container: Container, *args: str, stdio: StdioRequest = OUTPUT) -> Process:
        exec_id = f"e-{os.urandom(4).hex()}"
        made = container.exec(exec_id, process(*args), stdio)
        await container.start_exec(exec_id)
        self.started.append(made)
        return made


@asynccontextmanager
async def host_of(agent: RunningAgent, rootfs: Path, *, streams: bool) -> AsyncIterator[Host]:
    async with (
        open_transport(UnixAddress(agent.socket), timeout=DEADLINE) as transport,
        connected(transport) as client,
        background() as nursery,
    ):
        with trio.fail_after(2 * DEADLINE):
            host = Host(client, nursery, rootfs, streams)
            yield host
            await host.aclose()


@pytest.fixture(params=[True, False], ids=["streams", "calls"])
async def host(request: pytest.FixtureRequest, agent: RunningAgent, rootfs: Path) -> AsyncIterator[Host]:
    async with host_of(agent, rootfs, streams=request.param) as host:
        yield host


@pytest.fixture
async def sleeper(host: Host) -> AsyncIterator[Container]:
    """A container that only waits, for processes beside it."""
    container = await host.start("sleep", "1000", stdio=StdioRequest())
    yield container
    await container.delete()


async def read_all(stream: trio.abc.ReceiveStream | None) -> bytes:
    assert stream is not None
    return b"".join([piece async for piece in stream])


async def send_and_close(stream: trio.abc.SendStream | None, data: bytes) -> None:
    assert stream is not None
    await stream.send_all(data)
    await stream.aclose()


async def test_output_and_exit_status_of_a_container(host: Host) -> None:
    container = await host.start("sh", "-c", "echo out; echo err >&2; exit 3")
    assert await read_all(container.init.stdout) == b"out\n"
    assert await read_all(container.init.stderr) == b"err\n"
    assert (await container.init.wait()).status == 3
    assert container.init.state is ProcessState.STOPPED
    await container.delete()
    assert host.forgotten == [container.id]


async def test_the_end_of_stdin_reaches_the_process(host: Host) -> None:
    container = await host.start("sh", "-c", "cat; echo end", stdio=ALL)
    await send_and_close(container.init.stdin, b"word ")
    assert await read_all(container.init.stdout) == b"word end\n"
    assert (await container.init.wait()).status == 0
    await container.delete()


async def test_four_mebibytes_come_back_as_they_went(host: Host, sleeper: Container) -> None:
    data = os.urandom(4 * MIB)
    cat = await host.exec(sleeper, "cat", stdio=ALL)
    host.nursery.start_soon(send_and_close, cat.stdin, data)
    received = await read_all(cat.stdout)
    assert len(received) == len(data)
    assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()
    assert (await cat.wait()).status == 0


@pytest.mark.parametrize("status", [0, 1, 127, 255])
async def test_exit_statuses_of_an_exec(host: Host, sleeper: Container, status: int) -> None:
    made = await host.exec(sleeper, "sh", "-c", f"exit {status}")
    assert (await made.wait()).status == status


async def test_any_number_of_waiters_before_and_after_the_end(host: Host, sleeper: Container) -> None:
    made = await host.exec(sleeper, "sh", "-c", "read x; exit 9", stdio=ALL)
    statuses = []

    async def wait() -> None:
        statuses.append((await made.wait()).status)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        await made.close_stdin()
    await wait()
    assert statuses == [9] * 4


async def test_the_guest_waits_for_no_input_of_a_process_that_ended(host: Host, sleeper: Container) -> None:
    """Each exec whose client had a stdin left a thread of the agent and a stream of the connection."""
    made = await host.exec(sleeper, "true", stdio=ALL)
    assert await read_all(made.stdout) + await read_all(made.stderr) == b""
    assert (await made.wait()).status == 0
    with trio.fail_after(DEADLINE):
        while re.search(r":receive < stdio\.py:\d+:relay", await host.client.stacks()):
            await trio.sleep(0.01)  # nothing tells when a thread of the guest ends


async def test_a_terminal_is_one_stream_with_a_size(host: Host) -> None:
    container = await host.start("sh", "-c", "read line; stty size; echo e >&2", stdio=TERMINAL)
    assert container.init.stderr is None
    assert container.init.stdin is not None
    await container.init.resize(columns=71, rows=19)
    await container.init.stdin.send_all(b"go\n")
    # The terminal echoes, and writes a carriage return before each line feed.
    assert await read_all(container.init.stdout) == b"go\r\n19 71\r\ne\r\n"
    assert (await container.init.wait()).status == 0
    await container.delete()


async def test_the_exit_is_known_though_a_child_keeps_the_pipes(host: Host, sleeper: Container) -> None:
    parent = await host.exec(sleeper, "sh", "-c", "sleep 1000 & echo $!; exit 4")
    assert (await parent.wait()).status == 4
    assert parent.stdout is not None
    child = (await parent.stdout.receive_some()).decode().strip()
    with trio.move_on_after(0.05) as still_open:
        await parent.stdout.receive_some()
    assert still_open.cancelled_caught
    kill = await host.exec(sleeper, "kill", "-9", child)
    assert (await kill.wait()).status == 0


async def test_a_slow_reader_loses_nothing(host: Host, sleeper: Container) -> None:
    size = 3 * MIB
    made = await host.exec(sleeper, "sh", "-c", f"dd if=/dev/zero bs={size} count=1 2>/dev/null; echo end")
    assert made.stdout is not None
    received = 0
    last: bytes | bytearray = b""
    while piece := await made.stdout.receive_some(32 << 10):
        received += len(piece)
        last = piece
        await trio.testing.wait_all_tasks_blocked()
    assert (received, last[-4:]) == (size + 4, b"end\n")
    assert (await made.wait()).status == 0


async def test_the_exit_counts_the_bytes_of_each_stream(host: Host, sleeper: Container) -> None:
    script = "echo four5; dd if=/dev/zero bs=100000 count=7 >&2 2>/dev/null"
    made = await host.exec(sleeper, "sh", "-c", script)
    sizes: dict[str, int] = {}

    async def count(name: str, stream: trio.abc.ReceiveStream | None) -> None:
        sizes[name] = len(await read_all(stream))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count, "stdout", made.stdout)
        nursery.start_soon(count, "stderr", made.stderr)
    how = await made.wait()
    assert sizes == {"stdout": 6, "stderr": 700_000}
    # By calls, the host reads to the end itself, and the agent counts nothing.
    assert (how.stdout_bytes, how.stderr_bytes) == ((6, 700_000) if host.streams else (None, None))


async def test_output_that_nobody_wants_blocks_nobody(host: Host, sleeper: Container) -> None:
    made = await host.exec(sleeper, "dd", "if=/dev/zero", "bs=1M", "count=3", stdio=StdioRequest())
    assert (made.stdin, made.stdout, made.stderr) == (None, None, None)
    assert (await made.wait()).status == 0


async def test_a_missing_program_is_an_error_of_start_and_can_be_deleted(host: Host) -> None:
    with pytest.raises(VCError, match=r"no such file|not found"):
        container = await host.create("/no/such/program")
        await container.start()
    assert host.forgotten == []


async def test_a_missing_program_of_an_exec_leaves_the_container_alone(
    host: Host, sleeper: Container
) -> None:
    made = sleeper.exec("missing", process("/no/such/program"), OUTPUT)
    with pytest.raises(VCError, match=r"no such file|not found"):
        await sleeper.start_exec("missing")
    assert made.state is ProcessState.CREATED
    sleeper.forget_exec("missing")
    assert (await (await host.exec(sleeper, "true")).wait()).status == 0


async def test_a_container_is_deleted_twice_without_harm(host: Host) -> None:
    container = await host.start("sleep", "1000")
    await container.delete()
    assert (await container.init.wait()).status == 137
    await container.delete()
    again = await host.create("true", container_id=container.id)  # the guest holds nothing of it
    await again.delete()


async def test_an_id_that_is_taken_is_refused_and_the_first_one_lives(host: Host, sleeper: Container) -> None:
    with pytest.raises(AlreadyExists):
        await host.create("true", container_id=sleeper.id)
    assert (await (await host.exec(sleeper, "true")).wait()).status == 0


async def test_a_signal_is_for_one_process(host: Host, sleeper: Container) -> None:
    first = await host.exec(sleeper, "sleep", "1000")
    second = await host.exec(sleeper, "sleep", "1000")
    await first.signal(signal.SIGTERM)
    assert (await first.wait()).status == 128 + signal.SIGTERM
    assert second.exit is None
    await second.signal(signal.SIGKILL)
    assert (await second.wait()).status == 128 + signal.SIGKILL


async def test_a_signal_to_a_process_that_ended_or_never_ran_is_refused(
    host: Host, sleeper: Container
) -> None:
    ended = await host.exec(sleeper, "true")
    await ended.wait()
    with pytest.raises(NotFound):
        await ended.signal(signal.SIGTERM)
    with pytest.raises(InvalidArgument, match="there is no signal 99"):
        await sleeper.signal_all(99)
    never = sleeper.exec("never", process("true"), OUTPUT)
    with pytest.raises(WrongState):
        await never.signal(signal.SIGTERM)


async def test_sigkill_of_all_ends_the_execs_too(host: Host) -> None:
    container = await host.start("sh", "-c", "trap '' TERM; while :; do sleep 1000; done")
    other = await host.exec(container, "sleep", "1000")
    await container.signal_all(signal.SIGKILL)
    assert (await container.init.wait()).status == 137
    assert (await other.wait()).status == 137
    await container.delete()


async def test_what_the_state_of_a_container_does_not_allow(host: Host) -> None:
    container = await host.create("sh", "-c", "read x", stdio=ALL)
    container.exec("early", process("true"), StdioRequest())
    with pytest.raises(WrongState):
        await container.start_exec("early")
    await container.start()
    with pytest.raises(WrongState):
        await container.start()
    with pytest.raises(WrongState):
        await container.resume()
    with pytest.raises(AlreadyExists):
        container.exec("early", process("true"), StdioRequest())
    await container.start_exec("early")
    await container.find("early").wait()
    container.forget_exec("early")
    with pytest.raises(NotFound):
        container.find("early")
    await container.init.close_stdin()
    await container.init.wait()
    await trio.testing.wait_all_tasks_blocked()
    assert container.state is ContainerState.STOPPED
    await container.delete()


async def test_a_paused_container_goes_on_where_it_stood(host: Host, sleeper: Container) -> None:
    cat = await host.exec(sleeper, "cat", stdio=ALL)
    await sleeper.pause()
    with pytest.raises(WrongState):
        await sleeper.start_exec("any")
    assert cat.stdin is not None
    await cat.stdin.send_all(b"while frozen")
    await sleeper.resume()
    await cat.close_stdin()
    assert await read_all(cat.stdout) == b"while frozen"
    assert (await cat.wait()).status == 0


@pytest.mark.parametrize("streams", [True, False], ids=["streams", "calls"])
async def test_every_wait_ends_when_the_guest_dies(rootfs: Path, streams: bool) -> None:
    if lacking := missing():
        pytest.skip(f"the real agent needs {lacking}")
    with running_agent() as agent:
        async with host_of(agent, rootfs, streams=streams) as host:
            container = await host.start("sleep", "1000")
            other = await host.exec(container, "cat", stdio=ALL)
            os.kill(agent.pid, signal.SIGKILL)
            for dead in (container.init, other):
                how = await dead.wait()
                assert (how.status, how.stdout_bytes) == (137, None)
                assert "agent" in how.cause
            with pytest.raises(GuestGone):
                await container.stats()
            with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):
                await send_and_close(other.stdin, b"x" * MIB)
            await container.delete()
            assert host.forgotten == [container.id]
