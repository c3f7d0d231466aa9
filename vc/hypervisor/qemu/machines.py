"""What differs between architectures, as a table. A new one is a row here and nothing else.

Sources: the machine documentation of QEMU (docs/system/target-*.rst) for machine options and device names;
Linux, Documentation/admin-guide/kernel-parameters.txt, for kernel parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from vc.errors import Unsupported


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineType:
    """One machine of one architecture."""

    arch: str  # as `uname -m` says
    name: str  # as in -machine
    options: str = ""  # of -machine: devices of the board that no pod needs
    cpu_tcg: str = "max"
    console: str  # the kernel's console that works before any module is loaded
    serial_device: str  # the device behind it; empty: the machine has it, and -serial connects it
    virtio: str = "pci"  # the suffix of virtio devices
    pcie: bool = False  # devices can be plugged into pcie-root-ports
    dimms: bool = False  # memory can be plugged as pc-dimm
    kernel_params: str = ""


# Parameters for any machine. panic=-1 and -no-reboot make a panic the end of the VMM, at once, and oops=panic
# makes every error of the kernel one: after an error it may have processes that nobody can reap.
# memhp_default_state: plugged memory is in use when the guest has answered, without anybody's further doing.
COMMON_PARAMS = (
    "panic=-1 oops=panic rcupdate.rcu_expedited=1 cryptomgr.notests net.ifnames=0 memhp_default_state=online"
)

# swiotlb=noforce: because memory could be plugged above 4 GiB, the kernel would set 64 MiB aside for devices
# that cannot reach it; virtio devices can.
# tsc=reliable, no_timer_check, lpj: no calibration loops. i8042, 8250.nr_uarts: no probing of what is not
# there.
X86_PARAMS = (
    "reboot=k tsc=reliable no_timer_check noreplace-smp i8042.noaux=1 i8042.nokbd=1 i8042.nopnp=1"
    " i8042.dumbkbd=1 8250.nr_uarts=1 pci=lastbus=0 swiotlb=noforce"
)

_Q35 = MachineType(
    arch="x86_64",
    name="q35",
    options="usb=off,sata=off,smbus=off,vmport=off",
    cpu_tcg="max,erms=off,fsrm=off",  # with them the kernel copies by `rep movsb`, a byte at a time under TCG
    console="ttyS0",
    serial_device="isa-serial",
    pcie=True,
    dimms=True,
    kernel_params=X86_PARAMS,
)

_TABLE = (
    _Q35,
    MachineType(
        arch="aarch64",
        name="virt",
        options="usb=off,gic-version=max",
        console="ttyAMA0",
        serial_device="",
        pcie=True,
        kernel_params="iommu.passthrough=0",
    ),
    MachineType(
        arch="s390x", name="s390-ccw-virtio", console="ttysclp0", serial_device="sclpconsole", virtio="ccw"
    ),
    MachineType(arch="ppc64le", name="pseries", console="hvc0", serial_device="spapr-vty"),
    MachineType(arch="riscv64", name="virt", console="ttyS0", serial_device="", pcie=True),
)

MACHINES = MappingProxyType({(row.arch, row.name): row for row in _TABLE})


def machine_type(arch: str, name: str) -> MachineType:
    """Find the row. Raises: Unsupported, with what there is."""
    row = MACHINES.get((arch, name))
    if row is None:
        known = ", ".join(key[1] for key in MACHINES if key[0] == arch) or "none"
        raise Unsupported(f'no machine type "{name}" for {arch}; there is: {known}')
    return row
