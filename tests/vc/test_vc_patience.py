"""How long the library waits for an agent: for ever where a process is waited for, and for nothing else.

The agent here only keeps its caller waiting; hours pass at once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from google.protobuf.empty_pb2 import Empty

from protos.kata import agent_pb2
from ttrpc.server import Context, Server
from ttrpc.status import Code, StatusError
from vc.agent_client.client import CAUSE_GRACE, AgentClient, connected
from vc.agent_client.transports import Transport
from vc.container import Container
from vc.errors import GuestGone, NotFound, Timeout
from vc.process import StdioRequest

HOUR = 3600.0
LIMIT = 5.0  # seconds that a create may take


class SlowAgent:
    """Answers after an hour, or what a test says."""

    def __init__(self) -> None:
        self.created: set[str] = set()
        self.create_takes = HOUR
        self.removed: list[str] = []
        self.lock = trio.Lock()  # one thing at a time happens to a container, in ours and in Kata's

    async def wait_process(self, request: agent_pb2.WaitProcessRequest, context: Context) -> object:
        await trio.sleep(HOUR)
        return agent_pb2.WaitProcessResponse(status=7)

    async def read_stdout(self, request: agent_pb2.ReadStreamRequest, context: Context) -> object:
        await trio.sleep(HOUR)
        return agent_pb2.ReadStreamResponse(data=b"late")

    async def write_stdin(self, request: agent_pb2.WriteStreamRequest, context: Context) -> object:
        await trio.sleep(HOUR)
        return agent_pb2.WriteStreamResponse(len=len(request.data))

    async def get_oom_event(self, request: agent_pb2.GetOOMEventRequest, context: Context) -> object:
        await trio.sleep(HOUR)
        return agent_pb2.OOMEvent(container_id="c1")

    async def signal_process(self, request: agent_pb2.SignalProcessRequest, context: Context) -> object:
        await trio.sleep(HOUR)
        return Empty()

    async def create_container(self, request: agent_pb2.CreateContainerRequest, context: Context) -> object:
        with trio.CancelScope(shield=True):  # no agent stops because its caller has
            async with self.lock:
                await trio.sleep(self.create_takes)
                self.created.add(request.container_id)
        return Empty()

    async def exec_process(self, request: agent_pb2.ExecProcessRequest, context: Context) -> object:
        async with self.lock:
            await trio.sleep(1)
        return Empty()

    async def remove_container(self, request: agent_pb2.RemoveContainerRequest, context: Context) -> object:
        with trio.CancelScope(shield=True):
            async with self.lock:
                if request.container_id not in self.created:
                    raise StatusError(Code.NOT_FOUND, "no such container")
                self.created.discard(request.container_id)
                self.removed.append(request.container_id)
        return Empty()


class Memory(Transport):
    """A way to the agent without a guest."""

    def __init__(self, nursery: trio.Nursery, agent: SlowAgent) -> None:
        self._nursery = nursery
        self._server = Server()
        self._server.add_service(agent_pb2.DESCRIPTOR.services_by_name["AgentService"], agent)
        self.is_cut = False

    async def dial(self, port: int) -> trio.abc.HalfCloseableStream:
        if self.is_cut:
            raise GuestGone("the line ended")
        ours, theirs = trio.testing.memory_stream_pair()
        self._nursery.start_soon(self._server.serve_stream, theirs)
        return ours


@asynccontextmanager
async def client_of(agent: SlowAgent) -> AsyncIterator[AgentClient]:
    async with trio.open_nursery() as nursery, connected(Memory(nursery, agent)) as client:
        yield client
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "wait",
    [
        lambda client: client.wait_process("c1", "e1"),
        lambda client: client.read_output("ReadStdout", "c1", "e1", 100),
        lambda client: client.write_stdin("c1", "e1", b"x"),
        lambda client: client.wait_oom(),
    ],
    ids=["its end", "its output", "its input", "want of memory"],
)
async def test_an_exec_that_does_nothing_for_an_hour_is_not_given_up(
    autojump_clock: trio.testing.MockClock, wait: Callable[[AgentClient], Awaitable[object]]
) -> None:
    """Symptom: an idle exec dies after 30 s, for a limit that is meant for other calls."""
    async with client_of(SlowAgent()) as client:
        assert await wait(client)
        assert trio.current_time() >= HOUR


async def test_a_signal_to_an_agent_that_does_not_answer_is_given_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Symptom: stopping a container hangs with its agent."""
    async with client_of(SlowAgent()) as client:
        with pytest.raises(Timeout):
            await client.signal_process("c1", "", 15)


@pytest.mark.parametrize("told_after", [CAUSE_GRACE / 2, HOUR], ids=["told", "untold"])
async def test_a_stream_that_cannot_be_had_is_explained_by_the_end_of_the_vm(
    autojump_clock: trio.testing.MockClock, told_after: float
) -> None:
    """A start in whose middle QEMU died failed with "connection reset by peer": the line ends earlier."""
    async with trio.open_nursery() as nursery:
        transport = Memory(nursery, SlowAgent())
        async with connected(transport) as client:
            transport.is_cut = True

            async def tell() -> None:
                await trio.sleep(told_after)
                client.fail(GuestGone("QEMU was killed"))

            nursery.start_soon(tell)
            expected = "QEMU was killed" if told_after < CAUSE_GRACE else "the line ended"
            with pytest.raises(GuestGone, match=expected):
                await client.dial(7)
            nursery.cancel_scope.cancel()


def container_of(client: AgentClient, nursery: trio.Nursery) -> Container:
    return Container("c1", client, nursery, streams=False, forget=lambda: None)


@pytest.mark.parametrize("takes", [LIMIT + 1, HOUR], ids=["a little late", "very late"])
async def test_a_container_that_was_given_up_is_not_left_in_the_guest(
    autojump_clock: trio.testing.MockClock, takes: float
) -> None:
    """Symptom: on a slow host a create runs into its limit, and the guest has a container of nobody."""
    agent = SlowAgent()
    agent.create_takes = takes
    async with client_of(agent) as client, trio.open_nursery() as nursery:
        with pytest.raises(Timeout):
            await container_of(client, nursery).create(
                agent_pb2.CreateContainerRequest(container_id="c1"), StdioRequest(), LIMIT
            )
        await trio.sleep(takes)
        assert agent.removed == ["c1"]


async def test_many_execs_at_once_in_a_slow_guest_are_not_given_up_for_waiting_for_each_other(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Symptom: of two hundred execs at once, those fail whose turn comes after a minute."""
    async with client_of(SlowAgent()) as client, trio.open_nursery() as nursery:
        for number in range(200):
            request = agent_pb2.ExecProcessRequest(container_id="c1", exec_id=f"e{number}")
            nursery.start_soon(client.exec_process, request)


class LosingAgent(SlowAgent):
    """Never answers a create, and knows nothing of it afterwards."""

    async def create_container(self, request: agent_pb2.CreateContainerRequest, context: Context) -> object:
        await trio.sleep_forever()


async def test_removing_what_the_guest_does_not_know_is_no_error_of_a_rollback(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Symptom: the rollback's own error hides why the container could not be created."""
    async with client_of(LosingAgent()) as client, trio.open_nursery() as nursery:
        with pytest.raises(NotFound):
            await client.remove_container("c1")
        with pytest.raises(Timeout, match="CreateContainer"):
            await container_of(client, nursery).create(
                agent_pb2.CreateContainerRequest(container_id="c1"), StdioRequest(), LIMIT
            )
