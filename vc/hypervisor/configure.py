"""From the configuration to the description of a VM.

Nothing is decided here that needs the host's state at the moment of the boot: "auto" stays "auto" until
`launch`.
"""

from __future__ import annotations

import os
import shlex
from math import ceil
from pathlib import Path

from vc.config.schema import Config
from vc.hypervisor.base import SharedFSConfig, VMConfig

SECTOR = 512  # bytes
MIB = 1 << 20
MBR_SIGNATURE = b"\x55\xaa"  # the last two bytes of the first sector: UEFI specification, table 5.1


def vm_config(config: Config, *, vcpus: int | None = None, memory_mib: int | None = None) -> VMConfig:
    """Describe the VM that the configuration asks for; the keywords replace its sizes."""
    hypervisor = config.hypervisor
    asked = vcpus or max(1, ceil(hypervisor.default_vcpus))
    shared_fs = None
    if hypervisor.shared_fs != "none":
        shared_fs = SharedFSConfig(
            daemon=hypervisor.virtio_fs_daemon,
            cache=hypervisor.virtio_fs_cache,
            extra_args=hypervisor.virtio_fs_extra_args,
            queue_size=hypervisor.virtio_fs_queue_size,
        )
    return VMConfig(
        qemu=hypervisor.path,
        kernel=hypervisor.kernel,
        initrd=hypervisor.initrd,
        image=hypervisor.image,
        image_partitioned=hypervisor.image is not None and has_partitions(hypervisor.image),
        rootfs_type=hypervisor.rootfs_type,
        kernel_params=split_params(hypervisor.kernel_params),
        memory_mib=memory_mib or hypervisor.default_memory,
        vcpus=asked,
        max_vcpus=max(asked, hypervisor.default_maxvcpus),
        memory_slots=hypervisor.memory_slots,
        max_memory_mib=hypervisor.default_maxmemory or host_memory_mib(),
        arch=os.uname().machine,
        machine_type=hypervisor.machine_type,
        machine_accelerators=hypervisor.machine_accelerators,
        cpu_features=hypervisor.cpu_features,
        accelerator=hypervisor.accelerator,
        seccomp_sandbox=hypervisor.seccompsandbox,
        rootless=hypervisor.rootless,
        entropy_source=hypervisor.entropy_source,
        agent_transport=hypervisor.agent_transport,
        agent_debug=config.agent.enable_debug,
        container_pipe_size=config.agent.container_pipe_size,
        debug=hypervisor.enable_debug,
        shared_fs=shared_fs,
        run_dir=config.runtime.run_dir,
        dial_timeout=config.agent.dial_timeout,
    )


def host_memory_mib() -> int:
    """Return the memory of this host in MiB."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MIB


def split_params(text: str) -> tuple[str, ...]:
    """Split kernel parameters at blanks outside of double quotes, which stay: the kernel reads them, too."""
    words = shlex.shlex(text, posix=False, punctuation_chars=False)
    words.whitespace_split = True
    words.commenters = ""
    words.quotes = '"'
    try:
        return tuple(words)
    except ValueError:  # a quote that is not closed; the kernel takes it as it is
        return tuple(text.split())


def has_partitions(image: Path) -> bool:
    """Whether the image has a partition table, as Kata's own images have. A missing file has none."""
    try:
        with image.open("rb") as file:
            return file.read(SECTOR)[-2:] == MBR_SIGNATURE
    except OSError:
        return False
