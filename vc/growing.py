"""Giving a running VM more than it was started with.

A saved VM has the size that the configuration gives to every pod. What a pod needs beyond that is plugged
into its copy, so that it need not boot. The machine was built with room for it: places for processors and for
modules of memory, which the guest's kernel counted when it booted.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import trio

from vc.errors import Unsupported
from vc.hypervisor.accelerator import settle
from vc.hypervisor.base import MemoryModule, Processor, VMConfig
from vc.vm import VM

log = logging.getLogger(__name__)

MIB = 1 << 20
MEMORY_BLOCK_MIB = 128  # what Linux adds at once, where the guest does not say it: x86_64, less than 64 GiB
# The kernel keeps 64 bytes for each page of 4096, new ones as well, in the memory that it has already; Kata
# found guests to fail beyond this.
MAX_GROWTH = 48  # times


def can_grow(base: VMConfig, config: VMConfig) -> str:
    """Say why a VM of `base`'s size cannot become one of `config`'s; empty if it can."""
    for what, has, wants, most in (
        ("vCPUs", base.vcpus, config.vcpus, base.max_vcpus),
        ("MiB", base.memory_mib, config.memory_mib, _most_memory(base)),
    ):
        if not has <= wants <= most:
            return f"it has {has} {what} and can have up to {most}, the pod is to have {wants}"
    return ""


def can_add_processors(base: VMConfig, config: VMConfig) -> str:
    """Say why processors cannot be plugged into a VM of `base`'s; empty if they can, or need not.

    An emulator that must know of all of them from the start, in order to run them in turns, was not told of
    these. Blocks: QEMU may be asked for its version. Raises: Unsupported.
    """
    if config.vcpus > base.vcpus and not settle(replace(base, vcpus=config.vcpus))[0].parallel_vcpus:
        return f"{base.qemu} cannot run processors safely that are plugged: it must be 8.1 or later"
    return ""


def _most_memory(base: VMConfig) -> int:
    if not base.memory_slots:
        return base.memory_mib
    room = min(base.max_memory_mib, base.memory_mib * MAX_GROWTH)
    # Only whole blocks can be plugged, and the last one must fit as well.
    return max(
        base.memory_mib, base.memory_mib + (room - base.memory_mib) // MEMORY_BLOCK_MIB * MEMORY_BLOCK_MIB
    )


async def grow(vm: VM, base: VMConfig, config: VMConfig) -> None:
    """Let a VM that has `base`'s size have `config`'s; memory is rounded up to what the guest can add.

    Raises: HypervisorError, VCError; the VM may have a part of it then.
    """
    if why := can_grow(base, config):
        raise Unsupported(why)
    memory_mib, vcpus = config.memory_mib - base.memory_mib, config.vcpus - base.vcpus
    if not memory_mib and not vcpus:
        return
    began = trio.current_time()
    if memory_mib:
        block = vm.details.mem_block_size_bytes // MIB or MEMORY_BLOCK_MIB
        await vm.machine.plug(MemoryModule(name="0", size_mib=-(-memory_mib // block) * block))
    for number in range(base.vcpus, config.vcpus):
        await vm.machine.plug(Processor(name=str(number)))
    await vm.agent.online(vcpus)
    log.info(
        "VM %s has grown by %d vCPUs and %d MiB in %.2f s",
        vm.vmid,
        vcpus,
        memory_mib,
        trio.current_time() - began,
    )
