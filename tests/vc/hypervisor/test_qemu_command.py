"""QEMU's command line as data: each list below is the whole of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from vc.errors import Unsupported
from vc.hypervisor.base import VirtioFS, VMConfig
from vc.hypervisor.qemu.command import (
    HOTPLUG_PORTS,
    Vsock,
    Wiring,
    command_line,
    kernel_command_line,
    merge_params,
)
from vc.hypervisor.qemu.driver import agent_transport
from vc.hypervisor.qemu.machines import COMMON_PARAMS, MACHINES, X86_PARAMS, machine_type

VMID = "0123456789abcdef"
UUID = "1119305b-ef8a-4fe5-9d2c-f05c4f32bba4"
CONFIG = VMConfig(
    qemu=Path("/usr/bin/qemu-system-x86_64"),
    kernel=Path("/guest/vmlinux"),
    initrd=Path("/guest/initrd.img"),
    image=Path("/guest/rootfs.erofs"),
    rootfs_type="erofs",
    memory_mib=512,
    accelerator="tcg",
)
WIRING = Wiring(qmp=10, console=11, agent=12)
Q35 = machine_type("x86_64", "q35")

HEAD = ["/usr/bin/qemu-system-x86_64", "-name", f"sandbox-{VMID},debug-threads=on", "-uuid", UUID]
MEMORY = "memory-backend=memory,dump-guest-core=off,mem-merge=off"
BOARD = f"q35,{MEMORY},usb=off,sata=off,smbus=off,vmport=off"
MACHINE = [
    *("-machine", BOARD, "-accel", "tcg,tb-size=256", "-cpu", Q35.cpu_tcg),
    *("-smp", "cpus=1,sockets=2,cores=1,threads=1,maxcpus=2"),
    *("-m", "512M", "-object", "memory-backend-memfd,id=memory,size=512M,share=on"),
]
BARE = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
PARAMS = f"{COMMON_PARAMS} {X86_PARAMS} console=ttyS0 quiet nr_cpus=1 root=/dev/vda rootfstype=erofs ro"
BOOT = ["-kernel", "/guest/vmlinux", "-initrd", "/guest/initrd.img", "-append", PARAMS]
CONSOLE = ["-chardev", "socket,id=console,fd=11", "-device", "isa-serial,chardev=console"]
QMP = ["-chardev", "socket,id=qmp,fd=10,server=on,wait=off", "-mon", "chardev=qmp,mode=control"]
AGENT = [
    *("-chardev", "socket,id=agent,fd=12,server=on,wait=off"),
    *("-device", "virtio-serial-pci,id=serial,max_ports=2,romfile=,disable-legacy=on"),
    *("-device", "virtserialport,bus=serial.0,nr=1,chardev=agent,name=agent.channel.0"),
]
FILE = "file.driver=file,file.filename=/guest/rootfs.erofs,file.locking=off"
IMAGE = [
    *("-blockdev", f"driver=raw,node-name=image,read-only=on,{FILE}"),
    *("-device", "virtio-blk-pci,id=image-disk,drive=image,romfile=,disable-legacy=on"),
]
ENTROPY = [
    *("-object", "rng-random,id=rng,filename=/dev/urandom"),
    *("-device", "virtio-rng-pci,rng=rng,romfile=,disable-legacy=on"),
]
SHARE = [
    *("-chardev", "socket,id=share0-socket,fd=13"),
    "-device",
    "vhost-user-fs-pci,id=share0,chardev=share0-socket,tag=kataShared,queue-size=1024,event_idx=off,romfile=",
]
PORTS = [
    part
    for n in range(HOTPLUG_PORTS)
    for part in ("-device", f"pcie-root-port,id=port{n},chassis={n + 1},slot={n + 1}")
]
SANDBOX = ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]


def argv(config: VMConfig = CONFIG, wiring: Wiring = WIRING) -> list[str]:
    return command_line(config, wiring, vmid=VMID, uuid=UUID)


def without_firmware(line: list[str]) -> list[str]:
    """Drop -bios and its file, which depends on what this host has installed."""
    if "-bios" not in line:
        return line
    at = line.index("-bios")
    return line[:at] + line[at + 2 :]


def test_a_machine_with_an_image_and_a_share() -> None:
    wiring = replace(WIRING, shares=((VirtioFS(Path("/vm/virtiofs.sock")), 13),))
    expected = (
        HEAD + MACHINE + BARE + BOOT + CONSOLE + QMP + AGENT + IMAGE + ENTROPY + SHARE + PORTS + SANDBOX
    )
    assert without_firmware(argv(CONFIG, wiring)) == expected


def test_a_machine_whose_initrd_is_all_it_has() -> None:
    config = replace(CONFIG, image=None)
    boot = [*BOOT[:-1], f"{COMMON_PARAMS} {X86_PARAMS} console=ttyS0 quiet nr_cpus=1"]
    expected = HEAD + MACHINE + BARE + boot + CONSOLE + QMP + AGENT + ENTROPY + PORTS + SANDBOX
    assert without_firmware(argv(config)) == expected


def test_vsock_takes_the_place_of_the_serial_port() -> None:
    wiring = Wiring(qmp=10, console=11, vsock=Vsock(descriptor=14, cid=77))
    device = "vhost-vsock-pci,id=vsock,vhostfd=14,guest-cid=77,romfile="
    vsock = ["-device", device]
    expected = HEAD + MACHINE + BARE + BOOT + CONSOLE + QMP + vsock + IMAGE + ENTROPY + PORTS + SANDBOX
    assert without_firmware(argv(CONFIG, wiring)) == expected


def test_kvm_runs_the_hosts_cpu_with_the_configured_features() -> None:
    config = replace(
        CONFIG, accelerator="kvm", cpu_features="pmu=off", machine_accelerators="kernel_irqchip=split"
    )
    line = argv(config)
    assert line[line.index("-cpu") + 1] == "host,pmu=off"
    machine = line[line.index("-machine") + 1]
    assert machine.startswith("q35,") and machine.endswith(",kernel_irqchip=split")
    assert line[line.index("-accel") + 1] == "kvm"
    assert "maxcpus=1" in line[line.index("-smp") + 1]


def test_free_vcpus_are_sockets() -> None:
    line = argv(replace(CONFIG, vcpus=2, max_vcpus=8))
    assert line[line.index("-smp") + 1] == "cpus=2,sockets=8,cores=1,threads=1,maxcpus=8"
    assert "nr_cpus=8" in line[line.index("-append") + 1].split()


def test_vcpus_that_must_not_run_in_parallel_share_a_thread() -> None:
    line = argv(replace(CONFIG, vcpus=2, max_vcpus=2, parallel_vcpus=False))
    assert line[line.index("-accel") + 1] == "tcg,tb-size=256,thread=single"


def test_a_comma_in_a_path_does_not_begin_an_option() -> None:
    config = replace(CONFIG, image=Path("/a,read-only=off"), entropy_source=Path("/dev/x,y"))
    line = argv(config)
    assert "file.filename=/a,,read-only=off,file.locking=off" in line[line.index("-blockdev") + 1]
    assert "rng-random,id=rng,filename=/dev/x,,y" in line


def test_the_configured_seccomp_filter_replaces_ours() -> None:
    assert argv(replace(CONFIG, seccomp_sandbox="on"))[-2:] == ["-sandbox", "on"]


def test_an_image_with_partitions_has_its_root_on_the_first() -> None:
    params = kernel_command_line(replace(CONFIG, image_partitioned=True), Q35).split()
    assert "root=/dev/vda1" in params and "root=/dev/vda" not in params


def test_debug_lets_the_kernel_and_the_agent_talk() -> None:
    params = kernel_command_line(replace(CONFIG, debug=True, agent_debug=True), Q35).split()
    assert {"debug", "agent.log=debug"} <= set(params) and "quiet" not in params


@pytest.mark.parametrize(
    ("ours", "theirs", "merged"),
    [
        (["a=1", "b"], [], ["a=1", "b"]),
        (["a=1", "b"], ["a=2"], ["b", "a=2"]),
        (["a=1", "b"], ["b"], ["a=1", "b"]),
        (["console=ttyS0"], ["console=hvc0", "console=hvc1"], ["console=hvc0", "console=hvc1"]),
        (["quiet"], ["debug"], ["debug"]),
        (["quiet"], ["loglevel=7"], ["loglevel=7"]),
        (["debug"], ["quiet"], ["quiet"]),
    ],
)
def test_parameters_of_the_configuration_win(ours: list[str], theirs: list[str], merged: list[str]) -> None:
    assert merge_params(ours, theirs) == merged


@pytest.mark.parametrize("key", MACHINES)
def test_every_machine_of_the_table_gives_a_command_line(key: tuple[str, str]) -> None:
    config = replace(CONFIG, arch=key[0], machine_type=key[1])
    line = argv(config)
    row = MACHINES[key]
    assert line[line.index("-machine") + 1].startswith(f"{row.name},")
    assert f"console={row.console}" in line[line.index("-append") + 1].split()
    assert any(part.startswith(f"virtio-blk-{row.virtio},") for part in line)
    assert any(part.startswith("pcie-root-port") for part in line) is row.pcie


def test_an_unknown_machine_is_refused_with_what_there_is() -> None:
    with pytest.raises(Unsupported, match='"microvm" for x86_64; there is: q35'):
        argv(replace(CONFIG, machine_type="microvm"))


@pytest.mark.parametrize(
    ("requested", "has_vsock", "chosen"),
    [
        ("auto", True, "vsock"),
        ("auto", False, "virtio-serial"),
        ("virtio-serial", True, "virtio-serial"),
        ("vsock", True, "vsock"),
    ],
)
def test_the_transport_is_what_the_host_can_do(requested: str, has_vsock: bool, chosen: str) -> None:
    assert agent_transport(requested, has_vsock=has_vsock) == chosen


@pytest.mark.parametrize("requested", ["vsock", "hybrid-vsock"])
def test_a_transport_that_cannot_be_is_refused(requested: str) -> None:
    with pytest.raises(Unsupported, match=requested):
        agent_transport(requested, has_vsock=False)


def memory_size(**changes: int | str) -> str:
    line = argv(replace(CONFIG, **changes))  # type: ignore[arg-type]
    return line[line.index("-m") + 1]


def test_there_is_room_for_memory_if_some_can_come() -> None:
    assert memory_size(memory_slots=10, max_memory_mib=2048) == "512M,slots=10,maxmem=2048M"
    for none in ({"memory_slots": 10}, {"max_memory_mib": 2048}, {"memory_slots": 10, "max_memory_mib": 512}):
        assert memory_size(**none) == "512M"


def test_a_machine_without_a_place_for_modules_has_no_room() -> None:
    assert memory_size(memory_slots=10, max_memory_mib=2048, machine_type="virt", arch="aarch64") == "512M"
