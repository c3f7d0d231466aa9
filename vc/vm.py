"""A VM: the machine, the file system it shares, and the agent in its guest, from boot to death.

It need not boot for that: see `vc.beginning`. Whoever uses it sees no difference but the time that it takes.

`boot_vm` starts everything at once and lets the pieces wait for each other: virtiofsd and QEMU start side by
side, QMP connects in a thread, and the agent's first words are answered the moment they come. When the VMM or
virtiofsd dies, every call to the agent fails with the cause; the block itself goes on, because only its owner
knows what has to be told to whom first.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import trio

from protos.kata import agent_pb2
from vc import timeline
from vc.agent_client.client import CHECK_TIMEOUT, AgentClient, together
from vc.agent_client.transports import Transport, open_transport
from vc.background import background
from vc.beginning import Beginning, Boot, VMDirectory
from vc.errors import GuestGone, HypervisorError, VCError
from vc.hypervisor.base import Machine, VMConfig
from vc.hypervisor.parked import Parked
from vc.monitor import HealthCheck, wait_hung
from vc.persist.store import Layout
from vc.spare import spare_descriptors
from vc.storage.sharedfs import SOCKET as VIRTIOFS_SOCKET
from vc.storage.sharedfs import SharedFS, virtiofsd

log = logging.getLogger(__name__)

CONSOLE_LINES = 8  # at the end of an error
KERNEL_PANIC = "Kernel panic - not syncing"  # Linux, kernel/panic.c
KERNEL_FAULTS = ("kernel BUG at ", "BUG: ", "Oops: ")  # Linux, lib/bug.c, arch/x86/mm/fault.c, dumpstack.c
# virtiofsd ends when QEMU does, sometimes a little earlier than QEMU's death is known. It is the culprit
# only if QEMU is alive after this time.
BLAME_GRACE = 0.5  # seconds
SEED_BYTES = 512  # of the host's randomness for a restored guest: as much as Kata gives


@dataclass(frozen=True, slots=True)
class BootTimes:
    """Seconds from the call of `boot_vm` until each step was done."""

    launched: float  # virtiofsd and the VMM were started
    reached: float  # the guest answered
    ready: float  # its agent served


class VM:
    """One running VM. Made by `boot_vm`, or by a factory."""

    transport: Transport
    agent: AgentClient
    details: agent_pb2.GuestDetailsResponse
    times: BootTimes

    def __init__(self, vmid: str, machine: Machine, directory: VMDirectory) -> None:
        self.vmid = vmid
        self.machine = machine
        self._directory = directory
        self.cause = ""  # of its end, with what the guest printed last
        self.gone: GuestGone | None = None
        self.booting = trio.CancelScope()
        self._connected = trio.CancelScope()
        self._disconnected = trio.Event()
        self._gone = trio.Event()
        self._agents: list[AgentClient] = []

    async def wait_gone(self) -> GuestGone:
        """Block until the VM is dead; return an error that says why."""
        await self._gone.wait()
        return GuestGone(str(self.gone))

    async def disconnect(self) -> None:
        """Hang up on the agent, which waits for a new connection then. Calls to it fail from here on."""
        self._connected.cancel()
        await self._disconnected.wait()

    async def park(self) -> Parked:
        """Pause the VM and make it outlive the block, which is to be left at once; the caller owns it then.

        Only for a VM that was begun as `kept`, and has nothing shared.

        Raises: HypervisorError, Unsupported.
        """
        await self.disconnect()
        await self.machine.pause()
        lock = self._directory.lock.fileno()
        parked = self.machine.park(self.vmid, details=self.details.SerializeToString(), lock=lock)
        self._directory.parked = True
        return parked

    async def connect(
        self,
        began: float,
        details: agent_pb2.GuestDetailsResponse | None,
        *,
        task_status: trio.TaskStatus[None],
    ) -> None:
        """Reach the agent, report started when it serves, and hold the connection until `disconnect`.

        With its `details` the guest is one that has run before.
        """
        try:
            with self._connected:
                await _serve_agent(self, began, details, task_status=task_status)
        finally:
            self._disconnected.set()

    def adopt(self, agent: AgentClient) -> None:
        """Make the VM's death the end of all calls to this agent."""
        self._agents.append(agent)
        if self.gone is not None:
            agent.fail(self.gone)

    def die(self, cause: str) -> None:
        """Take the VM for dead, and see to it that it is. The first cause stays.

        A guest that is only cut off from us must not go on writing to what it shares with the host.
        """
        if self.gone is None:
            self.cause = with_console(cause, self.machine)
            self.gone = GuestGone(f"VM {self.vmid} is gone: {self.cause}")
            self._gone.set()
            self.booting.cancel()
            for agent in self._agents:
                agent.fail(self.gone)
            self.machine.kill_nowait()

    async def watch_health(self, check: HealthCheck) -> None:
        """Notice that the guest hangs."""

        async def ask(timeout: float) -> None:
            await self.agent.check(timeout=timeout)

        if cause := await wait_hung(check, ask, lambda: self.machine.paused):
            self.die(cause)

    async def watch_machine(self) -> None:
        """Notice the death of the VMM."""
        self.die(await self.machine.wait_dead())

    async def watch_share(self, share: SharedFS) -> None:
        """Notice the death of virtiofsd, without which the guest has no files."""
        cause = await share.wait_dead()
        with trio.move_on_after(BLAME_GRACE):
            await self._gone.wait()
        self.die(cause)


