"""Every configuration key that does something, as the fields of four frozen dataclasses.

A field is the whole truth about its key: type, default, allowed values, meaning, and which annotation may
override it. To add a key, add its field here; `load`, `annotations` and `kata-runtime env` follow. Names and
units are Kata's, so that its configuration.toml fits; the keys that are ours say so.
"""

# ruff: noqa: RUF009 - `key` makes a field, as dataclasses.field does, and paths are immutable

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from vc.config.kinds import (
    AbsolutePath,
    Boolean,
    Choice,
    Integer,
    Kind,
    Number,
    OptionalPath,
    Regex,
    Text,
    Words,
)

T = TypeVar("T")

MIN_MEMORY_MIB = 256  # what Kata asks for in an annotation, and recommends in the file
MAX_VCPUS = 1024  # sanity only: the host's CPUs bound it in practice

# Where distributions put virtiofsd: first the C one, which is there only if the QEMU is old enough for it.
VIRTIOFSD_PLACES = (
    "/usr/lib/qemu/virtiofsd",
    "/usr/libexec/virtiofsd",
    "/usr/lib/virtiofsd",
    "/opt/kata/libexec/virtiofsd",
)


@dataclass(frozen=True, slots=True)
class Key:
    """What the files and annotations need to know about one key."""

    name: str
    kind: Kind[Any]
    default: object
    meaning: str
    required: bool  # there is no useful default
    ours: bool  # Kata has no such key
    annotation: str  # the suffix of the annotation that may override it; empty: none may
    valid_list: str  # the key with the globs that an annotation's path must match; empty: any path is fine


def key(
    kind: Kind[T],
    meaning: str,
    *,
    default: T,
    required: bool = False,
    ours: bool = False,
    annotation: str = "",
    valid_list: str = "",
) -> T:
    """Declare a field as a configuration key that only the files can set."""
    about = (kind, meaning, required, ours, annotation, valid_list)
    return field(default=default, metadata={"key": about})


def keys(section: type) -> Iterator[Key]:
    """Yield the keys of a section's dataclass in their order."""
    for item in fields(section):
        if "key" in item.metadata:
            kind, meaning, *rest = item.metadata["key"]
            yield Key(item.name, kind, item.default, meaning, *rest)


def default_qemu() -> Path:
    """Return where distributions put the QEMU of this machine's architecture."""
    machine = os.uname().machine
    return Path("/usr/bin/qemu-system-" + {"ppc64le": "ppc64", "i686": "i386"}.get(machine, machine))


def default_machine_type() -> str:
    """Return the machine type that fits this machine's architecture."""
    machine = os.uname().machine
    return {"x86_64": "q35", "i686": "q35", "s390x": "s390-ccw-virtio", "ppc64le": "pseries"}.get(
        machine, "virt"
    )


def default_virtiofsd() -> Path:
    """Return the first virtiofsd that is installed, or the place where one should be."""
    found = [place for place in VIRTIOFSD_PLACES if os.access(place, os.X_OK)]
    return Path((found or ["/usr/libexec/virtiofsd"])[0])


