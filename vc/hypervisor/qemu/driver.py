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
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
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
    VMConfig,
)
from vc.hypervisor.children import Child, prefix, running
from vc.hypervisor.console import ConsoleTail
from vc.hypervisor.jail import Jail, Needs
from vc.hypervisor.jail import jail as make_jail
from vc.hypervisor.qemu import qmp
from vc.hypervisor.qemu.command import HOTPLUG_PORTS, SHARE_EVENT_IDX, Vsock, Wiring, command_line
from vc.hypervisor.qemu.machines import machine_type
from vc.hypervisor.qemu.monitor import Monitor, monitoring
from vc.unixsock import connect_nowait, listen

log = logging.getLogger(__name__)

VHOST_VSOCK = Path("/dev/vhost-vsock")
VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60  # _IOW(VHOST_VIRTIO, 0x60, __u64): linux/vhost.h
MIN_CID, MAX_CID = 3, 0xFFFFFFFE  # 0 to 2 and the highest are special: vsock(7)
CID_ATTEMPTS = 64  # random ones; that this many are taken means that something else is wrong
READ_SIZE = 16384  # bytes
DELETE_TIMEOUT = 10.0  # seconds for the guest to give a device back
STATE_TIMEOUT = 20.0  # seconds to write or read a machine's state, which has some 100 KB without the memory
# The memory is in a file that we have, so it is left out of the state; and tell when it is done.
MIGRATION_CAPABILITIES = ("events", "x-ignore-shared")
LAST_EVENT_GRACE = 0.5  # seconds for QMP's last event after QEMU's death

QMP_SOCKET = "qmp.sock"
AGENT_SOCKET = "agent.sock"


class QemuMachine(Machine):
    """A VM run by QEMU. Made by `launch`."""

    capabilities = Capabilities(shared_fs=True, block_device=True, hotplug=True, pause=True, snapshot=True)

    def __init__(self, child: Child, address: Address, *, root_ports: int, log_console: bool) -> None:
        self.pid = child.pid
        self.address = address
        self.console = ConsoleTail(on_line=partial(log.debug, "vmconsole: %s") if log_console else None)
        self.messages = child.stderr
        self._child = child
        self._monitor: Monitor | None = None
        self._free_ports = list(range(root_ports))
        self._ports: dict[Device, int] = {}
        self._deleted: dict[str, trio.Event] = {}
        self._shutdown: qmp.Shutdown | None = None
        self._migrated: trio.Event = trio.Event()
        self._migration_completed = False
        self._dead = trio.Event()
        self._cause = ""

    def kill_nowait(self) -> None:
        """See `Machine.kill_nowait`."""
        self._child.kill_nowait()

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
        if not self._free_ports:
            raise Unsupported(f"no free place to plug {device}: all root ports of the machine are taken")
        port = self._free_ports.pop(0)
        chardev = f"hot{port}-socket"
        async with AsyncExitStack() as undo:
            undo.callback(self._free_ports.insert, 0, port)
            with connect_nowait(device.socket_path) as connection:
                await self._execute(qmp.getfd(chardev), descriptor=connection.fileno())
            await self._execute(qmp.chardev_add_socket(chardev, chardev))
            undo.push_async_callback(self._execute, qmp.chardev_remove(chardev))
            properties: dict[str, object] = {"chardev": chardev, "tag": device.tag}
            properties |= {"queue-size": device.queue_size, "event_idx": SHARE_EVENT_IDX}
            await self._execute(qmp.device_add("vhost-user-fs-pci", f"hot{port}", f"port{port}", properties))
            undo.pop_all()
        self._ports[device] = port

    async def unplug(self, device: Device) -> None:
        """See `Machine.unplug`."""
        port = self._ports[device]
        deleted = self._deleted[f"hot{port}"] = trio.Event()
        await self._execute(qmp.device_del(f"hot{port}"))
        with trio.move_on_after(DELETE_TIMEOUT):
            await deleted.wait()
        if not deleted.is_set():
            raise HypervisorError(f"the guest does not give back {device} within {DELETE_TIMEOUT:g} s")
        await self._execute(qmp.chardev_remove(f"hot{port}-socket"))
        del self._ports[device], self._deleted[f"hot{port}"]
        self._free_ports.append(port)

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
        elif isinstance(event, qmp.DeviceDeleted) and event.device in self._deleted:
            self._deleted[event.device].set()
        elif isinstance(event, qmp.Migrated):
            self._migration_completed = event.completed
            self._migrated.set()

    async def read_console(self, connection: socket.socket) -> None:
        """Keep the tail of what the guest prints."""
        async with trio.SocketStream(trio.socket.from_stdlib_socket(connection)) as stream:
            try:
                while data := await stream.receive_some(READ_SIZE):
                    self.console.feed(bytes(data))
            except trio.BrokenResourceError:
                pass  # QEMU died; `watch` tells

    async def watch(self, monitor: Monitor) -> None:
        """Find out when and why the VMM died."""
        self._monitor = monitor
        cause = await self._child.wait_dead()
        with trio.move_on_after(LAST_EVENT_GRACE):
            await monitor.ended.wait()
        if self._shutdown is not None:
            cause += f"; {qmp.describe_shutdown(self._shutdown)}"
        monitor.fail(cause)
        self.out_of_memory = self._child.out_of_memory
        self._cause = cause
        self._dead.set()


