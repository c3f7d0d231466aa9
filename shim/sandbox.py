"""The one sandbox of this process: opened for a container or for a client, watched while it runs, ended once.

It lives in a task of its own, which holds `open_sandbox` until it is told to end; so it outlives the request
that made it, and leaving the block, in whatever way, is the clean-up. After its end another may be opened.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import trio

from shim import bundle
from shim.tasks import KILLED_STATUS, Exited
from vc import timeline
from vc.config import Config
from vc.errors import AlreadyExists, NotFound, VCError, WrongState
from vc.oci import spec as oci
from vc.oci.mounts import shm_bytes, source_of
from vc.resources import Size, container_size, pod_size
from vc.sandbox import Sandbox, SandboxSpec
from vc.storage.look import look

if TYPE_CHECKING:
    from shim.exits import Exits
    from shim.tasks import CreateRequest, Tasks

log = logging.getLogger(__name__)

OpenSandbox = Callable[[SandboxSpec, Config], AbstractAsyncContextManager[Sandbox]]

MAX_RESOLV_CONF = 64 << 10  # characters
ORDERED_STATUS = 0  # of a sandbox that ended because it was told to
OOM_INTERVAL = 0.1  # seconds between two events that the guest may tell


class PodSandbox:
    """The sandbox that the tasks of a pod live in, while there is one."""

    def __init__(
        self,
        nursery: trio.Nursery,
        exits: Exits,
        tasks: Tasks,
        *,
        namespace: str,
        open_sandbox: OpenSandbox,
        load_config: Callable[[str | None], Config],
    ) -> None:
        self.running: Sandbox | None = None
        self.kept = False  # it stays without containers, until a client ends it
        self.over = trio.Event()  # it has ended, or died; `exit` says how
        self.exit: Exited | None = None
        self.namespace = namespace
        self.load_config = load_config
        self._nursery = nursery
        self._exits = exits
        self._tasks = tasks
        self._open_sandbox = open_sandbox
        self._id = ""  # containerd's; the sandbox's own begins with the namespace
        self._run_dir = ""
        self._end = trio.Event()
        self._ended = trio.Event()
        self._ended.set()
        self._opening = trio.Lock()  # whoever needs a sandbox waits for one that is being opened

    async def for_container(
        self, request: CreateRequest, spec: Mapping[str, Any], identity: oci.Identity
    ) -> Sandbox:
        """Return the sandbox that a container belongs to; a new one for a pod, and for a group's first.

        Raises:
            NotFound: it belongs to a sandbox that does not run here.
            AlreadyExists: it wants one of its own, and another runs here.
            VCError: it cannot be opened; nothing of it is left then.
        """
        async with self._opening:
            return await self._for_container(request, spec, identity)

    async def _for_container(
        self, request: CreateRequest, spec: Mapping[str, Any], identity: oci.Identity
    ) -> Sandbox:
        here = identity.sandbox_id == self._id
        running = self.running if here and not self._end.is_set() else None
        if identity.role is oci.Role.CONTAINER:
            if running is None:
                raise NotFound(
                    f"sandbox {identity.sandbox_id!r} of container {request.id!r} does not run here"
                )
            return running
        if identity.role is oci.Role.MEMBER and here:
            if running is not None:
                # Any member's `delete` may be the one that cleans up.
                bundle.write_file(request.bundle, bundle.RUN_DIR, self._run_dir)
                return running
            await self._ended.wait()  # that of members who have left
        if self.kept or not self._ended.is_set():
            raise AlreadyExists(f"this shim runs sandbox {self._id!r}, so {request.id!r} cannot be another")
        config = self.load_config(request.config_path)
        timeline.mark("configuration read")
        wanted = sandbox_spec(f"{self.namespace}--{identity.sandbox_id}", spec, config)
        # Before there is anything that a `delete` after our death would have to find.
        self._run_dir = str(config.runtime.run_dir)
        bundle.write_file(request.bundle, bundle.RUN_DIR, self._run_dir)
        self._id = identity.sandbox_id
        return await self._open(wanted, config)

    def keep(self, sandbox_id: str) -> None:
        """Take this process for a sandbox that a client will open, and that stays without containers."""
        self._id, self.kept = sandbox_id, True

    async def open_kept(self, wanted: SandboxSpec, config: Config) -> Sandbox:
        """Open what is to be kept. If that fails, it may be tried again. Raises: WrongState, VCError."""
        async with self._opening:
            if self.exit is not None or not self._ended.is_set():
                raise WrongState(f"sandbox {self._id!r} was started already")
            return await self._open(wanted, config)

    async def _open(self, wanted: SandboxSpec, config: Config) -> Sandbox:
        self._end, self._ended = trio.Event(), trio.Event()
        if self.exit is not None:
            self.exit, self.over = None, trio.Event()
        sandbox: Sandbox = await self._nursery.start(self._run, wanted, config)
        return sandbox

    async def _run(self, spec: SandboxSpec, config: Config, *, task_status: trio.TaskStatus[Sandbox]) -> None:
        """Hold the sandbox until it is to end. Not being able to open it fails the caller."""
        opened = False
        try:
            async with self._open_sandbox(spec, config) as sandbox, trio.open_nursery() as watchers:
                self.running, opened = sandbox, True
                self._exits.sandbox_opened()
                watchers.start_soon(self._watch_vm, sandbox)
                watchers.start_soon(self._watch_memory, sandbox)
                task_status.started(sandbox)
                await self._end.wait()
                log.debug("sandbox %s is to end", spec.id)
                self.running = None  # from here on nothing new is created in it
                watchers.cancel_scope.cancel()
        except Exception:
            if not opened:
                raise  # to the caller; later on there is none, and the other tasks go on
            log.exception("sandbox %s did not end well", spec.id)
        finally:
            self.running = None
            self._exits.sandbox_over(f"sandbox {spec.id} was ended")
            self._ended.set()
            if opened:
                self._note_over(ORDERED_STATUS)

    async def _watch_vm(self, sandbox: Sandbox) -> None:
        gone = await sandbox.wait_gone()
        log.error("sandbox %s: %s", sandbox.id, gone)
        if sandbox.host_out_of_memory:
            self._exits.host_memory_ran_out()
        self._exits.sandbox_over(str(gone))
        self._note_over(KILLED_STATUS)

    def _note_over(self, status: int) -> None:
        """Say that it is over. The first word stays."""
        if self.exit is None:
            self.exit = Exited(status, time.time())
            self.over.set()

    async def _watch_memory(self, sandbox: Sandbox) -> None:
        while True:
            try:
                container_id = await sandbox.wait_oom()
            except VCError as exc:
                log.debug("sandbox %s: out-of-memory events end: %s", sandbox.id, exc)
                return
            for task in self._tasks:  # none if it was deleted meanwhile
                if task.id == container_id:
                    await self._exits.memory_ran_out(task)
            await trio.sleep(OOM_INTERVAL)  # or a guest that tells of nothing else would keep us busy

    async def guest_stacks(self) -> str:
        """Return where the guest's agent is, or why that is unknown."""
        if self.running is None:
            return "there is no sandbox"
        console = "".join(f"\nconsole: {line}" for line in self.running.console())
        try:
            return await self.running.guest_stacks() + console
        except VCError as exc:
            return f"the guest does not say where it is: {exc}{console}"

    async def end(self, limit: float) -> None:
        """End the VM and all that belongs to it; wait at most `limit` seconds, also when cancelled."""
        self._end.set()
        if self._ended.is_set():
            self._note_over(ORDERED_STATUS)  # it never ran, but somebody may wait for it
        with trio.move_on_after(limit, shield=True):
            await self._ended.wait()


