"""The factory that restores a saved VM, and boots one where none fits.

A template fits one configuration exactly. It is looked for at each start, so making, replacing or removing
one needs no word to anybody. The rule: a template never makes a pod fail. What is missing, foreign, broken
or does not start is told to the log, and the VM is booted.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypedDict

import trio
from google.protobuf.message import DecodeError

from protos.kata import agent_pb2
from vc.background import background
from vc.beginning import Boot, Restore, Snapshot
from vc.config import Config
from vc.errors import HypervisorError, NotRestored, Unsupported, VCError
from vc.factory.identity import identify
from vc.factory.later import Later
from vc.factory.memory import checksum, load_memory, new_memory
from vc.factory.templates import BrokenTemplate, ForeignTemplate, Template, Templates
from vc.growing import can_add_processors, can_grow, grow
from vc.hypervisor.base import VMConfig
from vc.hypervisor.configure import vm_config
from vc.vm import VM, boot_vm

log = logging.getLogger(__name__)

MIB = 1 << 20
RESTORE_TIMEOUT = 15.0  # seconds; it takes less than one, and a boot must still be possible afterwards
RETRY_AFTER = 600.0  # seconds until a template that could not be made or used is made again


class Place(TypedDict):
    """Where a VM is to run: see `boot_vm`."""

    vmid: str
    netns: str | None
    shared_dir: Path | None


class TemplateFactory:
    """Restores, or boots. See `vc.factory.Factory`."""

    def __init__(
        self, templates: Templates, base: VMConfig, config_path: Path | None = None, *, kept: bool = False
    ) -> None:
        """`base` is the VM that the template is made of.

        With the path of the configuration that says so, a missing template is made by another process. A VM
        that is `kept` can be parked.
        """
        self._kept = kept
        self._templates = templates
        self._base = base
        self._config_path = config_path

    @asynccontextmanager
    async def vm(
        self, config: VMConfig, *, vmid: str, netns: str | None, shared_dir: Path | None
    ) -> AsyncIterator[VM]:
        """Give a VM, restored if possible."""
        place = Place(vmid=vmid, netns=netns, shared_dir=shared_dir)
        async with AsyncExitStack() as stack:
            key = await self._key(config)
            vm: VM | None = None
            warm = await stack.enter_async_context(AsyncExitStack())
            try:
                vm = await self._restored(warm, self._sized(config), place, key) if key else None
            except ForeignTemplate as exc:
                log.warning("booting: the template is not used: %s", exc)
                key = ""  # and none is made
            if vm is not None and not await self._grown(vm, config):
                await warm.aclose()
                vm = None
            if vm is None:
                vm = await stack.enter_async_context(
                    boot_vm(config, **place, beginning=Boot(kept=self._kept))
                )
                if key:
                    await self._after_boot(stack, key)
            yield vm

    async def _key(self, config: VMConfig) -> str:
        """Return the key of the template that fits; empty if there can be none."""
        if why := can_grow(self._base, config):
            log.info("booting: a VM from the template is too small or too large: %s", why)
            return ""
        wanted, config = config, self._sized(config)
        try:
            if why := await trio.to_thread.run_sync(can_add_processors, self._base, wanted):
                log.info("booting: a VM from the template is too small: %s", why)
                return ""
            key, _ = await trio.to_thread.run_sync(identify, config)
            fits = config == self._base or key == (await trio.to_thread.run_sync(identify, self._base))[0]
        except (HypervisorError, Unsupported):
            return ""  # the boot fails of the same, and tells it in its own words
        if not fits:
            log.info("booting: the pod changes the VM's configuration, so the template does not fit")
            return ""
        return key

    def _sized(self, config: VMConfig) -> VMConfig:
        """Return the configuration with the size of the template's VM."""
        return replace(config, vcpus=self._base.vcpus, memory_mib=self._base.memory_mib)

    async def _restored(self, stack: AsyncExitStack, config: VMConfig, place: Place, key: str) -> VM | None:
        """Restore a VM on `stack`; None if that is not possible. Raises: ForeignTemplate, Unsupported."""
        if not self._kept:
            config = replace(config, dial_timeout=min(config.dial_timeout, RESTORE_TIMEOUT))
        memory = new_memory(config.memory_mib * MIB)
        try:
            with self._templates.opened(key) as template:
                if template is None:
                    log.info("booting: there is no template %s yet", key)
                    return None
                snapshot = _snapshot(template, memory, config.memory_mib * MIB)
                vm = await stack.enter_async_context(
                    boot_vm(config, **place, beginning=Restore(snapshot, kept=self._kept))
                )
                log.info("VM %s goes on from template %s", vm.vmid, key)
                return vm
        except BrokenTemplate as exc:
            log.warning("booting: template %s is thrown away: %s", key, exc)
            self._templates.discard(key)
        except HypervisorError as exc:
            if self._kept:
                raise  # it is made at low priority: that it took too long says nothing against the template
            if isinstance(exc, NotRestored):
                self._blame(key, exc)
            else:
                log.warning("booting: no VM can be started from a template: %s", exc)
        finally:
            os.close(memory)
        return None

    def _blame(self, key: str, exc: NotRestored) -> None:
        log.warning("booting: template %s is thrown away, since no VM comes out of it: %s", key, exc)
        self._templates.discard(key)
        if not _caused_by(exc, DamagedMemory):
            # One that is made at once would hardly be better, and make every pod try and fail.
            self._templates.note_failure(key, str(exc))

    async def _grown(self, vm: VM, config: VMConfig) -> bool:
        """Give the VM its pod's size; whether it has it."""
        try:
            await grow(vm, self._base, config)
        except VCError as exc:
            log.warning(
                "booting: VM %s, which goes on from a template, cannot be made larger: %s", vm.vmid, exc
            )
            return False
        return True

    async def _after_boot(self, stack: AsyncExitStack, key: str) -> None:
        """See to it that later pods find a template, without being in the way of this one."""
        failure = self._templates.failure(key)
        if failure is not None and 0 <= failure[0] < RETRY_AFTER:
            log.info("no template is made, for the last one failed %.0f s ago: %s", *failure)
            return
        if self._config_path is not None:
            later = Later(self._config_path)
            stack.callback(later.ask_and_leave)
            nursery = await stack.enter_async_context(background())
            nursery.start_soon(later.run)