@dataclass(frozen=True, slots=True)
class HypervisorConfig:
    """The table [hypervisor.NAME]; `name` is that NAME. Sizes are MiB, as in Kata."""

    name: str = "qemu"
    path: Path = key(
        AbsolutePath(file=True),
        "the VMM's program",
        default=default_qemu(),
        annotation="path",
        valid_list="valid_hypervisor_paths",
    )
    kernel: Path = key(
        AbsolutePath(file=True), "the guest's kernel", default=Path(), required=True, annotation="kernel"
    )
    image: Path | None = key(
        OptionalPath(file=True),
        "the guest's root file system, a disk image",
        default=None,
        annotation="image",
    )
    initrd: Path | None = key(
        OptionalPath(file=True),
        "the guest's initial RAM disk; alone it is the whole guest",
        default=None,
        annotation="initrd",
    )
    rootfs_type: str = key(Choice("ext4", "xfs", "erofs"), "the file system in the image", default="ext4")
    machine_type: str = key(
        Text(), "QEMU's machine", default=default_machine_type(), annotation="machine_type"
    )
    machine_accelerators: str = key(
        Text(), "appended to -machine, comma separated", default="", annotation="machine_accelerators"
    )
    cpu_features: str = key(
        Text(), "appended to -cpu, comma separated", default="pmu=off", annotation="cpu_features"
    )
    kernel_params: str = key(
        Text(), "appended to the guest kernel's command line", default="", annotation="kernel_params"
    )
    accelerator: str = key(
        Choice("auto", "kvm", "tcg"), "auto takes KVM only if it really works", default="auto", ours=True
    )
    agent_transport: str = key(
        Choice("auto", "vsock", "hybrid-vsock", "virtio-serial"),
        "how the host reaches the agent",
        default="auto",
        ours=True,
    )
    default_vcpus: float = key(
        Number(-MAX_VCPUS, MAX_VCPUS),
        "vCPUs at boot, rounded up; 0: 1, negative: all of the host",
        default=1.0,
        annotation="default_vcpus",
    )
    default_maxvcpus: int = key(
        Integer(0, MAX_VCPUS),
        "vCPUs at most; 0 or more than the host has: all of the host",
        default=0,
        annotation="default_max_vcpus",
    )
    default_memory: int = key(
        Integer(1, 2**24, unit="MiB"), "memory at boot", default=2048, annotation="default_memory"
    )
    memory_slots: int = key(
        Integer(0, 255), "modules of memory that can be added later", default=10, annotation="memory_slots"
    )
    default_maxmemory: int = key(
        Integer(0, 2**24, unit="MiB"), "memory at most; 0: all of the host", default=0
    )
    shared_fs: str = key(
        Choice("virtio-fs", "none"), "how files reach the guest", default="virtio-fs", annotation="shared_fs"
    )
    virtio_fs_daemon: Path = key(
        AbsolutePath(file=True),
        "virtiofsd's program",
        default=default_virtiofsd(),
        annotation="virtio_fs_daemon",
        valid_list="valid_virtio_fs_daemon_paths",
    )
    virtio_fs_cache: str = key(
        Choice("never", "metadata", "auto", "always", aliases={"none": "never"}),
        "what the guest may cache",
        default="auto",
        annotation="virtio_fs_cache",
    )
    virtio_fs_extra_args: tuple[str, ...] = key(
        Words(), "more arguments for virtiofsd", default=(), annotation="virtio_fs_extra_args"
    )
    virtio_fs_queue_size: int = key(Integer(1, 32768), "requests in virtiofsd's queue", default=1024)
    entropy_source: Path = key(
        AbsolutePath(),
        "where the guest's randomness comes from",
        default=Path("/dev/urandom"),
        annotation="entropy_source",
        valid_list="valid_entropy_sources",
    )
    seccompsandbox: str = key(Text(), "QEMU's -sandbox; empty: the strictest that works", default="")
    rootless: bool = key(
        Boolean(), "run the VMM as a user and in a root directory of its own, if the host can", default=True
    )
    enable_debug: bool = key(Boolean(), "log the guest's console and let the kernel talk", default=False)
    enable_annotations: tuple[str, ...] = key(
        Words(items=Regex()),
        "annotations that a pod may set: a regular expression must occur in the name",
        default=("enable_iommu", "kernel_params", "kernel_verity_params"),
    )
    valid_hypervisor_paths: tuple[str, ...] = key(
        Words(), "globs of what the annotation `path` may name", default=()
    )
    valid_virtio_fs_daemon_paths: tuple[str, ...] = key(
        Words(), "globs of what the annotation `virtio_fs_daemon` may name", default=()
    )
    valid_entropy_sources: tuple[str, ...] = key(
        Words(),
        "globs of what the annotation `entropy_source` may name",
        default=("/dev/urandom", "/dev/random"),
    )


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """The table [agent.kata]. Times are seconds."""

    enable_debug: bool = key(Boolean(), "let the agent log everything", default=False)
    kernel_modules: tuple[str, ...] = key(
        Words(separator=";"),
        "modules that the guest loads: name and parameters",
        default=(),
        annotation="kernel_modules",
    )
    dial_timeout: float = key(
        Number(0.1, 86400, unit="seconds"), "how long a guest may take until its agent answers", default=45.0
    )
    container_pipe_size: int = key(
        Integer(0, 2**20, unit="bytes"),
        "size of stdio pipes in the guest; 0: the kernel's",
        default=0,
        annotation="container_pipe_size",
    )


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """The table [runtime]. Times are seconds."""

    enable_debug: bool = key(Boolean(), "log everything", default=False)
    internetworking_model: str = key(
        Choice("tcfilter", "macvtap", "none", aliases={"default": "tcfilter"}),
        "how the pod's interfaces reach the VM",
        default="tcfilter",
        annotation="internetworking_model",
    )
    disable_new_netns: bool = key(
        Boolean(), "run the VMM in the host's network", default=False, annotation="disable_new_netns"
    )
    disable_guest_seccomp: bool = key(
        Boolean(),
        "do not apply seccomp profiles in the guest",
        default=False,
        annotation="disable_guest_seccomp",
    )
    create_container_timeout: float = key(
        Number(1, 86400, unit="seconds"),
        "how long the agent may take to create a container",
        default=60.0,
        annotation="create_container_timeout",
    )
    health_check_interval: float = key(
        Number(0, 86400, unit="seconds"),
        "how often the agent is asked whether it serves; 0: never",
        default=10.0,
        ours=True,
    )
    health_check_timeout: float = key(
        Number(0.1, 86400, unit="seconds"),
        "how long it may take to answer that before the guest is taken for hung and killed",
        default=30.0,
        ours=True,
    )
    run_dir: Path = key(
        AbsolutePath(), "where the state of sandboxes lives", default=Path("/run/vc"), ours=True
    )
    experimental: tuple[str, ...] = key(
        Words(separator=" ", items=Choice()),
        "experimental features: there are none",
        default=(),
        annotation="experimental",
    )


@dataclass(frozen=True, slots=True)
class FactoryConfig:
    """The table [factory]: where VMs come from."""

    enable_template: bool = key(Boolean(), "start VMs as copies of a template", default=False)
    template_path: Path = key(
        AbsolutePath(), "where the template is kept", default=Path("/run/vc/vm/template")
    )
    vm_cache_number: int = key(Integer(0, 1024), "VMs kept ready; 0: none", default=0)
    vm_cache_endpoint: Path = key(
        AbsolutePath(), "the socket of the VM cache", default=Path("/var/run/kata-containers/cache.sock")
    )


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that the files say, checked. `warnings` are sentences for the log, one per oddity."""

    source: Path
    hypervisor: HypervisorConfig = HypervisorConfig()
    agent: AgentConfig = AgentConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    factory: FactoryConfig = FactoryConfig()
    warnings: tuple[str, ...] = ()