def with_console(cause: str, machine: Machine) -> str:
    """Add to a cause what the guest printed last, if it printed anything."""
    return f"{cause}; {console_tail(machine)}" if machine.console.lines() else cause


def console_tail(machine: Machine) -> str:
    """Say what the guest printed last."""
    lines = machine.console.lines()
    panics = [index for index, line in enumerate(lines) if KERNEL_PANIC in line]
    if panics:
        lines = lines[: panics[-1] + 1]  # what follows is a register dump
    if not lines:
        return "the guest printed nothing on its console"
    tail = lines[-CONSOLE_LINES:]
    # Of a fault the first lines say most, and they are far above the panic that it ends in.
    faults = [line for line in lines[:-CONSOLE_LINES] if any(mark in line for mark in KERNEL_FAULTS)]
    return "last console lines: " + " | ".join(line.strip() for line in (*faults[:1], *tail))


@asynccontextmanager
async def boot_vm(
    config: VMConfig,
    *,
    vmid: str,
    netns: str | None = None,
    shared_dir: Path | None = None,
    beginning: Beginning | None = None,
) -> AsyncIterator[VM]:
    """Run a VM, by default one that boots, and wait until its agent serves.

    It is ended, and nothing is left of it, when the block ends, unless it was parked. `netns`: see `launch`.
    `shared_dir` is what the guest can mount, if the configuration shares anything.

    Raises:
        HypervisorError: it did not boot; the text says at which step, after how long, why, and what to do.
        Unsupported: the configuration asks for what this host cannot do.

    """
    began = trio.current_time()
    beginning = beginning or Boot()
    async with AsyncExitStack() as stack, spare_descriptors():
        directory = _directory(beginning, Layout(config.run_dir).vm(vmid))
        stack.callback(directory.give_back)
        share = await _share(stack, config, shared_dir, directory.path)
        devices = [] if share is None else [share.device]
        try:
            machine = await stack.enter_async_context(
                beginning.machine(config, vm_dir=directory.path, vmid=vmid, netns=netns, devices=devices)
            )
        except HypervisorError as exc:
            raise await _launch_error(vmid, share, exc) from exc
        launched = trio.current_time() - began
        timeline.mark("vmm launched")
        vm = VM(vmid, machine, directory)
        nursery = await stack.enter_async_context(background())
        nursery.start_soon(vm.watch_machine)
        if share is not None:
            nursery.start_soon(vm.watch_share, share)
        vm.booting.deadline = began + config.dial_timeout
        try:
            with vm.booting:
                await beginning.wake(machine, devices)
                await nursery.start(vm.connect, began, beginning.details)
        except VCError as exc:
            raise await _boot_error(
                vm, config, share, beginning, str(exc), trio.current_time() - began
            ) from exc
        if vm.booting.cancelled_caught:
            raise await _boot_error(vm, config, share, beginning, "", trio.current_time() - began)
        vm.times = replace(vm.times, launched=launched)
        log.info("VM %s serves: %s", vmid, vm.times)
        yield vm


