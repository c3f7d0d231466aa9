"""Typed calls to the agent in the guest.

This file knows the agent's RPCs, their time limits, and how a status code becomes one of our errors. It
knows nothing of transports: it is handed one, dials the agent's port, and dials stdio streams by number.
The guest is hostile: whatever it answers is at worst an error of the call that it answers.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import trio
from google.protobuf.message import Message

from protos.kata import agent_pb2, health_pb2
from ttrpc.client import Client, ConnectionClosed
from ttrpc.methods import ServiceTable, service
from ttrpc.status import Code, StatusError
from vc.agent_client.transports import Transport
from vc.errors import (
    AgentError,
    AlreadyExists,
    GuestGone,
    InvalidArgument,
    NotFound,
    Timeout,
    Unsupported,
    VCError,
    WrongState,
)
from vc.words import reason

AGENT_PORT = 1024  # the agent's ttrpc server: Kata's vsock port
FIRST_STDIO_PORT = 0x10000  # chosen by us; Kata's own ports are all below

REQUEST_TIMEOUT = 60.0  # seconds; Kata's default for every call that is not a wait
CHECK_TIMEOUT = 30.0
EXECS_AT_ONCE = 8  # more only wait for each other in the guest, and their limits run out there
CAUSE_GRACE = 1.0  # how long the watcher of the VMM has to name the cause of a lost connection
STATE_TIMEOUT = 10.0  # calls on the way to an end: the guest may be sick, and containerd waits

# What the guest may answer at once. The largest answer that we ask for is a piece of output, of 256 KiB.
MAX_ANSWER = 512 << 10  # bytes
# In the counters of a container, of all kinds together: a host with as many CPUs and disks has other worries.
MAX_COUNTERS = 8192

MAX_SIGNAL = 64  # asm-generic/signal.h, _NSIG
STREAMS_FEATURE = "stdio-streams"  # ours: see protos/kata/agent.proto, WaitProcessResponse

_AGENT = service(agent_pb2.DESCRIPTOR.services_by_name["AgentService"])
_HEALTH = service(health_pb2.DESCRIPTOR.services_by_name["Health"])

_ERRORS: dict[int, type[VCError]] = {
    Code.INVALID_ARGUMENT: InvalidArgument,
    Code.NOT_FOUND: NotFound,
    Code.ALREADY_EXISTS: AlreadyExists,
    Code.FAILED_PRECONDITION: WrongState,
    Code.UNIMPLEMENTED: Unsupported,
    Code.DEADLINE_EXCEEDED: Timeout,
}

M = TypeVar("M", bound=Message)


class AgentClient:
    """The agent of one VM. `run` owns the connection; every other method may be called while it runs."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._client: Client | None = None
        self._ports = itertools.count(FIRST_STDIO_PORT)
        self._failure: GuestGone | None = None
        self._failed = trio.Event()
        self._execs = trio.CapacityLimiter(EXECS_AT_ONCE)

    @property
    def failure(self) -> GuestGone | None:
        """Why no call can succeed any more, or None."""
        return self._failure

    def fail(self, cause: GuestGone) -> None:
        """Make all pending and later calls raise `cause`. The first cause stays."""
        if self._failure is None:
            self._failure = cause
            self._failed.set()

    async def wait_failed(self) -> GuestGone:
        """Block until the agent cannot be reached any more; return why, as an error to raise."""
        await self._failed.wait()
        return GuestGone(str(self._failure))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Connect, report started, and serve the connection until it ends or `fail` is called."""
        stream = await self._transport.dial(AGENT_PORT)
        self._client = Client(stream, max_length=MAX_ANSWER)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._cancel_on_failure, nursery.cancel_scope)
                await nursery.start(self._client.run)
                task_status.started()
                await self._client.closed.wait()
                # The connection of a killed VM ends before the kernel reports the death. Whoever watches the
                # VMM knows the true cause and gets a moment to tell it.
                await trio.sleep(CAUSE_GRACE)
                self.fail(GuestGone("the connection to the agent in the guest ended"))
        finally:
            self.fail(GuestGone("the connection to the agent in the guest was closed"))

    async def _cancel_on_failure(self, scope: trio.CancelScope) -> None:
        await self._failed.wait()
        scope.cancel()

    async def _call(
        self,
        table: ServiceTable,
        name: str,
        request: Message,
        answer: type[M],
        timeout: float | None,
    ) -> M:
        """Call one method; `timeout` is in seconds, None waits for ever."""
        if self._failure is not None:
            raise GuestGone(str(self._failure))
        assert self._client is not None, "AgentClient.run was not started"
        try:
            result = await self._client.call(table[name], request, timeout=timeout)
        except StatusError as exc:
            raise _translate(name, exc) from exc
        except ConnectionClosed as exc:
            raise await self.wait_failed() from exc
        assert isinstance(result, answer)
        return result

    async def _order(self, name: str, request: Message, timeout: float | None = REQUEST_TIMEOUT) -> None:
        """Call a method whose answer says nothing but that it was done."""
        await self._call(_AGENT, name, request, Message, timeout)

    # Health and the sandbox

    async def check(self, *, timeout: float = CHECK_TIMEOUT) -> None:
        """Ask whether the agent serves.

        Raises:
            GuestGone: it says that it does not.
        """
        answer = await self._call(
            _HEALTH, "Check", health_pb2.CheckRequest(), health_pb2.HealthCheckResponse, timeout
        )
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            raise GuestGone(
                f"the agent in the guest answers but does not serve (health status {answer.status})"
            )

    async def get_guest_details(self) -> agent_pb2.GuestDetailsResponse:
        """Ask for the agent's version, its features and the guest's memory block size."""
        request = agent_pb2.GuestDetailsRequest(mem_block_size=True)
        return await self._call(
            _AGENT, "GetGuestDetails", request, agent_pb2.GuestDetailsResponse, REQUEST_TIMEOUT
        )

    async def create_sandbox(self, request: agent_pb2.CreateSandboxRequest) -> None:
        """Prepare the guest: hostname, shared file system, shm, DNS."""
        await self._order("CreateSandbox", request)

    async def destroy_sandbox(self, *, timeout: float = STATE_TIMEOUT) -> None:
        """End all containers and power the guest off."""
        await self._order("DestroySandbox", agent_pb2.DestroySandboxRequest(), timeout)

    async def reseed_random(self, data: bytes) -> None:
        """Mix `data` into the guest's random pool."""
        await self._order("ReseedRandomDev", agent_pb2.ReseedRandomDevRequest(data=data))

    async def set_clock(self, seconds: int, microseconds: int) -> None:
        """Set the guest's clock to a time since the epoch."""
        await self._order(
            "SetGuestDateTime", agent_pb2.SetGuestDateTimeRequest(Sec=seconds, Usec=microseconds)
        )

    async def online(self, vcpus: int) -> None:
        """Put so many processors that were plugged to use, and all memory."""
        await self._order("OnlineCPUMem", agent_pb2.OnlineCPUMemRequest(wait=True, nb_cpus=vcpus))

    async def wait_oom(self) -> str:
        """Block until a container runs out of memory; return its id."""
        answer = await self._call(
            _AGENT, "GetOOMEvent", agent_pb2.GetOOMEventRequest(), agent_pb2.OOMEvent, None
        )
        return answer.container_id

    async def metrics(self) -> str:
        """Return the guest's metrics as Prometheus text."""
        answer = await self._call(
            _AGENT, "GetMetrics", agent_pb2.GetMetricsRequest(), agent_pb2.Metrics, REQUEST_TIMEOUT
        )
        return answer.metrics

    async def stacks(self) -> str:
        """Return where the threads and processes of our own agent are, as lines for a human."""
        request = agent_pb2.GetDiagnosticDataRequest(log_type="stacks")
        answer = agent_pb2.GetDiagnosticDataResponse
        return (await self._call(_AGENT, "GetDiagnosticData", request, answer, STATE_TIMEOUT)).data

    # Containers

    async def create_container(self, request: agent_pb2.CreateContainerRequest, *, timeout: float) -> None:
        """Create a container whose init process waits for `start_container`."""
        await self._order("CreateContainer", request, timeout)

    async def start_container(self, container_id: str) -> None:
        """Let the init process of a created container run."""
        await self._order("StartContainer", agent_pb2.StartContainerRequest(container_id=container_id))

    async def remove_container(self, container_id: str, *, timeout: float = STATE_TIMEOUT) -> None:
        """Kill what is left of a container and forget it."""
        request = agent_pb2.RemoveContainerRequest(container_id=container_id)
        await self._order("RemoveContainer", request, timeout)

    async def pause_container(self, container_id: str) -> None:
        """Freeze every process of a container."""
        await self._order("PauseContainer", agent_pb2.PauseContainerRequest(container_id=container_id))

    async def resume_container(self, container_id: str) -> None:
        """Thaw a paused container."""
        await self._order("ResumeContainer", agent_pb2.ResumeContainerRequest(container_id=container_id))

    async def update_container(self, request: agent_pb2.UpdateContainerRequest) -> None:
        """Change a container's cgroup limits."""
        await self._order("UpdateContainer", request)

    async def stats_container(self, container_id: str) -> agent_pb2.StatsContainerResponse:
        """Read a container's counters."""
        request = agent_pb2.StatsContainerRequest(container_id=container_id)
        answer = agent_pb2.StatsContainerResponse
        found = await self._call(_AGENT, "StatsContainer", request, answer, STATE_TIMEOUT)
        if (count := _count(found)) > MAX_COUNTERS:
            text = f"StatsContainer: the guest tells {count} counters; {MAX_COUNTERS} are the limit"
            raise AgentError("StatsContainer", Code.OUT_OF_RANGE, text)
        return found

    async def remove_stale_mounts(self) -> None:
        """Let the guest drop directory entries of shared mounts that the host removed."""
        request = agent_pb2.RemoveStaleVirtiofsShareMountsRequest()
        await self._order("RemoveStaleVirtiofsShareMounts", request, STATE_TIMEOUT)

    # Processes

    async def exec_process(self, request: agent_pb2.ExecProcessRequest) -> None:
        """Start a further process in a container; it runs when this returns. May wait for its turn."""
        async with self._execs:
            await self._order("ExecProcess", request)

    async def signal_process(self, container_id: str, exec_id: str, signal: int) -> None:
        """Send a signal; an empty exec id with SIGKILL means every process of the container."""
        if not 0 <= signal <= MAX_SIGNAL:
            raise InvalidArgument(f"there is no signal {signal}: they have numbers from 1 to {MAX_SIGNAL}")
        request = agent_pb2.SignalProcessRequest(container_id=container_id, exec_id=exec_id, signal=signal)
        await self._order("SignalProcess", request, STATE_TIMEOUT)

    async def wait_process(self, container_id: str, exec_id: str) -> agent_pb2.WaitProcessResponse:
        """Block until a process ended."""
        request = agent_pb2.WaitProcessRequest(container_id=container_id, exec_id=exec_id)
        return await self._call(_AGENT, "WaitProcess", request, agent_pb2.WaitProcessResponse, None)

    async def resize_terminal(self, container_id: str, exec_id: str, *, columns: int, rows: int) -> None:
        """Tell a terminal its size in characters."""
        request = agent_pb2.TtyWinResizeRequest(
            container_id=container_id, exec_id=exec_id, row=rows, column=columns
        )
        await self._order("TtyWinResize", request, STATE_TIMEOUT)

    # stdio: the path that every agent has

    async def read_output(self, name: str, container_id: str, exec_id: str, max_bytes: int) -> bytes:
        """Read from `ReadStdout` or `ReadStderr`; empty means the end of the stream."""
        request = agent_pb2.ReadStreamRequest(container_id=container_id, exec_id=exec_id, len=max_bytes)
        answer = await self._call(_AGENT, name, request, agent_pb2.ReadStreamResponse, None)
        if len(answer.data) > max_bytes:
            text = f"the guest answered {len(answer.data)} bytes where {max_bytes} were asked"
            raise AgentError(name, Code.OUT_OF_RANGE, text)
        return answer.data

    async def write_stdin(self, container_id: str, exec_id: str, data: bytes) -> int:
        """Write to a process's stdin; return how many bytes were taken."""
        request = agent_pb2.WriteStreamRequest(container_id=container_id, exec_id=exec_id, data=data)
        answer = await self._call(_AGENT, "WriteStdin", request, agent_pb2.WriteStreamResponse, None)
        return answer.len

    async def close_stdin(self, container_id: str, exec_id: str) -> None:
        """Make the process read the end of its stdin."""
        request = agent_pb2.CloseStdinRequest(container_id=container_id, exec_id=exec_id)
        await self._order("CloseStdin", request, STATE_TIMEOUT)

    # stdio: streams of our own agent

    def new_port(self) -> int:
        """Choose a port for a stdio stream; each is used once in the life of a VM."""
        return next(self._ports)

    async def dial(self, port: int) -> trio.abc.HalfCloseableStream:
        """Connect to a port that the agent announced by accepting it in a request."""
        if self._failure is not None:
            raise GuestGone(str(self._failure))
        try:
            return await self._transport.dial(port)
        except GuestGone as exc:
            with trio.move_on_after(CAUSE_GRACE):  # as for the connection of the calls
                raise await self.wait_failed() from exc
            raise


