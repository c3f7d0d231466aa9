"""Devices that the host gives to a container: find them in the guest, and put their numbers into the spec.

The host names a device by where it is plugged in (a path of PCI slots, a SCSI address); what the guest's
kernel called it is found in sysfs, after it has appeared. The spec that came with the request has the
host's numbers.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from agent import uevents
from agent.errors import InvalidArgument, NotFound

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agent.schema import agent as messages
    from agent.schema import oci

SYSFS = "/sys"
ROOT_BUS = "devices/pci0000:00"

TYPES = ("blk", "mmioblk", "nvdimm", "scsi")


def parse_pci_path(text: str) -> list[tuple[int, int]]:
    """Parse a PCI path: slots of two hexadecimal digits from the root, "02/01"; a function may follow,
    "02.1".

    Raises:
        InvalidArgument: it is none.
    """
    result = []
    for part in text.split("/"):
        slot, _, function = part.partition(".")
        try:
            numbers = (int(slot, 16), int(function or "0", 16))
        except ValueError:
            numbers = (-1, 0)
        if len(slot) != 2 or not 0 <= numbers[0] <= 0x1F or not 0 <= numbers[1] <= 7:
            raise InvalidArgument(f'"{text}" is no PCI path: slots from 00 to 1f, joined by "/", are')
        result.append(numbers)
    return result


def pci_sysfs_path(path: str, sysfs: str = SYSFS) -> str:
    """Return the directory of the PCI device at a path. Every bridge on the way must be there.

    Raises:
        NotFound: a bridge has no bus (yet).
        InvalidArgument: it is no PCI path.
    """
    directory, bus = f"{sysfs}/{ROOT_BUS}", "0000:00"
    slots = parse_pci_path(path)
    for index, (slot, function) in enumerate(slots):
        directory += f"/{bus}:{slot:02x}.{function}"
        if index + 1 < len(slots):
            try:
                buses = os.listdir(f"{directory}/pci_bus")
            except FileNotFoundError:
                raise NotFound(f"PCI path {path}: no bridge at {directory}") from None
            if len(buses) != 1:
                raise NotFound(f"PCI path {path}: the bridge at {directory} has {len(buses)} buses, not 1")
            bus = buses[0]
    return directory


def block_device(driver: str, address: str) -> str:
    """Return the node of a block device, when it has appeared.

    `address` is a PCI path for "blk", "id:lun" for "scsi", a node for the others (and for "blk", too).
    """
    if address.startswith("/dev/"):
        uevents.wait_for(lambda: os.path.exists(address), f"device {address}")
        return address
    if driver == "blk":
        return uevents.wait_for(lambda: _pci_block(address), f"block device at PCI path {address}")
    if driver == "scsi":
        target, _, lun = address.partition(":")
        if not target.isdigit() or not lun.isdigit():
            raise InvalidArgument(f'"{address}" is no SCSI address: <id>:<lun> is one')
        scan_scsi(int(target), int(lun))
        return uevents.wait_for(lambda: _scsi_block(int(target), int(lun)), f"SCSI device {address}")
    raise InvalidArgument(f'device "{address}" of type "{driver}" must be given by its node in /dev')


def _pci_block(path: str) -> str | None:
    try:
        directory = pci_sysfs_path(path)
        for child in os.listdir(directory):
            if child.startswith("virtio"):
                for name in os.listdir(f"{directory}/{child}/block"):
                    return _node(name)
    except (OSError, NotFound):
        pass
    return None


def _node(name: str) -> str | None:
    return f"/dev/{name}" if os.path.exists(f"/dev/{name}") else None


def scan_scsi(target: int, lun: int) -> None:
    """Ask every SCSI host to look for a device."""
    base = f"{SYSFS}/class/scsi_host"
    for host in os.listdir(base) if os.path.isdir(base) else []:
        with open(f"{base}/{host}/scan", "w", encoding="utf-8") as file:
            file.write(f"0 {target} {lun}")


def _scsi_block(target: int, lun: int) -> str | None:
    base = f"{SYSFS}/class/scsi_disk"
    for name in os.listdir(base) if os.path.isdir(base) else []:
        if name.endswith(f":0:{target}:{lun}"):
            for block in os.listdir(f"{base}/{name}/device/block"):
                return _node(block)
    return None


def prepare(devices: Iterable[messages.Device], spec: oci.Spec) -> None:
    """Find the devices and put the guest's numbers into the spec.

    Raises:
        InvalidArgument: a device has a type that we do not know, or is not in the spec.
    """
    found = {}
    for entry in devices:
        if entry.type not in TYPES:
            raise InvalidArgument(f'unknown device type "{entry.type}"; known are {", ".join(TYPES)}')
        found[entry.container_path] = _numbers(block_device(entry.type, entry.vm_path or entry.id))
    rewrite(spec, found)


def _numbers(node: str) -> tuple[int, int]:
    status = os.stat(node)
    if not stat.S_ISBLK(status.st_mode) and not stat.S_ISCHR(status.st_mode):
        raise InvalidArgument(f"{node} is no device")
    return os.major(status.st_rdev), os.minor(status.st_rdev)


def rewrite(spec: oci.Spec, numbers: dict[str, tuple[int, int]]) -> None:
    """Give devices of the spec, by their path in the container, these numbers, and their rules too."""
    changed: dict[tuple[str, int, int], tuple[int, int]] = {}
    for path, new in numbers.items():
        node = next((device for device in spec.Linux.Devices if device.Path == path), None)
        if node is None:
            raise InvalidArgument(f'device "{path}" is not in the spec')
        changed[node.Type, node.Major, node.Minor] = new
        node.Major, node.Minor = new
    for rule in spec.Linux.Resources.Devices:
        new_numbers = changed.get((rule.Type, rule.Major, rule.Minor))
        if new_numbers is not None:
            rule.Major, rule.Minor = new_numbers
