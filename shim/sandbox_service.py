"""The Sandbox service: a client makes a pod's VM before there is a container, and ends it after the last.

containerd 2.x (`sandboxer = "shim"`) and 1.7 call it for a bundle of its own, without config.json. There is
no container of the sandbox's own and no pause process. Containers then come by Create alone: containerd
writes into the bundle of each which sandbox it joined (`bundle.JOINED`).

    CreateSandbox    takes this process for the sandbox; nothing runs yet
    StartSandbox     starts the VM
    StopSandbox      ends the VM and with it all processes, whose waiters are told; the tasks are still there
    ShutdownSandbox  ends this process
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import trio
from google.protobuf.message import Message

from protos.containerd import sandbox_pb2 as api
from shim import bundle, metrics, options, pod_config
from shim.announce import timestamp
from shim.bundle import bundle_dir
from shim.pod import SANDBOX_END_WAIT, Pod
from ttrpc.server import Context
from vc.config import Config
from vc.errors import AlreadyExists, NotFound, VCError, WrongState
from vc.oci.spec import check_id
from vc.sandbox import SandboxSpec

READY, NOT_READY = "SANDBOX_READY", "SANDBOX_NOTREADY"  # containerd, core/sandbox; the words of the CRI
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}  # Go's names for machines, where they differ


@dataclass(frozen=True, slots=True)
class Wanted:
    """What CreateSandbox asked for."""

    id: str
    bundle: str
    spec: SandboxSpec
    config: Config


class SandboxService:
    """The handlers; the RPC server finds them by the names of their methods."""

    def __init__(self, pod: Pod, *, given: bytes, unified_cgroups: bool, stop: Callable[[], None]) -> None:
        """`given` is what containerd wrote to `start`; `stop` makes this process end in order."""
        self._pod = pod
        self._sandbox = pod.sandbox
        self._given = given
        self._unified_cgroups = unified_cgroups
        self._stop = stop
        self._wanted: Wanted | None = None
        self._pid = 0
        self._created_at = 0.0

    def _find(self, sandbox_id: str) -> Wanted:
        if self._wanted is None or self._wanted.id != sandbox_id:
            raise NotFound(f"no sandbox {sandbox_id!r} here")
        return self._wanted

    def _find_running(self, sandbox_id: str) -> Wanted:
        wanted = self._find(sandbox_id)
        if not self._is_ready:
            raise WrongState(f"sandbox {sandbox_id!r} does not run")
        return wanted

    @property
    def _is_ready(self) -> bool:
        return self._sandbox.running is not None and self._sandbox.exit is None

    async def create_sandbox(self, request: api.CreateSandboxRequest, context: Context) -> Message:
        """Take this process for a sandbox that StartSandbox will start."""
        await trio.lowlevel.checkpoint()
        sandbox_id = check_id(request.sandbox_id, "sandbox id")
        if self._pod.in_use:
            raise AlreadyExists(f"this shim is in use already, so it cannot become sandbox {sandbox_id!r}")
        directory = bundle_dir(request.bundle_path)
        asked = pod_config.read(request.options)
        chosen = options.from_start(self._given, task_id=sandbox_id, namespace=self._sandbox.namespace)
        config = self._sandbox.load_config(chosen)
        spec = SandboxSpec(
            id=f"{self._sandbox.namespace}--{sandbox_id}",
            hostname=asked.hostname,
            netns=request.netns_path,
            dns=asked.dns,
            workload=asked.workload,
            config_path=str(config.source),
            annotations=dict(request.annotations),
        )
        # Before there is anything that a `delete` after our death would have to find.
        bundle.write_file(directory, bundle.RUN_DIR, str(config.runtime.run_dir))
        self._wanted = Wanted(sandbox_id, directory, spec, config)
        self._sandbox.keep(sandbox_id)
        return api.CreateSandboxResponse()

    async def start_sandbox(self, request: api.StartSandboxRequest, context: Context) -> Message:
        """Start the VM. If it cannot be, nothing is left of it, and it may be tried again."""
        wanted = self._find(request.sandbox_id)
        sandbox = await self._sandbox.open_kept(wanted.spec, wanted.config)
        self._pid, self._created_at = sandbox.pid, time.time()
        bundle.write_file(wanted.bundle, bundle.INIT_PID, str(self._pid))
        return api.StartSandboxResponse(pid=self._pid, created_at=timestamp(self._created_at))

    async def platform(self, request: api.PlatformRequest, context: Context) -> Message:
        """Name what containers must be built for: guest and host are of one kind."""
        self._find(request.sandbox_id)
        await trio.lowlevel.checkpoint()
        response = api.PlatformResponse()
        machine = os.uname().machine
        response.platform.os, response.platform.architecture = "linux", ARCHITECTURES.get(machine, machine)
        return response

    async def stop_sandbox(self, request: api.StopSandboxRequest, context: Context) -> Message:
        """End the VM. That it takes longer than the client wants to wait is no error: it goes on behind."""
        self._find(request.sandbox_id)
        await self._sandbox.end(float(request.timeout_secs) or SANDBOX_END_WAIT)
        return api.StopSandboxResponse()

    async def wait_sandbox(self, request: api.WaitSandboxRequest, context: Context) -> Message:
        """Answer when the sandbox has ended, to everyone who asks, before or after."""
        self._find(request.sandbox_id)
        await self._sandbox.over.wait()
        ended = self._sandbox.exit
        assert ended is not None
        return api.WaitSandboxResponse(exit_status=ended.status, exited_at=timestamp(ended.at))

    async def sandbox_status(self, request: api.SandboxStatusRequest, context: Context) -> Message:
        """Say whether containers can be created. Never asks the guest."""
        wanted = self._find(request.sandbox_id)
        await trio.lowlevel.checkpoint()
        state = READY if self._is_ready else NOT_READY
        response = api.SandboxStatusResponse(sandbox_id=wanted.id, pid=self._pid, state=state)
        if self._created_at:
            response.created_at.CopyFrom(timestamp(self._created_at))
        if self._sandbox.exit is not None:
            response.exited_at.CopyFrom(timestamp(self._sandbox.exit.at))
        return response

    async def ping_sandbox(self, request: api.PingRequest, context: Context) -> Message:
        """Answer if the VM runs."""
        self._find_running(request.sandbox_id)
        await trio.lowlevel.checkpoint()
        return api.PingResponse()

    async def shutdown_sandbox(self, request: api.ShutdownSandboxRequest, context: Context) -> Message:
        """End everything and this process. Also if CreateSandbox failed: then it is there for nothing."""
        if self._wanted is not None or self._pod.in_use:
            self._find(request.sandbox_id)
        await self._sandbox.end(SANDBOX_END_WAIT)
        context.after_reply(self._stop)
        return api.ShutdownSandboxResponse()

    async def sandbox_metrics(self, request: api.SandboxMetricsRequest, context: Context) -> Message:
        """Return the counters of all containers together."""
        wanted = self._find_running(request.sandbox_id)
        found = []
        for task in self._pod.tasks:
            try:
                found.append(await task.container.stats())
            except VCError:
                continue  # it has ended, or is being deleted
        response = api.SandboxMetricsResponse()
        response.metrics.id = wanted.id
        response.metrics.timestamp.CopyFrom(timestamp(time.time()))
        response.metrics.data.CopyFrom(metrics.metrics(metrics.total(found), unified=self._unified_cgroups))
        return response
