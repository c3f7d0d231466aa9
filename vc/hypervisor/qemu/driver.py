"""Run a VM with QEMU: open what it needs, start it, watch it, end it.

All sockets are made here and handed over as descriptors: nothing has to be waited for, no path can be taken
by someone else in between, and QEMU opens nothing but the kernel, the initrd and the image.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import socket
import struct
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from vc.agent_client.transports import Address, SerialAddress, VsockAddress
from vc.background import background
from vc.blocking import enter
from vc.errors import HypervisorError, Unsupported
from vc.hypervisor.accelerator import KVM, KVM_DEVICE, TCG, settle, warn_once
from vc.hypervisor.base import (
    AUTO,
    HYBRID_VSOCK,
    VIRTIO_SERIAL,
    VSOCK,
    Capabilities,
    Device,
    Machine,
    VirtioFS,
    VMConfig,
)
from vc.hypervisor.children import Child, prefix, running
from vc.hypervisor.console import ConsoleTail
from vc.hypervisor.footprint import check_memory
from vc.hypervisor.groups import bring_here
from vc.hypervisor.jail import Jail, Needs
from vc.hypervisor.jail import jail as make_jail
from vc.hypervisor.lease import BACK_SEAT, LeasedChild, front_seat, keeper_of, leased, taken
from vc.hypervisor.parked import Parked, duplicate, with_descriptors
from vc.hypervisor.qemu import qmp
from vc.hypervisor.qemu.command import HOTPLUG_PORTS, Vsock, Wiring, command_line
from vc.hypervisor.qemu.hotplug import HotPlug
from vc.hypervisor.qemu.machines import machine_type
from vc.hypervisor.qemu.monitor import Monitor, monitoring
from vc.unixsock import connect_nowait, listen

log = logging.getLogger(__name__)

VHOST_VSOCK = Path("/dev/vhost-vsock")
VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60  # _IOW(VHOST_VIRTIO, 0x60, __u64): linux/vhost.h
MIN_CID, MAX_CID = 3, 0xFFFFFFFE  # 0 to 2 and the highest are special: vsock(7)
CID_ATTEMPTS = 64  # random ones; that this many are taken means that something else is wrong
READ_SIZE = 16384  # bytes
STATE_TIMEOUT = 20.0  # seconds to write or read a machine's state, which has some 100 KB without the memory
# The memory is in a file that we have, so it is left out of the state; and tell when it is done.
MIGRATION_CAPABILITIES = ("events", "x-ignore-shared")
LAST_EVENT_GRACE = 0.5  # seconds for QMP's last event after QEMU's death

NAME = "QEMU"
QMP_SOCKET = "qmp.sock"
AGENT_SOCKET = "agent.sock"


class QemuMachine(Machine):
    """A VM run by QEMU. Made by `launch`."""

    capabilities = Capabilities(shared_fs=True, block_device=True, hotplug=True, pause=True, snapshot=True)

    def __init__(self, child: Child, address: Address, console: socket.socket, config: VMConfig) -> None:
        """`console` is closed when its reader ends. What else is open belongs to the caller."""
        self.pid = child.pid
        self.address = address
        self.console = ConsoleTail(on_line=partial(log.debug, "vmconsole: %s") if config.debug else None)
        self.messages = child.stderr
        self._child = child
        self._console = console
        self._monitor: Monitor | None = None
        pcie = machine_type(config.arch, config.machine_type).pcie
        self._plugs = HotPlug(self._execute, root_ports=HOTPLUG_PORTS if pcie else 0)
        self._shutdown: qmp.Shutdown | None = None
        self._migrated: trio.Event = trio.Event()
        self._migration_completed = False
        self._dead = trio.Event()
        self._cause = ""

    def kill_nowait(self) -> None:
        """See `Machine.kill_nowait`."""
        self._child.kill_nowait()

    async def wait_ready(self) -> None:
        """See `Machine.wait_ready`."""
        await self._execute(qmp.query_status())

    async def pause(self) -> None:
        """See `Machine.pause`."""
        self.paused = True
        await self._execute(qmp.stop())

    async def resume(self) -> None:
        """See `Machine.resume`."""
        await self._execute(qmp.cont())
        self.paused = False

    async def wait_dead(self) -> str:
        """See `Machine.wait_dead`."""
        await self._dead.wait()
        return self._cause

    async def plug(self, device: Device) -> None:
        """See `Machine.plug`."""
        await self._plugs.plug(device)

    async def unplug(self, device: Device) -> None:
        """See `Machine.unplug`."""
        await self._plugs.unplug(device)

    async def save_state(self, descriptor: int) -> None:
        """See `Machine.save_state`."""
        await self._migrate(qmp.migrate("state"), "save", descriptor)

    async def load_state(self, descriptor: int) -> None:
        """See `Machine.load_state`."""
        await self._migrate(qmp.migrate_incoming("state"), "restore", descriptor)

    async def _migrate(self, command: qmp.Command, verb: str, descriptor: int) -> None:
        await self._execute(qmp.migrate_set_capabilities(*MIGRATION_CAPABILITIES))
        await self._execute(qmp.getfd("state"), descriptor=descriptor)
        await self._execute(command)
        with trio.move_on_after(STATE_TIMEOUT):
            async with background() as nursery:
                nursery.start_soon(self._end_migration_at_death)
                await self._migrated.wait()
        if not self._migration_completed:
            raise HypervisorError(f"QEMU did not {verb} the machine's state")

    async def _end_migration_at_death(self) -> None:
        await self._dead.wait()
        self._migrated.set()

    async def _execute(self, command: qmp.Command, *, descriptor: int | None = None) -> object:
        assert self._monitor is not None
        return await self._monitor.execute(command, descriptor=descriptor)

    def handle_event(self, event: qmp.Event) -> None:
        """Take note of what QEMU says."""
        if isinstance(event, qmp.Shutdown):
            self._shutdown = event
        elif isinstance(event, qmp.DeviceDeleted):
            self._plugs.handle_deleted(event)
        elif isinstance(event, qmp.GuestAnswer):
            self._plugs.handle_answer(event)
        elif isinstance(event, qmp.Migrated):
            self._migration_completed = event.completed
            self._migrated.set()

    def park(self, vmid: str, *, details: bytes, lock: int) -> Parked:
        """See `Machine.park`."""
        if not isinstance(self._child, LeasedChild):
            raise Unsupported(f"VM {vmid} was not started to be handed over")
        cid = self.address.cid if isinstance(self.address, VsockAddress) else None
        child = self._child
        try:
            front_seat(self.pid)
            copies = duplicate(child.lease, child.pidfd, child.stderr_fd, self._console.fileno(), lock)
        except OSError as exc:
            raise HypervisorError(f"VM {vmid} cannot be parked: {exc.strerror}") from exc
        child.parked = True
        return with_descriptors(copies, vmid=vmid, pid=self.pid, cid=cid, details=details)

    async def read_console(self) -> None:
        """Keep the tail of what the guest prints."""
        async with trio.SocketStream(trio.socket.from_stdlib_socket(self._console)) as stream:
            try:
                while data := await stream.receive_some(READ_SIZE):
                    self.console.feed(bytes(data))
            except trio.BrokenResourceError:
                pass  # QEMU died; `watch` tells

    def command_through(self, monitor: Monitor) -> None:
        """Give the machine the connection to its VMM."""
        self._monitor = monitor

    async def watch(self, monitor: Monitor) -> None:
        """Find out when and why the VMM died."""
        cause = await self._child.wait_dead()
        with trio.move_on_after(LAST_EVENT_GRACE):
            await monitor.ended.wait()
        if self._shutdown is not None:
            cause += f"; {qmp.describe_shutdown(self._shutdown)}"
        monitor.fail(cause)
        self.out_of_memory = self._child.out_of_memory
        self._cause = cause
        self._dead.set()
        self._plugs.end()


@asynccontextmanager
async def launch(
    config: VMConfig,
    *,
    vm_dir: Path,
    vmid: str,
    netns: str | None = None,
    devices: Iterable[VirtioFS] = (),
    memory: int | None = None,
    restored: bool = False,
    kept: bool = False,
) -> AsyncIterator[Machine]:
    """Run a VM as long as the block lasts. Returns when QEMU was started, not when the guest is up.

    `vm_dir` exists and is private; sockets made in it stay there. `netns` is the path of the network
    namespace QEMU runs in, "" for a new one, None for this one. What `devices` connect to must listen
    already. `memory` is the descriptor of a file of the memory's size that becomes the guest's memory. With
    `restored` the machine does not boot but waits for `load_state`. One that is `kept` can be parked.

    Raises:
        HypervisorError: something that QEMU needs cannot be opened or started.
        Unsupported: the description asks for what this host cannot do.
        InvalidArgument: the kernel does not fit into the memory.

    """
    check_memory(config.memory_mib, config.kernel, config.initrd)
    config = await _with_accelerator(config)
    async with AsyncExitStack() as stack:
        with ExitStack() as handed_over:  # what only QEMU keeps
            console, theirs = socket.socketpair()
            stack.callback(console.close)
            handed_over.callback(theirs.close)
            try:
                wiring, address = _open(config, vm_dir, devices, theirs, handed_over)
                wiring = replace(wiring, memory=memory, restored=restored)
                connection = connect_nowait(vm_dir / QMP_SOCKET)
            except OSError as exc:
                raise HypervisorError(f"cannot prepare VM {vmid} in {vm_dir}: {exc}") from exc
            stack.callback(connection.close)
            config, jail = await _enter_jail(stack, config, vmid=vmid, netns=netns)
            argv = command_line(config, wiring, vmid=vmid, uuid=str(uuid.uuid4()))
            argv = prefix(netns=netns, jail=jail) + argv
            descriptors = _descriptors(wiring)
            block: AbstractAsyncContextManager[Child] = (
                leased([*BACK_SEAT, *argv], name=NAME, vm_dir=vm_dir, pass_fds=descriptors)
                if kept
                else running(argv, name=NAME, pass_fds=descriptors)
            )
            child = await stack.enter_async_context(block)
        machine = QemuMachine(child, address, console, config)
        await stack.enter_async_context(_operated(machine, connection))
        yield machine


@asynccontextmanager
async def adopt(config: VMConfig, parked: Parked, *, vm_dir: Path) -> AsyncIterator[Machine]:
    """Go on with a VM that was parked, as long as the block lasts; it is paused.

    `vm_dir` is where the VM's sockets are now. The descriptors in `parked` stay the caller's.

    Raises: HypervisorError.
    """
    async with AsyncExitStack() as stack:
        block = taken(NAME, parked.pid, pidfd=parked.pidfd, lease=parked.lease, stderr=parked.stderr)
        child = await stack.enter_async_context(block)
        nursery = await stack.enter_async_context(background())
        # Nobody waits for it: to move a process takes the kernel some milliseconds for each hierarchy.
        nursery.start_soon(trio.to_thread.run_sync, bring_here, parked.pid, keeper_of(parked.pid))
        try:
            console = stack.enter_context(socket.socket(fileno=os.dup(parked.console)))
            connection = stack.enter_context(connect_nowait(vm_dir / QMP_SOCKET))
        except OSError as exc:
            raise HypervisorError(f"cannot reach the VMM of VM {parked.vmid} in {vm_dir}: {exc}") from exc
        address = SerialAddress(vm_dir / AGENT_SOCKET) if parked.cid is None else VsockAddress(parked.cid)
        machine = QemuMachine(child, address, console, config)
        machine.paused = True
        await stack.enter_async_context(_operated(machine, connection))
        yield machine


@asynccontextmanager
async def _operated(machine: QemuMachine, connection: socket.socket) -> AsyncIterator[None]:
    """Attend to a machine whose VMM runs; `connection` is to its monitor."""
    async with background() as nursery, monitoring(connection, machine.handle_event) as monitor:
        machine.command_through(monitor)
        nursery.start_soon(machine.read_console)
        nursery.start_soon(machine.watch, monitor)
        try:
            yield
        finally:
            machine.kill_nowait()  # the first thing to happen at the end: all else follows from it


async def _enter_jail(
    stack: AsyncExitStack, config: VMConfig, *, vmid: str, netns: str | None
) -> tuple[VMConfig, Jail | None]:
    """Make the VMM a jail, unless it is not to have one; return the description that is true in it."""
    if not config.rootless or os.geteuid() != 0:
        return config, None
    config = resolved(config)
    return config, await enter(stack, make_jail(vmid, needs_of(config), netns=netns))


def resolved(config: VMConfig) -> VMConfig:
    """Name the files without symbolic links, which would lead elsewhere in another root directory."""
    return replace(
        config,
        qemu=config.qemu.resolve(),
        kernel=config.kernel.resolve(),
        initrd=config.initrd and config.initrd.resolve(),
        image=config.image and config.image.resolve(),
    )


def needs_of(config: VMConfig) -> Needs:
    """Return what QEMU opens by path; all else it is given as descriptors."""
    devices = [Path("/dev/null"), config.entropy_source, *([KVM_DEVICE] if config.accelerator == KVM else [])]
    files = [path for path in (config.kernel, config.initrd, config.image) if path is not None]
    return Needs(program=config.qemu, files=tuple(files), devices=tuple(dict.fromkeys(devices)))


async def _with_accelerator(config: VMConfig) -> VMConfig:
    """Decide "auto". In a thread, because a trial machine may be run."""
    settled, choice = await trio.to_thread.run_sync(settle, config)
    if choice.accelerator == TCG and config.accelerator == AUTO:
        warn_once(choice.reasons)
    return settled


def agent_transport(requested: str, *, has_vsock: bool) -> str:
    """Decide how the agent is reached. Raises: Unsupported."""
    if requested == HYBRID_VSOCK:
        raise Unsupported('agent_transport = "hybrid-vsock": QEMU has no such device of its own; use "auto"')
    if requested == VSOCK and not has_vsock:
        raise Unsupported(
            f'agent_transport = "vsock": {VHOST_VSOCK} does not exist;'
            ' load the module vhost_vsock or use "auto"'
        )
    if requested == AUTO:
        return VSOCK if has_vsock else VIRTIO_SERIAL
    return requested


def _open(
    config: VMConfig, vm_dir: Path, devices: Iterable[VirtioFS], console: socket.socket, stack: ExitStack
) -> tuple[Wiring, Address]:
    """Open everything that goes to QEMU by descriptor; `stack` closes our copies."""
    qmp_listener = stack.enter_context(listen(vm_dir / QMP_SOCKET))
    shares = []
    for device in devices:
        connection = stack.enter_context(connect_nowait(device.socket_path))
        shares.append((device, connection.fileno()))
    wiring = Wiring(qmp=qmp_listener.fileno(), console=console.fileno(), shares=tuple(shares))
    if agent_transport(config.agent_transport, has_vsock=VHOST_VSOCK.exists()) == VSOCK:
        vsock = _reserve_cid(stack)
        return replace(wiring, vsock=vsock), VsockAddress(vsock.cid)
    agent = stack.enter_context(listen(vm_dir / AGENT_SOCKET))
    return replace(wiring, agent=agent.fileno()), SerialAddress(vm_dir / AGENT_SOCKET)


def _descriptors(wiring: Wiring) -> list[int]:
    found = [wiring.qmp, wiring.console, *(descriptor for _, descriptor in wiring.shares)]
    if wiring.agent is not None:
        found.append(wiring.agent)
    if wiring.vsock is not None:
        found.append(wiring.vsock.descriptor)
    if wiring.memory is not None:
        found.append(wiring.memory)
    return found


def _reserve_cid(stack: ExitStack) -> Vsock:
    """Take a context id that no other VM of this host has; it is ours while the descriptor is open."""
    descriptor = os.open(VHOST_VSOCK, os.O_RDWR | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)
    for _ in range(CID_ATTEMPTS):
        cid = random.randint(MIN_CID, MAX_CID)  # noqa: S311 - to be free is enough
        try:
            fcntl.ioctl(descriptor, VHOST_VSOCK_SET_GUEST_CID, struct.pack("@Q", cid))
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise
        else:
            return Vsock(descriptor=descriptor, cid=cid)
    raise HypervisorError(f"{VHOST_VSOCK}: {CID_ATTEMPTS} random context ids were all taken")
