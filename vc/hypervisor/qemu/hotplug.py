"""Devices of a running machine: plugged by QMP, accepted by the guest, taken away again.

What belongs on the PCI bus goes into a free root port, of which a machine has a few; memory and processors
have places of their own, which the command line reserved. The rule: what cannot be plugged as a whole is
taken back as a whole, and a guest that has to take part has done so when `plug` returns.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import trio

from vc.errors import HypervisorError, Unsupported
from vc.hypervisor.base import Device, Disk, MemoryModule, Processor, VirtioFS
from vc.hypervisor.qemu import qmp
from vc.hypervisor.qemu.command import SHARE_EVENT_IDX
from vc.unixsock import connect_nowait

DELETE_TIMEOUT = 10.0  # seconds for the guest to give a device back
ACCEPT_TIMEOUT = 20.0  # seconds for the guest to take memory or a processor; emulated and busy, it takes one
OST_SUCCESS = 0  # ACPI specification 6.5, section 6.3.5, "_OST"
MIB = 1 << 20


class Execute(Protocol):
    """The driver's way to QEMU."""

    def __call__(self, command: qmp.Command, *, descriptor: int | None = None) -> Awaitable[object]:
        """Give QEMU a command and return its answer. Raises: HypervisorError."""


@dataclass(slots=True)
class _Answer:
    """What we wait for: the guest's word on one device."""

    given: trio.Event = field(default_factory=trio.Event)
    status: int | None = None  # of _OST; None as long as it has said nothing


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a device is, and what is to be removed after it."""

    port: int
    back_end: qmp.Command


class HotPlug:
    """What was plugged into one machine, and where."""

    def __init__(self, execute: Execute, *, root_ports: int) -> None:
        self._execute = execute
        self._free_ports = list(range(root_ports))
        self._places: dict[Device, _Place] = {}
        self._deleted: dict[str, trio.Event] = {}
        self._answers: dict[str, _Answer] = {}

    # Events

    def handle_deleted(self, event: qmp.DeviceDeleted) -> None:
        """Take note of a device that is gone."""
        if event.device in self._deleted:
            self._deleted[event.device].set()

    def handle_answer(self, event: qmp.GuestAnswer) -> None:
        """Take note of what the guest did with a device."""
        if (answer := self._answers.get(event.device)) is not None:
            answer.status = event.status
            answer.given.set()

    def end(self) -> None:
        """Let nobody wait for a guest that is gone."""
        for answer in self._answers.values():
            answer.given.set()
        for deleted in self._deleted.values():
            deleted.set()

    # Plug

    async def plug(self, device: Device) -> None:
        """See `Machine.plug`."""
        match device:
            case MemoryModule():
                await self._plug_memory(device)
            case Processor():
                await self._plug_processor(device)
            case VirtioFS() | Disk():  # a network interface will be the third, with a tap as its back end
                await self._plug_port(device)

    async def _plug_port(self, device: VirtioFS | Disk) -> None:
        if not self._free_ports:
            raise Unsupported(f"no free place to plug {device}: all root ports of the machine are taken")
        port = self._free_ports.pop(0)
        async with AsyncExitStack() as undo:
            undo.callback(self._free_ports.insert, 0, port)
            properties: dict[str, object] = {"bus": f"port{port}"}
            if isinstance(device, VirtioFS):
                driver, remove = "vhost-user-fs-pci", qmp.chardev_remove(f"hot{port}-socket")
                await self._open_share(device, f"hot{port}-socket")
                properties |= {"chardev": f"hot{port}-socket", "tag": device.tag}
                properties |= {"queue-size": device.queue_size, "event_idx": SHARE_EVENT_IDX}
            else:
                driver, remove = "virtio-blk-pci", qmp.blockdev_del(f"hot{port}-disk")
                await self._open_disk(device, f"hot{port}-disk", port)
                properties |= {"drive": f"hot{port}-disk", "serial": device.serial, "disable-legacy": "on"}
            undo.push_async_callback(self._execute, remove)
            await self._execute(qmp.device_add(driver, f"hot{port}", properties))
            undo.pop_all()
        self._places[device] = _Place(port, remove)

    async def _open_share(self, share: VirtioFS, chardev: str) -> None:
        try:
            connection = connect_nowait(share.socket_path)
        except OSError as exc:
            raise HypervisorError(f"{str(share.socket_path)!r} cannot be plugged: {exc.strerror}") from exc
        with connection:
            await self._execute(qmp.getfd(chardev), descriptor=connection.fileno())
        await self._execute(qmp.chardev_add_socket(chardev, chardev))

    async def _open_disk(self, disk: Disk, node: str, fdset: int) -> None:
        """Open it here: QEMU has no right to."""
        try:
            file = os.open(disk.path, (os.O_RDONLY if disk.read_only else os.O_RDWR) | os.O_CLOEXEC)
        except OSError as exc:
            raise HypervisorError(f"{str(disk.path)!r} cannot be plugged: {exc.strerror}") from exc
        try:
            await self._execute(qmp.add_fd(fdset), descriptor=file)
            try:
                block = stat.S_ISBLK(os.fstat(file).st_mode)
                await self._execute(qmp.blockdev_add(node, fdset, block=block, read_only=disk.read_only))
            finally:
                with trio.CancelScope(shield=True):  # every command ends by itself
                    await self._execute(qmp.remove_fd(fdset))  # the block device has its own copy
        finally:
            os.close(file)

    async def _plug_memory(self, module: MemoryModule) -> None:
        name, memory = f"dimm-{module.name}", f"memory-{module.name}"
        async with AsyncExitStack() as undo:
            # Shared, as the memory from the start is: virtiofsd gets to know of it by vhost-user.
            await self._execute(qmp.object_add_memfd(memory, module.size_mib * MIB))
            undo.push_async_callback(self._execute, qmp.object_del(memory))
            with self._asked(name) as answer:
                await self._execute(qmp.device_add("pc-dimm", name, {"memdev": memory}))
                undo.pop_all()  # what the guest has seen is the guest's
                await self._accepted(answer, f"{module.size_mib} MiB of memory")

    async def _plug_processor(self, processor: Processor) -> None:
        slots = qmp.parse_free_processors_untrusted(await self._execute(qmp.query_hotpluggable_cpus()))
        if not slots:
            raise Unsupported("no further processor can be plugged: the machine has all that it may have")
        driver, place = slots[0]
        name = f"cpu-{processor.name}"
        with self._asked(name) as answer:
            await self._execute(qmp.device_add(driver, name, place))
            await self._accepted(answer, "a processor")

    @contextmanager
    def _asked(self, name: str) -> Iterator[_Answer]:
        answer = self._answers[name] = _Answer()
        try:
            yield answer
        finally:
            del self._answers[name]

    async def _accepted(self, answer: _Answer, what: str) -> None:
        with trio.move_on_after(ACCEPT_TIMEOUT):
            await answer.given.wait()
        if answer.status is None:
            raise HypervisorError(
                f"the guest does not take {what} within {ACCEPT_TIMEOUT:g} s; its kernel needs ACPI hot-plug"
            )
        if answer.status != OST_SUCCESS:
            raise HypervisorError(f"the guest refuses {what}: status {answer.status} of _OST")

    # Unplug

    async def unplug(self, device: Device) -> None:
        """See `Machine.unplug`."""
        place = self._places.get(device)
        if place is None:
            raise Unsupported(f"{device} is not taken away from a running guest")
        name = f"hot{place.port}"
        deleted = self._deleted[name] = trio.Event()
        await self._execute(qmp.device_del(name))
        with trio.move_on_after(DELETE_TIMEOUT):
            await deleted.wait()
        if not deleted.is_set():
            raise HypervisorError(f"the guest does not give back {device} within {DELETE_TIMEOUT:g} s")
        await self._execute(place.back_end)
        del self._places[device], self._deleted[name]
        self._free_ports.append(place.port)