def _directory(beginning: Beginning, path: Path) -> VMDirectory:
    try:
        return beginning.directory(path)
    except OSError as exc:
        raise HypervisorError(f"cannot make the directory {path} of VM {path.name}: {exc.strerror}") from exc


async def _share(
    stack: AsyncExitStack, config: VMConfig, shared_dir: Path | None, vm_dir: Path
) -> SharedFS | None:
    """Start virtiofsd, if anything is to be shared. Raises: HypervisorError."""
    if config.shared_fs is None or shared_dir is None:
        return None
    return await stack.enter_async_context(virtiofsd(config.shared_fs, shared_dir, vm_dir / VIRTIOFS_SOCKET))


async def _refresh(agent: AgentClient) -> None:
    """Make a guest differ from all others that go on from the same state, and tell it the time."""
    now = time.time_ns() // 1000
    await together(
        partial(agent.reseed_random, secrets.token_bytes(SEED_BYTES)),
        partial(agent.set_clock, now // 1_000_000, now % 1_000_000),
    )


async def _serve_agent(
    vm: VM,
    began: float,
    details: agent_pb2.GuestDetailsResponse | None,
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    async with open_transport(vm.machine.address, timeout=math.inf) as transport:
        reached = trio.current_time() - began
        timeline.mark("agent reached")
        vm.transport = transport
        vm.agent = AgentClient(transport)
        vm.adopt(vm.agent)
        async with background() as nursery:
            await nursery.start(vm.agent.run)
            timeline.mark("agent connected")
            if details is None:
                await vm.agent.check(timeout=CHECK_TIMEOUT)
                vm.details = await vm.agent.get_guest_details()
            else:
                await _refresh(vm.agent)
                vm.details = details
            vm.times = BootTimes(launched=0.0, reached=reached, ready=trio.current_time() - began)
            task_status.started()
            failure = await vm.agent.wait_failed()
            vm.die(str(failure))  # a guest whose agent is gone is no use, whatever else lives
            await trio.sleep_forever()  # the owner may still read from streams


async def _launch_error(vmid: str, share: SharedFS | None, error: HypervisorError) -> HypervisorError:
    """Name the cause of a machine that could not be started: a virtiofsd that ended refuses connections."""
    if share is not None:
        with trio.move_on_after(BLAME_GRACE):
            cause = await share.wait_dead()
            if share.failed:  # else it only ended because QEMU's end of the connection was closed
                return HypervisorError(f"VM {vmid} cannot be started: {cause}; check virtio_fs_daemon")
    return error


async def _boot_error(
    vm: VM, config: VMConfig, share: SharedFS | None, beginning: Beginning, problem: str, elapsed: float
) -> HypervisorError:
    """Say what is known of a boot that failed: whoever noticed first may not know the cause."""
    if problem and vm.gone is None:
        with trio.move_on_after(BLAME_GRACE):
            await vm.wait_gone()
    kind = beginning.failure
    if vm.gone is not None and share is not None and share.failed:
        kind = HypervisorError
        # A QEMU without its virtiofsd ends as well.
        why = f"after {elapsed:.1f} s: {with_console(await share.wait_dead(), vm.machine)}"
        advice = "check virtio_fs_daemon in the configuration"
    elif vm.gone is not None:
        why = f"after {elapsed:.1f} s: {vm.cause}"
        advice = "check kernel, initrd, image and path in the configuration"
    else:
        problem = problem or "its agent does not answer"
        said = vm.machine.messages.last(CONSOLE_LINES)
        why = f"after {elapsed:.1f} s: {problem}; {console_tail(vm.machine)}" + (said and f"; VMM: {said}")
        advice = (
            "check that the image or initrd has the agent, or raise dial_timeout"
            f" ({config.dial_timeout:g} s) on a slow host; enable_debug logs the whole console"
        )
    return kind(f"VM {vm.vmid} did not boot {why}; {advice}")