@asynccontextmanager
async def launch(
    config: VMConfig,
    *,
    vm_dir: Path,
    vmid: str,
    netns: str | None = None,
    devices: Iterable[Device] = (),
    memory: int | None = None,
    restored: bool = False,
) -> AsyncIterator[Machine]:
    """Run a VM as long as the block lasts. Returns when QEMU was started, not when the guest is up.

    `vm_dir` exists and is private; sockets made in it stay there. `netns` is the path of the network
    namespace QEMU runs in, "" for a new one, None for this one. What `devices` connect to must listen
    already. `memory` is the descriptor of a file of the memory's size that becomes the guest's memory. With
    `restored` the machine does not boot but waits for `load_state`.

    Raises:
        HypervisorError: something that QEMU needs cannot be opened or started.
        Unsupported: the description asks for what this host cannot do.

    """
    config = await _with_accelerator(config)
    row = machine_type(config.arch, config.machine_type)
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
            jail = await _enter_jail(stack, config, vmid=vmid, netns=netns)
            argv = command_line(config, wiring, vmid=vmid, uuid=str(uuid.uuid4()))
            argv = prefix(netns=netns, jail=jail) + argv
            child = await stack.enter_async_context(running(argv, name="QEMU", pass_fds=_descriptors(wiring)))
        ports = HOTPLUG_PORTS if row.pcie else 0
        machine = QemuMachine(child, address, root_ports=ports, log_console=config.debug)
        nursery = await stack.enter_async_context(background())
        monitor = await stack.enter_async_context(monitoring(connection, machine.handle_event))
        nursery.start_soon(machine.read_console, console)
        nursery.start_soon(machine.watch, monitor)
        stack.callback(child.kill_nowait)  # the first thing to happen at the end: all else follows from it
        yield machine


async def _enter_jail(
    stack: AsyncExitStack, config: VMConfig, *, vmid: str, netns: str | None
) -> Jail | None:
    """Make the VMM a jail, unless it is not to have one."""
    if not config.rootless or os.geteuid() != 0:
        return None
    devices = [Path("/dev/null"), config.entropy_source, *([KVM_DEVICE] if config.accelerator == KVM else [])]
    files = [path for path in (config.kernel, config.initrd, config.image) if path is not None]
    needs = Needs(program=config.qemu, files=tuple(files), devices=tuple(dict.fromkeys(devices)))
    return await enter(stack, make_jail(vmid, needs, netns=netns))


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
    config: VMConfig, vm_dir: Path, devices: Iterable[Device], console: socket.socket, stack: ExitStack
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