def _count(stats: agent_pb2.StatsContainerResponse) -> int:
    """Return how many entries there are in lists and maps: two bytes of an answer can make one."""
    group, memory = stats.cgroup_stats, stats.cgroup_stats.memory_stats
    disks = sum(len(entries) for _, entries in group.blkio_stats.ListFields())
    others = (stats.network_stats, group.hugetlb_stats, memory.stats, group.cpu_stats.cpu_usage.percpu_usage)
    return disks + sum(map(len, others))


def _translate(name: str, error: StatusError) -> VCError:
    """Turn a status of the guest into our error; its text is what a user can act on, so it stays first."""
    code, text = error.status.code, reason(error.status.message)
    if code in _ERRORS:
        return _ERRORS[code](text or f"{name}: the guest's agent gives no reason")
    return AgentError(name, code, text)


@asynccontextmanager
async def connected(transport: Transport) -> AsyncIterator[AgentClient]:
    """Run an agent client for the length of the block."""
    client = AgentClient(transport)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        yield client
        nursery.cancel_scope.cancel()


async def together(*orders: Callable[[], Awaitable[object]]) -> None:
    """Run several calls at once; the first error cancels the others and comes out bare."""
    failures: Sequence[BaseException] = ()
    try:
        async with trio.open_nursery() as nursery:
            for order in orders:
                nursery.start_soon(_await, order)
    except* VCError as group:
        failures = group.exceptions
    if failures:
        first = failures[0]
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first


async def _await(order: Callable[[], Awaitable[object]]) -> None:
    await order()
