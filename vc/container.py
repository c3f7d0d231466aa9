"""One OCI container in a sandbox: its share of the file system, its processes, its life cycle.

Creating acquires things one by one and puts the undo of each on a stack; deleting runs the same stack. So a
half-made container is rolled back by the code that ends a whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any

import trio

from protos.kata import agent_pb2
from vc.agent_client.client import AgentClient
from vc.errors import (
    AlreadyExists,
    NotFound,
    Timeout,
    VCError,
    WrongState,
)
from vc.oci.translate import guest_process, guest_resources
from vc.process import Ports, Process, StdioRequest
from vc.states import ContainerState, ProcessState

DELETE_TIMEOUT = 8.0  # seconds for the guest's part of a delete; containerd's clients allow 10 in all
ABANDON_TIMEOUT = 2.0  # seconds for taking back an order that the guest did not answer in time


class Container:
    """A container that exists in the guest. `Sandbox.create_container` makes them."""

    def __init__(
        self,
        container_id: str,
        agent: AgentClient,
        nursery: trio.Nursery,
        *,
        streams: bool,
        forget: Callable[[], None],
    ) -> None:
        """`forget` takes it off the sandbox's list."""
        self.id = container_id
        self.state = ContainerState.READY
        self.execs: dict[str, Process] = {}
        self._agent = agent
        self._nursery = nursery
        self._undo = AsyncExitStack()
        self._streams = streams
        self._forget = forget
        self.init = self._make_init(StdioRequest())

    def _make_init(self, stdio: StdioRequest) -> Process:
        return Process(self._agent, self.id, "", stdio, self._launch, streams=self._streams)

    async def create(
        self, request: agent_pb2.CreateContainerRequest, stdio: StdioRequest, timeout: float
    ) -> None:
        """Create it in the guest within `timeout` seconds. On failure the guest has nothing of it."""
        self.init = self._make_init(stdio)
        ports = self.init.choose_ports()
        self.init.ports = ports
        request.stdin_port = ports.stdin
        request.stdout_port = ports.stdout
        request.stderr_port = ports.stderr
        try:
            await self._agent.create_container(request, timeout=timeout)
        except (Timeout, trio.Cancelled):
            # The guest may still succeed, and then it would hold a container that nobody knows.
            with trio.move_on_after(ABANDON_TIMEOUT, shield=True):
                await self._remove_quietly()
            raise

    def keep(self, undo: AsyncExitStack) -> None:
        """Take over what gives back the host's things; `delete` runs it."""
        self._undo = undo

    async def _launch(self, ports: Ports) -> None:
        await self._agent.start_container(self.id)

    async def start(self) -> None:
        """Run the init process.

        Raises:
            WrongState: it runs already, or has ended.
        """
        if self.state is not ContainerState.READY:
            raise WrongState(f"container {self.id!r} is {self.state.value}, so it cannot be started")
        await self.init.start(self._nursery)
        self.state = ContainerState.RUNNING
        self._nursery.start_soon(self._mark_stopped)

    async def _mark_stopped(self) -> None:
        await self.init.wait()
        self.state = ContainerState.STOPPED

    def exec(self, exec_id: str, process: Mapping[str, Any], stdio: StdioRequest) -> Process:
        """Prepare a further process from an OCI process object; its `start` runs it.

        Raises:
            AlreadyExists: the exec id is taken.
            InvalidArgument: the process object makes no sense.
        """
        if exec_id in self.execs:
            raise AlreadyExists(f"container {self.id!r} already has a process {exec_id!r}")
        translated = guest_process({**process, "terminal": stdio.terminal})

        async def launch(ports: Ports) -> None:
            request = agent_pb2.ExecProcessRequest(
                container_id=self.id,
                exec_id=exec_id,
                process=translated,
                stdin_port=ports.stdin,
                stdout_port=ports.stdout,
                stderr_port=ports.stderr,
            )
            await self._agent.exec_process(request)

        made = Process(self._agent, self.id, exec_id, stdio, launch, streams=self._streams)
        self.execs[exec_id] = made
        return made

    async def start_exec(self, exec_id: str) -> None:
        """Run a prepared process. Raises NotFound, WrongState, or the guest's reason."""
        if self.state is not ContainerState.RUNNING:
            raise WrongState(
                f"container {self.id!r} is {self.state.value}, so process {exec_id!r} cannot be started"
            )
        await self.find(exec_id).start(self._nursery)

    def find(self, exec_id: str) -> Process:
        """Return a process by its exec id; empty means init."""
        if not exec_id:
            return self.init
        try:
            return self.execs[exec_id]
        except KeyError:
            raise NotFound(f"no process {exec_id!r} in container {self.id!r}") from None

    def forget_exec(self, exec_id: str) -> None:
        """Drop a process that ended or never ran."""
        process = self.find(exec_id)
        if process.state not in (ProcessState.CREATED, ProcessState.STOPPED):
            raise WrongState(f"{process} is {process.state.value}, so it cannot be deleted")
        del self.execs[exec_id]

    async def signal_all(self, signal: int) -> None:
        """Signal every process of the container. The guest fans out SIGKILL; others go to init."""
        await self._agent.signal_process(self.id, "", signal)

    async def pause(self) -> None:
        """Freeze all processes. Raises WrongState unless it is running."""
        self._expect(ContainerState.RUNNING, "paused")
        await self._agent.pause_container(self.id)
        self._move(ContainerState.RUNNING, ContainerState.PAUSED)

    async def resume(self) -> None:
        """Thaw all processes. Raises WrongState unless it is paused."""
        self._expect(ContainerState.PAUSED, "resumed")
        await self._agent.resume_container(self.id)
        self._move(ContainerState.PAUSED, ContainerState.RUNNING)

    def _expect(self, state: ContainerState, participle: str) -> None:
        if self.state is not state:
            raise WrongState(f"container {self.id!r} is {self.state.value}, so it cannot be {participle}")

    def _move(self, old: ContainerState, new: ContainerState) -> None:
        """Change the state, unless the container ended meanwhile."""
        if self.state is old:
            self.state = new

    async def update(self, resources: Mapping[str, Any]) -> None:
        """Change cgroup limits; `resources` is an OCI LinuxResources object."""
        request = agent_pb2.UpdateContainerRequest(container_id=self.id, resources=guest_resources(resources))
        await self._agent.update_container(request)

    async def stats(self) -> agent_pb2.StatsContainerResponse:
        """Read the counters of its cgroup."""
        return await self._agent.stats_container(self.id)

    async def delete(self) -> None:
        """Remove it from the guest and give back what the host holds for it. Safe to run twice.

        What the guest cannot do any more is skipped, so that the host is clean whatever the guest does.
        """
        with trio.CancelScope(shield=True):  # the guest's part has a limit, each step of the host's its own
            with trio.move_on_after(DELETE_TIMEOUT):
                await self._remove_quietly()
            await self.release()

    async def release(self) -> None:
        """Give back what the host holds for it, and forget it. The guest is gone. Safe to run twice."""
        with trio.CancelScope(shield=True):  # each step of the undo has its own bound
            await self._undo.aclose()
        self._forget()

    async def _remove_quietly(self) -> None:
        try:
            await self._agent.remove_container(self.id)
        except VCError:
            pass  # the host's side must be cleaned whatever the guest answers
