"""What a hypervisor driver promises, and the description of the VM that it is given.

A driver turns a `VMConfig` and some devices into a running `Machine`. It knows no sandbox, no container and
no agent; it says at which address the agent of its guest can be reached, and others dial.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

from vc.agent_client.transports import Address
from vc.errors import Unsupported
from vc.hypervisor.console import ConsoleTail
from vc.hypervisor.parked import Parked

# The order of preference on this host is the driver's; these are the words of the configuration.
AUTO = "auto"
VSOCK = "vsock"
HYBRID_VSOCK = "hybrid-vsock"
VIRTIO_SERIAL = "virtio-serial"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedFSConfig:
    """How a directory of the host reaches the guest: the virtiofsd to run and what the guest may cache."""

    daemon: Path
    cache: str = "auto"  # never, metadata, auto, always
    extra_args: tuple[str, ...] = ()
    queue_size: int = 1024  # requests


@dataclass(frozen=True, slots=True, kw_only=True)
class VMConfig:
    """All that is needed to build a VM, and nothing that changes from one VM to the next."""

    qemu: Path
    kernel: Path
    initrd: Path | None = None
    image: Path | None = None  # the root file system; it is attached read-only
    image_partitioned: bool = False  # the root file system is the image's first partition
    rootfs_type: str = "ext4"
    kernel_params: tuple[str, ...] = ()  # later ones replace earlier ones, and ours, of the same key
    memory_mib: int = 2048
    vcpus: int = 1
    max_vcpus: int = 1
    memory_slots: int = 0  # how many modules can be plugged later
    max_memory_mib: int = 0  # with them; 0 is no more than at the start
    arch: str = "x86_64"
    machine_type: str = "q35"
    machine_accelerators: str = ""
    cpu_model: str = ""  # empty: the best one for the accelerator
    cpu_features: str = ""
    accelerator: str = AUTO
    parallel_vcpus: bool = True  # each has a thread of its own; decided together with the accelerator
    seccomp_sandbox: str = ""  # QEMU's -sandbox; empty: the strictest that works
    rootless: bool = True  # the VMM gets a user and a root directory of its own, if this host can do that
    entropy_source: Path = Path("/dev/urandom")
    agent_transport: str = AUTO
    agent_debug: bool = False
    container_pipe_size: int = 0  # bytes of a stdio pipe in the guest; 0 is the kernel's choice
    debug: bool = False  # the kernel talks, and the console goes to the log
    shared_fs: SharedFSConfig | None = field(default=None)
    run_dir: Path = Path("/run/vc")
    dial_timeout: float = 45.0  # seconds from the start of the VMM until the agent has answered


@dataclass(frozen=True, slots=True)
class VirtioFS:
    """A directory served by a virtiofsd that listens, or will be listening, at `socket_path`."""

    socket_path: Path
    tag: str = "kataShared"
    queue_size: int = 1024  # requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A file or a block device of the host as a disk, by whose serial number the guest finds it."""

    path: Path
    serial: str  # at most 20 characters: virtio specification 1.2, 5.2.6.1
    read_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryModule:
    """Further memory; a multiple of the guest's memory block. `name` tells it from others of this machine."""

    name: str
    size_mib: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """A further vCPU. `name` tells it from others of this machine."""

    name: str


Device = VirtioFS | Disk | MemoryModule | Processor


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a driver can do; whoever needs more than that says `Unsupported` before anything is started."""

    shared_fs: bool = False
    block_device: bool = False
    hotplug: bool = False
    pause: bool = False
    snapshot: bool = False


class Machine(ABC):
    """A VM that runs. Made by a driver's `launch`, whose block ends it."""

    pid: int  # of the VMM
    address: Address  # of the agent in the guest
    console: ConsoleTail  # what the guest printed
    messages: ConsoleTail  # what the VMM printed
    capabilities: Capabilities
    out_of_memory: bool = False  # the VMM is dead because the host had no memory for it
    paused: bool = False  # by `pause`; true from before the first vCPU stops until after the last one runs

    @abstractmethod
    def kill_nowait(self) -> None:
        """Kill the VMM, unless it is dead already. `wait_dead` tells when it is."""

    @abstractmethod
    async def wait_ready(self) -> None:
        """Block until the VMM takes commands. Raises: HypervisorError."""

    @abstractmethod
    async def pause(self) -> None:
        """Stop all vCPUs. Raises: HypervisorError."""

    @abstractmethod
    async def resume(self) -> None:
        """Let all vCPUs run again. Raises: HypervisorError."""

    @abstractmethod
    async def plug(self, device: Device) -> None:
        """Add a device to the running machine. Raises: HypervisorError, Unsupported."""

    @abstractmethod
    async def unplug(self, device: Device) -> None:
        """Take a device away that was plugged. Raises: HypervisorError, Unsupported."""

    def park(self, vmid: str, *, details: bytes, lock: int) -> Parked:
        """Make a paused machine outlive its block, for another owner; only if it was launched for that.

        Raises: HypervisorError, Unsupported.
        """
        raise Unsupported(f"{type(self).__name__} cannot be handed over")

    async def save_state(self, descriptor: int) -> None:
        """Write all but the memory of a paused machine to an open file. Raises: HypervisorError."""
        raise Unsupported(f"{type(self).__name__} cannot be saved")

    async def load_state(self, descriptor: int) -> None:
        """Take over what `save_state` wrote, in a machine launched for it; it is paused then.

        Raises: HypervisorError.
        """
        raise Unsupported(f"{type(self).__name__} cannot be restored")

    @abstractmethod
    async def wait_dead(self) -> str:
        """Block until the VMM has ended; return the cause as a sentence."""
