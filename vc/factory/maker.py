"""Making a template: boot a VM, let it do once what every pod will ask of it, and save it.

What the guest has loaded, compiled and cached by then is in the saved memory, so no restored guest does it
again. The rule: nothing of a pod is in a template. It is made from the configuration alone, in an empty
network, without a shared directory.
"""

from __future__ import annotations

import base64
import logging
import os
import secrets
import time
from dataclasses import replace
from pathlib import Path

import trio

from protos.kata import agent_pb2
from vc.beginning import Boot
from vc.errors import HypervisorError, Unsupported, VCError
from vc.factory.identity import identify
from vc.factory.memory import checksum, new_memory, save_memory
from vc.factory.templates import MANIFEST, MEMORY, STATE, BrokenTemplate, Manifest, Templates, format_manifest
from vc.factory.warmup import warm_up
from vc.hypervisor.base import VMConfig
from vc.hypervisor.qemu.machines import machine_type
from vc.vm import VM, boot_vm

log = logging.getLogger(__name__)

MIB = 1 << 20


async def make_template(config: VMConfig, templates: Templates, *, wait: bool = True) -> Manifest | None:
    """Make the template of a VM, unless there is one; return what it is.

    If another process is at it, wait for that, or return None at once.

    Raises:
        VCError: it cannot be made; this is remembered, and nothing else is left.

    """
    key, facts = await trio.to_thread.run_sync(identify, config)
    lock = templates.locked(wait=wait)
    # Only this task waits for the lock, so there is nobody whom blocking could hurt.
    with lock as ours:
        if not ours:
            return None
        try:
            with templates.opened(key) as template:
                if template is not None:
                    return template.manifest
        except BrokenTemplate as exc:
            log.warning("template %s is replaced: %s", key, exc)
        try:
            return await _make(config, templates, key, facts)
        except VCError as exc:
            templates.note_failure(key, str(exc))
            raise
        except OSError as exc:
            templates.note_failure(key, str(exc))
            raise VCError(f"the template cannot be written to {str(templates.directory)!r}: {exc}") from exc


def check_pluggable(config: VMConfig) -> None:
    """Refuse a machine that could not be given what a pod shares once it runs. Raises: Unsupported."""
    if config.shared_fs is not None and not machine_type(config.arch, config.machine_type).pcie:
        raise Unsupported(f"machine {config.machine_type!r} has no place to plug the shared directory into")


async def _make(config: VMConfig, templates: Templates, key: str, facts: dict[str, object]) -> Manifest:
    check_pluggable(config)
    began = trio.current_time()
    memory = new_memory(config.memory_mib * MIB)
    try:
        with templates.new(key) as directory:
            manifest = await _fill(config, directory, memory, key, facts)
    finally:
        os.close(memory)
    log.info(
        "template %s was made in %.1f s: %d of %d MiB",
        key,
        trio.current_time() - began,
        manifest.data_bytes // MIB,
        config.memory_mib,
    )
    return manifest


async def _fill(
    config: VMConfig, directory: Path, memory: int, key: str, facts: dict[str, object]
) -> Manifest:
    """Boot, save, and describe what was saved."""
    # What the VM has on the host is inside of the directory that is removed if this process dies.
    private = replace(config, run_dir=directory / "run")
    files = [
        os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) for name in (MEMORY, STATE)
    ]
    try:
        async with boot_vm(private, vmid=secrets.token_hex(8), netns="", beginning=Boot(memory=memory)) as vm:
            await warm_up(vm.agent, vm.details)
            details = vm.details
            data_bytes = await _save(vm, memory, files)
        for path in ("run/vm", "run"):
            (directory / path).rmdir()
        manifest = Manifest(
            key=key,
            memory_mib=config.memory_mib,
            vcpus=config.vcpus,
            memory_bytes=os.fstat(files[0]).st_size,
            data_bytes=data_bytes,
            state_bytes=os.fstat(files[1]).st_size,
            memory_checksum=await trio.to_thread.run_sync(checksum, files[0]),
            state_checksum=checksum(files[1]),
            details=_text(details),
            made_at=time.time(),
            facts=facts,
        )
    finally:
        for file in files:
            os.close(file)
    (directory / MANIFEST).write_bytes(format_manifest(manifest))
    return manifest


async def _save(vm: VM, memory: int, files: list[int]) -> int:
    """Save a VM that does nothing; return how many bytes of its memory are not zero."""
    await vm.disconnect()
    await vm.machine.pause()
    await vm.machine.save_state(files[1])
    data_bytes = await trio.to_thread.run_sync(save_memory, memory, files[0])
    for file in files:
        await trio.to_thread.run_sync(os.fsync, file)
    if vm.gone is not None:
        raise HypervisorError(f"the VM that was to be the template died: {vm.gone}")
    return data_bytes


def _text(details: agent_pb2.GuestDetailsResponse) -> str:
    return base64.b64encode(details.SerializeToString()).decode()
