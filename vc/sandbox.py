"""A sandbox: one VM and all that belongs to a pod in it.

`open_sandbox` holds everything that a sandbox has for the length of one block, acquired in order and given
back in reverse. What a crash leaves is found by the record that the block writes first; `cleanup_sandbox`
replays it from any process. Nothing here assumes that the VM was booted for this sandbox: a factory hands it
over.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio

from protos.kata import agent_pb2
from vc import timeline
from vc.agent_client.client import STREAMS_FEATURE, AgentClient
from vc.background import background
from vc.blocking import enter
from vc.config import Config, apply_annotations
from vc.container import Container
from vc.errors import AlreadyExists, GuestGone, NotFound, Unsupported, VCError
from vc.factory import Factory
from vc.factory.select import make_factory
from vc.hypervisor.base import VMConfig
from vc.hypervisor.configure import vm_config
from vc.monitor import HealthCheck
from vc.network.scan import interfaces_of
from vc.oci.mounts import (
    DEFAULT_SHM_BYTES,
    SHM_OPTIONS,
    Plan,
    PlannedMount,
    clean,
    mount_points,
    plan_mounts,
    refuse_unmade,
    shm_flags,
)
from vc.oci.mounts import Mount as SpecMount
from vc.oci.spec import root as spec_root
from vc.oci.translate import guest_spec
from vc.persist import store
from vc.persist.schema import SandboxRecord
from vc.persist.store import Layout
from vc.pids import start_ticks
from vc.process import StdioRequest
from vc.resources import Size, static_size
from vc.spare import spare_descriptors
from vc.storage.look import look
from vc.storage.mounts import Mount
from vc.storage.share import GUEST_SHARE, Share, container_rootfs, shared_directory, volume
from vc.vm import VM

log = logging.getLogger(__name__)

SHARE_TAG = "kataShared"  # Kata's virtiofs tag
GUEST_SHM = "/run/kata-containers/sandbox/shm"  # Kata's place for the pod's /dev/shm
END_TIMEOUT = 2.0  # seconds for the guest's own end; a hung one is killed all the same
STALE_TIMEOUT = 2.0  # seconds for the guest to look at its mounts; nobody needs the result
HOSTNAME_MAX = 64  # bytes: linux/utsname.h, __NEW_UTS_LEN


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """What a sandbox is to be.

    `netns` is a path, "" for a new empty namespace, None for the host's own. `dns` are the lines of the
    guest's resolv.conf. `workload` is what its containers need beside the configured default. The annotations
    may override the configuration as far as that allows.
    """

    id: str
    hostname: str = ""
    netns: str | None = ""
    dns: tuple[str, ...] = ()
    shm_bytes: int = DEFAULT_SHM_BYTES
    workload: Size = field(default_factory=Size)
    config_path: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)


class Sandbox:
    """A running sandbox. `open_sandbox` makes them."""

    def __init__(
        self,
        spec: SandboxSpec,
        config: Config,
        share: Share,
        vm: VM,
        nursery: trio.Nursery,
        containers: dict[str, Container],
    ) -> None:
        """`containers` is empty; whoever opened the sandbox releases what is in it at the end."""
        self.id = spec.id
        self.spec = spec
        self.containers = containers
        self._config = config
        self._share = share
        self._vm = vm
        self._nursery = nursery
        # Whether the agent gives each stdio stream a connection of its own.
        self._streams = STREAMS_FEATURE in vm.details.agent_details.extra_features
        self._claimed: set[str] = set()

    @property
    def pid(self) -> int:
        """The VMM's process id on the host; it lives in the pod's network namespace, or in an empty one."""
        return self._vm.machine.pid

    @property
    def host_out_of_memory(self) -> bool:
        """Whether the VM is gone because the host had no memory for it."""
        return self._vm.machine.out_of_memory

    async def wait_gone(self) -> GuestGone:
        """Block until the VM died; return why."""
        return await self._vm.wait_gone()

    def condemn(self, cause: str) -> None:
        """End the VM, because of what its guest does or fails to do. `wait_gone` tells the cause."""
        self._vm.die(cause)

    def console(self) -> list[str]:
        """Return the last lines that the guest printed."""
        return self._vm.machine.console.lines()

    async def guest_stacks(self) -> str:
        """Ask the guest where its agent is. Raises: VCError."""
        return await self._vm.agent.stacks()

    async def wait_oom(self) -> str:
        """Block until a container runs out of memory; return its id."""
        return await self._vm.agent.wait_oom()

    def find(self, container_id: str) -> Container:
        """Return a container by its id. Raises: NotFound."""
        try:
            return self.containers[container_id]
        except KeyError:
            raise NotFound(f"no container {container_id!r} in sandbox {self.id!r}") from None

    async def create_container(
        self,
        container_id: str,
        spec: Mapping[str, Any],
        *,
        rootfs_mounts: Sequence[Mount],
        rootfs: Path,
        stdio: StdioRequest,
    ) -> Container:
        """Create a container from an OCI spec; its init process waits for `start`.

        `rootfs_mounts` are containerd's entries for the root; without any, `rootfs` is mounted already.

        Raises:
            AlreadyExists: the id is taken.
            VCError: what the host or the guest refuses. Nothing is left of the container then.
        """
        if container_id in self._claimed:
            raise AlreadyExists(f"container {container_id!r} already exists in sandbox {self.id!r}")
        self._claimed.add(container_id)
        async with AsyncExitStack() as undo:
            undo.callback(self._claimed.discard, container_id)
            undo.push_async_callback(self._drop_stale_mounts, container_id)
            planned = await trio.to_thread.run_sync(plan_mounts, spec, look)
            files = container_rootfs(
                self._share,
                container_id,
                rootfs_mounts,
                rootfs,
                read_only=spec_root(spec)[1],
                mount_points=mount_points(spec, planned),
            )
            guest_root = await enter(undo, files)
            mounts = await self._share_volumes(undo, container_id, planned)
            timeline.mark("root shared")
            request = self._translate(container_id, spec, guest_root, mounts)
            container = Container(
                container_id,
                self._vm.agent,
                self._nursery,
                streams=self._streams,
                forget=partial(self._forget, container_id),
            )
            await container.create(request, stdio, float(self._config.runtime.create_container_timeout))
            timeline.mark("container created")
            container.keep(undo.pop_all())
            self.containers[container_id] = container
            return container

    def _translate(
        self, container_id: str, spec: Mapping[str, Any], guest_root: str, mounts: Sequence[SpecMount]
    ) -> agent_pb2.CreateContainerRequest:
        """Make the order to the agent. Raises: InvalidArgument, Unsupported."""
        seccomp = not self._config.runtime.disable_guest_seccomp
        translated = guest_spec(spec, root_path=guest_root, mounts=mounts, seccomp=seccomp)
        able = self._vm.details.agent_details.supports_seccomp
        if translated.spec.Linux.HasField("Seccomp") and not able:
            raise Unsupported(
                f"container {container_id!r} has a seccomp profile, which the agent does not support; "
                "use a guest that does, or set disable_guest_seccomp = true to run it without"
            )
        for note in translated.notes:
            log.info("container %s: %s", container_id, note)
        return agent_pb2.CreateContainerRequest(
            container_id=container_id,
            exec_id=container_id,  # Kata's exec id of an init process
            OCI=translated.spec,
            sandbox_pidns=translated.sandbox_pidns,
        )

    async def _drop_stale_mounts(self, container_id: str) -> None:
        """Let the guest forget what the host no longer shares, unless the VM ends anyway.

        The guest remembers entries of removed mounts. For each of them virtiofsd keeps a descriptor, so that
        a container that is made again and again would take it to its limit, and the file system that was
        mounted there stays in use on the host.
        """
        if not self.containers.keys() - {container_id}:
            return
        with trio.move_on_after(STALE_TIMEOUT, shield=True):
            try:
                await self._vm.agent.remove_stale_mounts()
            except VCError as exc:  # an older agent has no such call; a guest that is gone forgets everything
                log.debug("the guest keeps what was shared for container %s: %s", container_id, exc)

    def _forget(self, container_id: str) -> None:
        self.containers.pop(container_id, None)

    async def _share_volumes(
        self, undo: AsyncExitStack, container_id: str, plan: Sequence[PlannedMount]
    ) -> list[SpecMount]:
        """Share what the spec binds from the host; return the mounts as the guest is to make them."""
        mounts = []
        for planned in plan:
            if planned.note:
                log.warning("container %s: %s", container_id, planned.note)
            refuse_unmade(planned)
            if planned.plan is Plan.SHARE:
                source = Path(clean(planned.mount.source))
                shared = volume(
                    self._share,
                    container_id,
                    source,
                    read_only=planned.mount.readonly,
                    recursive=not planned.mount.is_flat,
                )
                mounts.append(_with_source(planned, await enter(undo, shared)))
            elif planned.plan is Plan.SHM:
                flags = shm_flags(planned.mount)
                mounts.append(SpecMount(planned.mount.destination, GUEST_SHM, "bind", ("rbind", *flags)))
            elif planned.plan is Plan.GUEST:
                mounts.append(planned.mount)
        return mounts


def _with_source(planned: PlannedMount, source: str) -> SpecMount:
    return SpecMount(planned.mount.destination, source, planned.mount.type, planned.mount.options)


@asynccontextmanager
async def open_sandbox(
    spec: SandboxSpec, config: Config, *, factory: Factory | None = None
) -> AsyncIterator[Sandbox]:
    """Run a sandbox for the length of the block.

    Raises:
        AlreadyExists: there is one of this id, alive or not cleaned up.
        VCError: why it cannot be; nothing is left of it then.
    """
    maker = factory or make_factory(config)
    config = apply_annotations(config, spec.annotations)
    for warning in config.warnings:
        log.warning("%s", warning)
    if config.hypervisor.shared_fs == "none":
        raise Unsupported(
            'shared_fs = "none": there is no other way yet for the files of containers into the guest; '
            'set it to "virtio-fs"'
        )
    layout = Layout(config.runtime.run_dir)
    vmid = secrets.token_hex(8)
    async with AsyncExitStack() as stack, spare_descriptors():
        lock = store.claim(layout, spec.id)
        stack.callback(lock.release)
        stack.callback(store.forget, layout, spec.id)
        store.save(layout, _record(spec, vmid))
        share = Share(layout.mounts(spec.id), layout.shared(spec.id))
        await enter(stack, shared_directory(share))
        timeline.mark("share ready")
        containers: dict[str, Container] = {}
        stack.push_async_callback(_release, containers)
        vm = await stack.enter_async_context(
            maker.vm(_vm_config(spec, config), vmid=vmid, shared_dir=share.shared, netns=spec.netns)
        )
        timeline.mark("vm ready")
        _report_interfaces(spec, vm.machine.pid)
        nursery = await stack.enter_async_context(background())
        await _prepare_guest(spec, config, vm.agent)
        timeline.mark("guest prepared")
        runtime = config.runtime
        check = HealthCheck(runtime.health_check_interval, runtime.health_check_timeout)
        nursery.start_soon(vm.watch_health, check)
        stack.push_async_callback(_end_guest, vm.agent)
        yield Sandbox(spec, config, share, vm, nursery, containers)


async def _end_guest(agent: AgentClient) -> None:
    """Let the guest write out what it holds of the shared files; then it may be killed."""
    with trio.move_on_after(END_TIMEOUT, shield=True):
        try:
            await agent.destroy_sandbox(timeout=END_TIMEOUT)
        except VCError as exc:
            log.debug("the guest was not ended in order: %s", exc)


async def _release(containers: Mapping[str, Container]) -> None:
    """Give back what the host holds for containers that nobody deleted before the VM ended."""
    for container in list(containers.values()):
        await container.release()


def _record(spec: SandboxSpec, vmid: str) -> SandboxRecord:
    pid = os.getpid()
    return SandboxRecord(spec.id, vmid, pid, start_ticks(pid), spec.config_path, time.time())


def _vm_config(spec: SandboxSpec, config: Config) -> VMConfig:
    """Describe a VM that has what the configuration gives and what the workload needs on top."""
    default = Size(config.hypervisor.default_vcpus, config.hypervisor.default_memory)
    size = static_size(default, spec.workload)
    vcpus = min(int(size.vcpus), config.hypervisor.default_maxvcpus)
    return vm_config(config, vcpus=vcpus, memory_mib=size.memory_mib)


def _report_interfaces(spec: SandboxSpec, vmm_pid: int) -> None:
    """Say what the pod's network namespace has and the VM will not get."""
    names = interfaces_of(vmm_pid, spec.netns) if spec.netns is not None else []
    if names:
        log.warning(
            "network namespace %s has interfaces %s: this version gives the VM no network, "
            "so the containers will not see them",
            spec.netns or "of the sandbox",
            ", ".join(names),
        )


async def _prepare_guest(spec: SandboxSpec, config: Config, agent: AgentClient) -> None:
    """Make the guest this sandbox's: its name, shared directory, shm, DNS."""
    request = agent_pb2.CreateSandboxRequest(
        hostname=spec.hostname.encode()[:HOSTNAME_MAX].decode(errors="ignore"),
        dns=spec.dns,
        sandbox_id=spec.id,
        storages=[
            agent_pb2.Storage(
                driver="virtio-fs", source=SHARE_TAG, fstype="virtiofs", mount_point=f"{GUEST_SHARE}/"
            ),
            agent_pb2.Storage(
                driver="ephemeral",
                source="shm",
                fstype="tmpfs",
                options=[*SHM_OPTIONS, f"size={spec.shm_bytes}"],
                mount_point=GUEST_SHM,
            ),
        ],
        kernel_modules=[_kernel_module(words) for words in config.agent.kernel_modules],
    )
    await agent.create_sandbox(request)


def _kernel_module(words: str) -> agent_pb2.KernelModule:
    name, *parameters = words.split()
    return agent_pb2.KernelModule(name=name, parameters=parameters)
