"""How a VM begins: it boots, it goes on from a saved state, or it goes on where its last owner left it.

`vc.vm.boot_vm` runs a VM the same way whichever it was. What differs is here: where the VM's directory comes
from, how its machine comes to be, and what is to be done before the guest runs.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio
from google.protobuf.message import DecodeError

from protos.kata import agent_pb2
from vc import timeline
from vc.background import background
from vc.errors import HypervisorError, NotRestored
from vc.hypervisor.base import Machine, VirtioFS, VMConfig
from vc.hypervisor.parked import Parked
from vc.hypervisor.qemu.driver import adopt, launch
from vc.persist.store import VMM_NAME, SandboxLock, check_ours, make_private


class VMDirectory:
    """The directory of a VM's sockets. Whoever gets its lock knows that its owner is gone."""

    def __init__(self, path: Path, lock: SandboxLock) -> None:
        self.path = path
        self.lock = lock
        self.parked = False  # it gets another owner

    def give_back(self) -> None:
        """Remove it, unless it gets another owner."""
        if not self.parked:
            shutil.rmtree(self.path, ignore_errors=True)
        self.lock.release()  # last, so that the directory never lacks an owner


class Beginning(ABC):
    """One way to begin."""

    failure: type[HypervisorError] = HypervisorError  # what it is if no VM comes out of a machine that runs
    details: (
        agent_pb2.GuestDetailsResponse | None
    )  # what the guest said about itself; None if it is to be asked

    @abstractmethod
    def machine(
        self, config: VMConfig, *, vm_dir: Path, vmid: str, netns: str | None, devices: Sequence[VirtioFS]
    ) -> AbstractAsyncContextManager[Machine]:
        """Run the machine. What is in `devices` listens already. Raises: HypervisorError, Unsupported."""

    @abstractmethod
    async def wake(self, machine: Machine, devices: Sequence[VirtioFS]) -> None:
        """See to it that the guest runs and has the devices. Raises: HypervisorError, Unsupported."""

    def directory(self, path: Path) -> VMDirectory:
        """Make the VM's directory, or bring it to its place. Raises: OSError."""
        make_private(path.parent)
        check_ours(path.parent)
        path.mkdir(mode=0o700)
        try:
            lock = SandboxLock(path)
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            raise
        lock.acquire_nowait()
        return VMDirectory(path, lock)


class Boot(Beginning):
    """The machine is switched on."""

    details = None

    def __init__(self, *, memory: int | None = None, kept: bool = False) -> None:
        """`memory`: see `launch`. A VM that is `kept` can be parked."""
        self._memory = memory
        self._kept = kept

    def machine(
        self, config: VMConfig, *, vm_dir: Path, vmid: str, netns: str | None, devices: Sequence[VirtioFS]
    ) -> AbstractAsyncContextManager[Machine]:
        """See `Beginning.machine`."""
        return launch(
            config,
            vm_dir=vm_dir,
            vmid=vmid,
            netns=netns,
            devices=devices,
            memory=self._memory,
            kept=self._kept,
        )

    async def wake(self, machine: Machine, devices: Sequence[VirtioFS]) -> None:
        """Do nothing: it was started with everything and runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What a VM needs to go on from where another one was saved. The descriptors stay the caller's."""

    memory: int  # the descriptor of a file that becomes the guest's memory
    load_memory: Callable[[], object]  # fills it; blocks. Raises: OSError
    state: int  # the descriptor of the machine's saved state
    details: agent_pb2.GuestDetailsResponse


class Restore(Beginning):
    """Another VM's memory and state are loaded into a machine that was started for that."""

    def __init__(self, snapshot: Snapshot, *, kept: bool = False) -> None:
        """A VM that is `kept` can be parked."""
        self.details = snapshot.details
        self._snapshot = snapshot
        self._kept = kept
        self._loaded = trio.Event()
        self._problem: OSError | None = None

    @asynccontextmanager
    async def machine(
        self, config: VMConfig, *, vm_dir: Path, vmid: str, netns: str | None, devices: Sequence[VirtioFS]
    ) -> AsyncIterator[Machine]:
        """See `Beginning.machine`. A machine with a share in it cannot be saved, so it has no devices yet.

        The memory is loaded meanwhile: that takes about as long as the VMM takes to start.
        """
        async with background() as nursery:
            nursery.start_soon(self._load)
            async with launch(
                config,
                vm_dir=vm_dir,
                vmid=vmid,
                netns=netns,
                memory=self._snapshot.memory,
                restored=True,
                kept=self._kept,
            ) as machine:
                yield machine

    async def _load(self) -> None:
        try:
            await trio.to_thread.run_sync(self._snapshot.load_memory)
        except OSError as exc:
            self._problem = exc
        timeline.mark("memory loaded")
        self._loaded.set()

    async def wake(self, machine: Machine, devices: Sequence[VirtioFS]) -> None:
        """Bring the saved VM back, and let it run."""
        await machine.wait_ready()
        self.failure = NotRestored  # a VMM that did not even start says nothing against what was saved
        await self._loaded.wait()
        if self._problem is not None:
            raise HypervisorError(f"the saved memory cannot be read: {self._problem}") from self._problem
        await machine.load_state(self._snapshot.state)
        timeline.mark("state loaded")
        await _plug_and_resume(machine, devices)


class TakeOver(Beginning):
    """The VM runs already, paused: it was parked by another owner."""

    def __init__(self, parked: Parked) -> None:
        """The descriptors in `parked` stay the caller's. Raises: HypervisorError."""
        self._parked = parked
        try:
            self.details = agent_pb2.GuestDetailsResponse.FromString(parked.details)
        except DecodeError as exc:
            raise HypervisorError(f"what the guest of VM {parked.vmid} told cannot be read: {exc}") from exc

    def directory(self, path: Path) -> VMDirectory:
        """Rename the directory, with sockets and lock in it. The VMM's name cannot be changed: note it."""
        old = path.with_name(self._parked.vmid)
        (old / VMM_NAME).write_text(self._parked.vmid)
        old.rename(path)
        return VMDirectory(path, SandboxLock.held(os.dup(self._parked.lock)))

    def machine(
        self, config: VMConfig, *, vm_dir: Path, vmid: str, netns: str | None, devices: Sequence[VirtioFS]
    ) -> AbstractAsyncContextManager[Machine]:
        """See `Beginning.machine`. It is in an empty network namespace, whatever `netns` says."""
        return adopt(config, self._parked, vm_dir=vm_dir)

    async def wake(self, machine: Machine, devices: Sequence[VirtioFS]) -> None:
        """Let it run on."""
        await _plug_and_resume(machine, devices)


async def _plug_and_resume(machine: Machine, devices: Sequence[VirtioFS]) -> None:
    for device in devices:
        await machine.plug(device)
    timeline.mark("share plugged")
    await machine.resume()
    timeline.mark("vcpus run")