def identity_of(request: CreateRequest, spec: Mapping[str, Any]) -> oci.Identity:
    """Return to which sandbox a container belongs: its bundle or its annotations say so. Raises: VCError."""
    identity = oci.identify(oci.read_annotations(spec), request.id)
    joined = bundle.read_file(request.bundle, bundle.JOINED)
    return oci.Identity(oci.Role.CONTAINER, joined) if joined else identity


def sandbox_spec(sandbox_id: str, spec: Mapping[str, Any], config: Config) -> SandboxSpec:
    """Return what the sandbox of a container with this spec is to be."""
    return SandboxSpec(
        id=sandbox_id,
        hostname=str(spec.get("hostname", "")),
        netns=oci.namespace(spec, "network"),
        dns=_lines_of(source_of(spec, "/etc/resolv.conf")),
        shm_bytes=shm_bytes(spec, look),
        workload=_workload(spec),
        config_path=str(config.source),
        annotations=oci.read_annotations(spec),
    )


def _workload(spec: Mapping[str, Any]) -> Size:
    """Return what the pod is known to need: the kubelet's word for it, else this container's limits."""
    told = pod_size(oci.read_annotations(spec))
    return told if told != Size() else container_size((spec.get("linux") or {}).get("resources") or {})


def _lines_of(path: str | None) -> tuple[str, ...]:
    """Return the lines of the pod's resolv.conf; a file that cannot be read has none."""
    if path is None:
        return ()
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return tuple(file.read(MAX_RESOLV_CONF).splitlines())
    except OSError as exc:
        log.warning("the pod gets no name servers: %s", exc)
        return ()
