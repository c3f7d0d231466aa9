"""The factory that takes a VM which another process keeps ready, and asks the next factory if there is none.

The rule: a cache never makes a pod fail. That it does not run, has none, has others, or dies meanwhile is
told to the log, and the pod's VM comes from the next factory.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import trio

from vc import timeline
from vc.beginning import TakeOver
from vc.config import Config
from vc.errors import HypervisorError, Unsupported, VCError
from vc.factory import Factory
from vc.factory.handover import Wanted, cache_key, take
from vc.factory.template import RESTORE_TIMEOUT
from vc.growing import can_add_processors, can_grow, grow
from vc.hypervisor.base import VMConfig
from vc.hypervisor.configure import vm_config
from vc.vm import VM, boot_vm

log = logging.getLogger(__name__)


class CacheFactory:
    """Takes, or has one made. See `vc.factory.Factory`."""

    def __init__(self, endpoint: Path, base: VMConfig, following: Factory) -> None:
        """`endpoint` is where the cache serves VMs like `base`. `following` is asked if it gives none."""
        self._endpoint = endpoint
        self._base = base
        self._following = following

    @asynccontextmanager
    async def vm(
        self, config: VMConfig, *, vmid: str, netns: str | None, shared_dir: Path | None
    ) -> AsyncIterator[VM]:
        """Give a VM, one that waits if possible."""
        async with AsyncExitStack() as stack:
            vm = await self._taken(stack, config, vmid, shared_dir)
            if vm is None:
                block = self._following.vm(config, vmid=vmid, netns=netns, shared_dir=shared_dir)
                vm = await stack.enter_async_context(block)
            yield vm

    async def _taken(
        self, stack: AsyncExitStack, config: VMConfig, vmid: str, shared_dir: Path | None
    ) -> VM | None:
        """Take over a VM on `stack`; None if that is not possible."""
        if why := can_grow(self._base, config):
            log.info("no VM from the cache: it would be too small or too large: %s", why)
            return None
        sized = replace(config, vcpus=self._base.vcpus, memory_mib=self._base.memory_mib)
        try:
            if why := await trio.to_thread.run_sync(can_add_processors, self._base, config):
                log.info("no VM from the cache: it would be too small: %s", why)
                return None
            key = await trio.to_thread.run_sync(cache_key, sized)
            parked = await take(self._endpoint, Wanted(key=key))
        except (HypervisorError, Unsupported) as exc:
            log.info("no VM from the cache: %s", exc)
            return None
        timeline.mark("vm taken")
        quick = replace(sized, dial_timeout=min(config.dial_timeout, RESTORE_TIMEOUT))
        async with AsyncExitStack() as undo:
            undo.callback(parked.close)
            try:
                block = boot_vm(quick, vmid=vmid, shared_dir=shared_dir, beginning=TakeOver(parked))
                vm = await undo.enter_async_context(block)
                await grow(vm, self._base, config)
            except VCError as exc:
                log.warning("VM %s from the cache is not used: %s", parked.vmid, exc)
                return None
            log.info("VM %s was VM %s of the cache", vmid, parked.vmid)
            stack.push_async_exit(undo.pop_all())
            return vm


def cache_factory(config: Config, following: Factory) -> CacheFactory:
    """Return the factory that the configuration asks for, without any pod's changes."""
    return CacheFactory(config.factory.vm_cache_endpoint, vm_config(config), following)
