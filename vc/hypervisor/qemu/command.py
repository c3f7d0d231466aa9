"""QEMU's command line, made from the VM's description.

The rule of this file: it is pure. The driver opens descriptors and says their numbers, and whatever is not
in the arguments is not on the command line, so that a test can compare the whole of it. A machine has no
device that the pod does not need; each one is a piece of QEMU that a hostile guest can attack.

Source: qemu(1), and docs/qdev-device-use.txt for the way devices and their back ends are named.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vc.hypervisor.accelerator import KVM, TCG
from vc.hypervisor.base import VirtioFS, VMConfig
from vc.hypervisor.qemu.machines import COMMON_PARAMS, MachineType, machine_type

# What QEMU's seccomp filter takes away from it after start-up; all four work with QEMU 7.2 and later
# (qemu(1)).
SANDBOX = ",".join(
    (
        "on",  # system calls that no emulator needs: reboot, swapon, mount, init_module, ...
        "obsolete=deny",  # calls that only old libraries used
        "elevateprivileges=deny",  # set*uid, set*gid and, as no_new_privs, programs with the setuid bit
        "spawn=deny",  # fork, vfork, execve: an escaped guest gets no shell
        "resourcecontrol=deny",  # scheduler and memory policy: no priority above its cgroup's
    )
)

AGENT_PORT_NAME = "agent.channel.0"  # by which the agent finds its port: Kata 1.x, virtcontainers
MEMORY = "memory"
# The guest's memory is in no core dump, and is not searched for pages that another process has as well: how
# long a write to a merged page takes would tell one guest what is in another.
PRIVATE_MEMORY = ("dump-guest-core=off", "mem-merge=off")
# Not -nographic, which would also make the firmware print its banner on our console.
NO_DISPLAY = ("-display", "none")
# Whether the guest may leave out kicks that virtiofsd does not want. The one in C says which it wants without
# a barrier before it looks at the queue again (libvhost-user.c, vu_queue_pop), so one that is needed can be
# left out, and a process that waits for a page of its program would wait for ever. Read there, never seen.
SHARE_EVENT_IDX = False
# In a machine that can never have a second vCPU, TCG before QEMU 8.1 leaves out the guest's memory barriers,
# although its devices run in other threads and processes (commit c914d46d0a64); so there is always room for
# one. The kernel is told the real number.
TCG_MIN_SOCKETS = 2
# What TCG keeps of the code that it has translated. Its default, a GiB, is filled by a guest that goes on
# starting programs, and is then the most of what a VM holds; once it is full, all is translated again.
TCG_BUFFER_MIB = 256
HOTPLUG_PORTS = 6  # free places for devices that come later: a share, and a block device or network each


@dataclass(frozen=True, slots=True, kw_only=True)
class Vsock:
    """A reserved context id and the open /dev/vhost-vsock that holds it."""

    descriptor: int
    cid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """What the driver has opened for this one process, as descriptor numbers."""

    qmp: int  # listens
    console: int  # connected
    agent: int | None = None  # listens; the other end of the virtio-serial port
    vsock: Vsock | None = None
    shares: tuple[tuple[VirtioFS, int], ...] = ()  # connected to virtiofsd
    memory: int | None = None  # a file that is the guest's memory; otherwise QEMU makes one
    restored: bool = False  # instead of booting, wait for a saved state


def command_line(config: VMConfig, wiring: Wiring, *, vmid: str, uuid: str) -> list[str]:
    """Return QEMU's argv. `config.accelerator` must be decided.

    Raises: Unsupported.
    """
    row = machine_type(config.arch, config.machine_type)
    argv = [str(config.qemu), "-name", f"sandbox-{vmid},debug-threads=on", "-uuid", uuid]
    argv += _machine(config, wiring, row)
    argv += _boot(config, row)
    argv += _console(wiring, row)
    argv += _monitor(wiring)
    argv += _agent(wiring, row)
    if config.image is not None:
        argv += _image(config.image, row)
    argv += _entropy(config, row)
    for number, (device, descriptor) in enumerate(wiring.shares):
        argv += _share(number, device, descriptor, row)
    if row.pcie:
        argv += _hotplug_ports()
    if wiring.restored:
        argv += ["-incoming", "defer", "-S"]
    return [*argv, "-sandbox", config.seccomp_sandbox or SANDBOX]


def _machine(config: VMConfig, wiring: Wiring, row: MachineType) -> list[str]:
    options = [row.name, f"memory-backend={MEMORY}", *PRIVATE_MEMORY]
    options += [part for part in (row.options, config.machine_accelerators) if part]
    cpu = config.cpu_model or ("host" if config.accelerator == KVM else row.cpu_tcg)
    accelerator = config.accelerator
    if config.accelerator == TCG:
        accelerator += f",tb-size={TCG_BUFFER_MIB}" + ("" if config.parallel_vcpus else ",thread=single")
    sockets = max(config.max_vcpus, TCG_MIN_SOCKETS if config.accelerator == TCG else 1)
    smp = f"cpus={config.vcpus},sockets={sockets},cores=1,threads=1,maxcpus={sockets}"
    # Shared, so that virtiofsd reads and writes the guest's memory; from a memfd, so that /dev/shm's size
    # is no limit.
    backend = "memory-backend-memfd"
    if wiring.memory is not None:
        backend = f"memory-backend-file,mem-path=/proc/self/fd/{wiring.memory}"
    memory = f"{backend},id={MEMORY},size={config.memory_mib}M,share=on"
    argv = ["-machine", ",".join(options), "-accel", accelerator]
    argv += ["-cpu", ",".join(part for part in (cpu, config.cpu_features) if part)]
    argv += ["-smp", smp, "-m", _memory_size(config, row), "-object", memory]
    return [*argv, "-nodefaults", "-no-user-config", *NO_DISPLAY, "-no-reboot"]


def _memory_size(config: VMConfig, row: MachineType) -> str:
    """Return the memory at the start, and the room for what is plugged later."""
    size = f"{config.memory_mib}M"
    if row.dimms and config.memory_slots and config.max_memory_mib > config.memory_mib:
        return f"{size},slots={config.memory_slots},maxmem={config.max_memory_mib}M"
    return size


def _boot(config: VMConfig, row: MachineType) -> list[str]:
    argv = ["-kernel", str(config.kernel)]
    if config.initrd is not None:
        argv += ["-initrd", str(config.initrd)]
    return [*argv, "-append", kernel_command_line(config, row)]


def kernel_command_line(config: VMConfig, row: MachineType) -> str:
    """Join the parameters of the machine, the root, the agent and the configuration, which wins."""
    ours = f"{COMMON_PARAMS} {row.kernel_params}".split()
    ours += ["console=" + row.console, *_talk(config), f"nr_cpus={config.max_vcpus}"]
    if config.image is not None:
        device = "/dev/vda" + ("1" if config.image_partitioned else "")
        ours += [f"root={device}", f"rootfstype={config.rootfs_type}", "ro"]
    if config.agent_debug:
        ours.append("agent.log=debug")
    if config.container_pipe_size:
        ours.append(f"agent.container_pipe_size={config.container_pipe_size}")
    return " ".join(merge_params(ours, config.kernel_params))


def _talk(config: VMConfig) -> list[str]:
    # A line on a serial console costs a VM exit per character; an error that ends the boot is printed all
    # the same.
    return ["debug"] if config.debug else ["quiet"]


def merge_params(ours: Iterable[str], theirs: Iterable[str]) -> list[str]:
    """Append parameters; one of `theirs` removes those of ours with the same key.

    Theirs are left as they are, because some keys may be repeated (console=).
    """
    theirs = list(theirs)
    keys = {param.partition("=")[0] for param in theirs}
    if keys & {"quiet", "debug", "loglevel"}:
        keys |= {"quiet", "debug", "loglevel"}  # three words for one thing
    return [param for param in ours if param.partition("=")[0] not in keys] + theirs


def _console(wiring: Wiring, row: MachineType) -> list[str]:
    argv = ["-chardev", f"socket,id=console,fd={wiring.console}"]
    if row.serial_device:
        return [*argv, "-device", f"{row.serial_device},chardev=console"]
    return [*argv, "-serial", "chardev:console"]


def _monitor(wiring: Wiring) -> list[str]:
    chardev = f"socket,id=qmp,fd={wiring.qmp},server=on,wait=off"
    return ["-chardev", chardev, "-mon", "chardev=qmp,mode=control"]


def _agent(wiring: Wiring, row: MachineType) -> list[str]:
    argv: list[str] = []
    if wiring.vsock is not None:
        vsock = f"id=vsock,vhostfd={wiring.vsock.descriptor},guest-cid={wiring.vsock.cid}"
        argv += ["-device", _virtio("vhost-vsock", row, vsock)]
    if wiring.agent is not None:
        argv += ["-chardev", f"socket,id=agent,fd={wiring.agent},server=on,wait=off"]
        argv += ["-device", _virtio("virtio-serial", row, "id=serial,max_ports=2")]
        argv += ["-device", f"virtserialport,bus=serial.0,nr=1,chardev=agent,name={AGENT_PORT_NAME}"]
    return argv


def _image(image: Path, row: MachineType) -> list[str]:
    # All VMs share the file and nobody writes, so a lock would only get in the way of replacing it.
    file = f"file.driver=file,file.filename={escape(str(image))},file.locking=off"
    return [
        "-blockdev",
        f"driver=raw,node-name=image,read-only=on,{file}",
        "-device",
        _virtio("virtio-blk", row, "id=image-disk,drive=image"),
    ]


def _entropy(config: VMConfig, row: MachineType) -> list[str]:
    rng = f"rng-random,id=rng,filename={escape(str(config.entropy_source))}"
    return ["-object", rng, "-device", _virtio("virtio-rng", row, "rng=rng")]


def _share(number: int, device: VirtioFS, descriptor: int, row: MachineType) -> list[str]:
    options = f"id=share{number},chardev=share{number}-socket,tag={escape(device.tag)}"
    options += f",queue-size={device.queue_size},event_idx={'on' if SHARE_EVENT_IDX else 'off'}"
    return [
        "-chardev",
        f"socket,id=share{number}-socket,fd={descriptor}",
        "-device",
        _virtio("vhost-user-fs", row, options),
    ]


def _hotplug_ports() -> list[str]:
    argv: list[str] = []
    for number in range(HOTPLUG_PORTS):
        argv += ["-device", f"pcie-root-port,id=port{number},chassis={number + 1},slot={number + 1}"]
    return argv


def _virtio(driver: str, row: MachineType, options: str) -> str:
    """Name a virtio device as this machine has it, without boot ROM and the interface before virtio 1.0."""
    extra = ""
    if row.virtio == "pci":
        # The vhost devices that came after virtio 1.0 have no such property.
        extra = ",romfile=" + ("" if driver.startswith("vhost-") else ",disable-legacy=on")
    return f"{driver}-{row.virtio},{options}{extra}"


def escape(value: str) -> str:
    """Write a value inside an option, where a comma ends it unless it is doubled: qemu(1), "-drive"."""
    return value.replace(",", ",,")
