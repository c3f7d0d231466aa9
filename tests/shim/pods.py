"""A served pod over a real socket, with a client on it; the sandbox below it is made of memory."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty

from protos.containerd import events_pb2, task_v2_pb2, task_v3_pb2
from protos.kata.agent_pb2 import StatsContainerResponse
from ttrpc import methods
from ttrpc.client import Client
from ttrpc.status import StatusError
from vc.errors import GuestGone, NotFound
from vc.process import Exit

TASK = methods.service(task_v2_pb2.DESCRIPTOR.services_by_name["Task"])
TASK_V3 = methods.service(task_v3_pb2.DESCRIPTOR.services_by_name["Task"])
SPEC: dict[str, Any] = {
    "ociVersion": "1.0.2",
    "process": {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
    "root": {"path": "rootfs"},
    "linux": {"namespaces": [{"type": "network", "path": "/run/netns/x"}]},
}
EXEC_SPEC = AnyMessage(
    type_url="types.containerd.io/opencontainers/runtime-spec/1/Process",
    value=json.dumps({"args": ["sh"], "cwd": "/"}).encode(),
)
PID = 4321


class FakeProcess:
    """A guest process that does what a test says."""

    def __init__(self, sandbox: FakeSandbox, exec_id: str) -> None:
        self.sandbox = sandbox
        self.exec_id = exec_id
        self.stdin: trio.abc.SendStream | None = None
        self.stdout: trio.abc.ReceiveStream | None = None
        self.stderr: trio.abc.ReceiveStream | None = None
        self.signals: list[int] = []
        self.sizes: list[tuple[int, int]] = []
        self.exit: Exit | None = None
        self.done = trio.Event()
        self.dies_of: set[int] = {9}

    def end(self, status: int, **more: Any) -> None:
        if self.exit is None:
            self.exit = Exit(status, time.time(), **more)
            self.done.set()

    async def wait(self) -> Exit:
        await self.done.wait()
        assert self.exit is not None
        return self.exit

    async def signal(self, number: int) -> None:
        if self.sandbox.gone.is_set():
            raise GuestGone("the VM died")
        if self.exit is not None:
            raise NotFound("it has ended")
        self.signals.append(number)
        if number in self.dies_of:
            self.end(128 + number)

    async def resize(self, *, columns: int, rows: int) -> None:
        self.sizes.append((columns, rows))

    async def close_stdin(self) -> None: ...


class FakeContainer:
    def __init__(self, sandbox: FakeSandbox, container_id: str) -> None:
        self.id = container_id
        self.sandbox = sandbox
        self.init = FakeProcess(sandbox, "")
        self.execs: dict[str, FakeProcess] = {}
        self.deleted = 0
        self.paused = False
        self.resources: list[Mapping[str, Any]] = []
        self.counters: StatsContainerResponse | None = None
        self.spec: Any = None
        self.given: dict[str, Any] = {}

    async def start(self) -> None:
        await self.sandbox.start_hook(self.init)

    def exec(self, exec_id: str, process: Mapping[str, Any], stdio: object) -> FakeProcess:
        self.execs[exec_id] = FakeProcess(self.sandbox, exec_id)
        return self.execs[exec_id]

    async def start_exec(self, exec_id: str) -> None:
        await self.sandbox.start_hook(self.execs[exec_id])

    def forget_exec(self, exec_id: str) -> None:
        del self.execs[exec_id]

    async def signal_all(self, number: int) -> None:
        await self.init.signal(number)

    async def pause(self) -> None:
        self.paused = True

    async def resume(self) -> None:
        self.paused = False

    async def update(self, resources: Mapping[str, Any]) -> None:
        self.resources.append(resources)

    async def stats(self) -> StatsContainerResponse:
        if self.counters is None:
            raise NotFound("no counters")
        return self.counters

    async def delete(self) -> None:
        await self.sandbox.delete_hook(self)
        self.deleted += 1
        self.init.end(137)


async def nothing(_: object) -> None:
    await trio.lowlevel.checkpoint()


class Gate:
    """A hook at which whoever calls it stands until the test lets it through."""

    def __init__(self) -> None:
        self.reached = trio.Event()
        self.opened = trio.Event()

    async def __call__(self, _: object) -> None:
        self.reached.set()
        await self.opened.wait()


class FakeSandbox:
    def __init__(self, spec: Any) -> None:
        self.id = spec.id
        self.spec = spec
        self.pid = PID
        self.host_out_of_memory = False
        self.containers: dict[str, FakeContainer] = {}
        self.gone = trio.Event()
        self.create_hook: Callable[[str], Any] = nothing
        self.start_hook: Callable[[FakeProcess], Any] = nothing
        self.delete_hook: Callable[[FakeContainer], Any] = nothing
        self.end_hook: Callable[[FakeSandbox], Any] = nothing
        self.oom_send, self.oom_receive = trio.open_memory_channel[str](10)
        self.open = True

    async def create_container(self, container_id: str, spec: Any, **given: Any) -> FakeContainer:
        await self.create_hook(container_id)
        self.containers[container_id] = FakeContainer(self, container_id)
        self.containers[container_id].spec = spec
        self.containers[container_id].given = given
        return self.containers[container_id]

    async def wait_gone(self) -> GuestGone:
        await self.gone.wait()
        return GuestGone("the VMM was killed by signal 9")

    async def wait_oom(self) -> str:
        return await self.oom_receive.receive()

    def die(self) -> None:
        """Let the VM die; as in the real library, the waits of running processes end with it."""
        self.gone.set()
        for container in self.containers.values():
            for process in (container.init, *container.execs.values()):
                process.end(137, cause="the VMM was killed by signal 9")


@dataclass
class Shim:
    """A served pod with a client on it, and what has reached the event service."""

    bundles: Path
    socket: Path
    client: Client
    sandboxes: list[FakeSandbox] = field(default_factory=list)
    events: list[tuple[str, Any]] = field(default_factory=list)
    event_came: trio.Event = field(default_factory=trio.Event)
    ended: trio.Event = field(default_factory=trio.Event)
    open_hook: Callable[[Any], Any] = nothing
    prepare: Callable[[FakeSandbox], None] = lambda _: None
    answer_hook: Callable[[str], Any] = nothing  # called with the topic before an event is answered

    @asynccontextmanager
    async def open_sandbox(self, spec: Any, config: object) -> AsyncIterator[FakeSandbox]:
        await self.open_hook(spec)
        sandbox = FakeSandbox(spec)
        self.prepare(sandbox)
        self.sandboxes.append(sandbox)
        try:
            yield sandbox
            await sandbox.end_hook(sandbox)
        finally:
            sandbox.open = False

    def bundle(self, task_id: str, **more: Any) -> str:
        path = self.bundles / task_id
        path.mkdir(exist_ok=True)
        (path / "rootfs").mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(SPEC | more))
        return str(path)

    async def call(self, method: str, *, table: methods.ServiceTable = TASK, **fields: Any) -> Any:
        entry = table[method]
        with trio.fail_after(20):
            return await self.client.call(entry, entry.request_class(**fields))

    async def fails(self, method: str, **fields: Any) -> StatusError:
        with pytest.raises(StatusError) as caught:
            await self.call(method, **fields)
        return caught.value

    async def create(self, task_id: str = "c1", **fields: Any) -> Any:
        annotations = fields.pop("annotations", {})
        return await self.call(
            "Create", id=task_id, bundle=self.bundle(task_id, annotations=annotations), **fields
        )

    async def run(self, task_id: str = "c1", **fields: Any) -> FakeContainer:
        await self.create(task_id, **fields)
        await self.call("Start", id=task_id)
        return self.container(task_id)

    async def exec(self, exec_id: str, task_id: str = "c1") -> FakeProcess:
        await self.call("Exec", id=task_id, exec_id=exec_id, spec=EXEC_SPEC)
        await self.call("Start", id=task_id, exec_id=exec_id)
        return self.container(task_id).execs[exec_id]

    def container(self, task_id: str = "c1") -> FakeContainer:
        return self.sandboxes[-1].containers[task_id]

    async def wait_events(self, count: int) -> list[str]:
        with trio.fail_after(20):
            while len(self.events) < count:
                self.event_came = trio.Event()
                await self.event_came.wait()
        return [topic for topic, _ in self.events]

    async def forward(self, request: Any, context: object) -> Empty:
        envelope = request.envelope
        await self.answer_hook(envelope.topic)
        kind = getattr(events_pb2, envelope.event.type_url.removeprefix("containerd.events."))
        self.events.append((envelope.topic, kind.FromString(envelope.event.value)))
        self.event_came.set()
        return Empty()


def listener(path: Path) -> trio.SocketListener:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))