def _snapshot(template: Template, memory: int, memory_bytes: int) -> Snapshot:
    """Make of an open template what a VM needs. Raises: BrokenTemplate."""
    manifest = template.manifest
    if manifest.memory_bytes != memory_bytes:
        raise BrokenTemplate(f"it has {manifest.memory_bytes} bytes of memory instead of {memory_bytes}")
    if checksum(template.state) != manifest.state_checksum:
        raise BrokenTemplate(
            "the machine's state was changed since it was saved: the checksum is another one"
        )
    os.lseek(template.state, 0, os.SEEK_SET)  # QEMU reads on from where it stands
    try:
        details = agent_pb2.GuestDetailsResponse.FromString(manifest.guest_details)
    except DecodeError as exc:
        raise BrokenTemplate(f"what its guest told about itself cannot be read: {exc}") from exc
    return Snapshot(
        memory=memory,
        load_memory=partial(_load, template, memory),
        state=template.state,
        details=details,
    )


class DamagedMemory(OSError):
    """The saved memory is not what was saved; one that is made anew will be good."""


def _load(template: Template, memory: int) -> None:
    """Fill a guest's memory. Raises: OSError."""
    if load_memory(template.memory, memory) != template.manifest.memory_checksum:
        raise DamagedMemory(errno.EIO, "it was changed since it was saved: the checksum is another one")


def _caused_by(exc: BaseException | None, kind: type[BaseException]) -> bool:
    while exc is not None and not isinstance(exc, kind):
        exc = exc.__cause__
    return exc is not None


def template_factory(config: Config) -> TemplateFactory:
    """Return the factory that the configuration asks for, without any pod's changes."""
    return TemplateFactory(Templates(config.factory.template_path), vm_config(config), config.source)
