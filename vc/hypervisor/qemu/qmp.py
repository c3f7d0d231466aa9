"""QMP as data: the commands that we give and the events that we understand.

QMP is JSON over a stream. A command is {"execute": name, "arguments": {...}} and is answered by {"return":
...} or {"error": {"class", "desc"}}; events {"event": name, "data": {...}, "timestamp": ...} come at any
time. Framing, ids and the capabilities negotiation are the library's (qemu.qmp).

The rule of this file: no I/O, no clock. QEMU is the other side, and a guest that broke out of it may write
here: events are read with care, and what is not understood is None.

Source: QEMU QMP Reference Manual; each command and event is named there as it is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Command:
    """One command and its arguments."""

    name: str
    arguments: Mapping[str, object] = field(default_factory=dict)


def stop() -> Command:
    """Stop all vCPUs."""
    return Command("stop")


def cont() -> Command:
    """Let all vCPUs run."""
    return Command("cont")


def query_status() -> Command:
    """Ask whether the machine runs."""
    return Command("query-status")


def getfd(name: str) -> Command:
    """Give a name to the descriptor that was sent with this command."""
    return Command("getfd", {"fdname": name})


def chardev_add_socket(chardev: str, fdname: str) -> Command:
    """Make a character device of a connected socket that `getfd` has named."""
    address = {"type": "fd", "data": {"str": fdname}}
    backend = {"type": "socket", "data": {"addr": address, "server": False}}
    return Command("chardev-add", {"id": chardev, "backend": backend})


def chardev_remove(chardev: str) -> Command:
    """Remove a character device that no device uses."""
    return Command("chardev-remove", {"id": chardev})


def add_fd(fdset: int) -> Command:
    """Make a set of descriptors of the one that was sent with this command: the file /dev/fdset/<fdset>."""
    return Command("add-fd", {"fdset-id": fdset})


def remove_fd(fdset: int) -> Command:
    """Close the set's descriptor; whoever has opened its file has a copy."""
    return Command("remove-fd", {"fdset-id": fdset})


def blockdev_add(node: str, fdset: int, *, block: bool, read_only: bool) -> Command:
    """Make a disk of the bytes in a descriptor's file, or of the block device that it is."""
    file = {"driver": "host_device" if block else "file", "filename": f"/dev/fdset/{fdset}"}
    arguments = {"driver": "raw", "node-name": node, "read-only": read_only, "file": file}
    return Command("blockdev-add", arguments)


def blockdev_del(node: str) -> Command:
    """Remove a disk that no device uses."""
    return Command("blockdev-del", {"node-name": node})


def object_add_memfd(name: str, size_bytes: int) -> Command:
    """Make memory that a device can be made of, and that others can map."""
    arguments = {"qom-type": "memory-backend-memfd", "id": name, "size": size_bytes, "share": True}
    return Command("object-add", arguments)


def object_del(name: str) -> Command:
    """Remove an object that no device uses."""
    return Command("object-del", {"id": name})


def query_hotpluggable_cpus() -> Command:
    """Ask for the places of processors: see `parse_free_processors_untrusted`."""
    return Command("query-hotpluggable-cpus")


def device_add(driver: str, device: str, properties: Mapping[str, object]) -> Command:
    """Plug a device."""
    return Command("device_add", {"driver": driver, "id": device, **properties})


def device_del(device: str) -> Command:
    """Ask the guest to give a device back; it is gone when `DeviceDeleted` comes."""
    return Command("device_del", {"id": device})


def migrate_set_capabilities(*names: str) -> Command:
    """Switch capabilities of migration on."""
    capabilities = [{"capability": name, "state": True} for name in names]
    return Command("migrate-set-capabilities", {"capabilities": capabilities})


def migrate(fdname: str) -> Command:
    """Begin to write the machine's state to a descriptor that `getfd` has named."""
    return Command("migrate", {"uri": f"fd:{fdname}"})


def migrate_incoming(fdname: str) -> Command:
    """Begin to read the machine's state from a descriptor that `getfd` has named."""
    return Command("migrate-incoming", {"uri": f"fd:{fdname}"})


@dataclass(frozen=True, slots=True)
class Shutdown:
    """The machine ends. `by_guest`: the guest did it; the reason is QEMU's ShutdownCause."""

    by_guest: bool
    reason: str


@dataclass(frozen=True, slots=True)
class DeviceDeleted:
    """The guest has given a device back."""

    device: str


@dataclass(frozen=True, slots=True)
class GuestAnswer:
    """The guest tells what became of memory or of a processor: a status of ACPI's _OST, 0 for success."""

    device: str
    status: int


@dataclass(frozen=True, slots=True)
class Stopped:
    """The vCPUs stand still, by our order or by an error of the machine."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """The vCPUs run again."""


@dataclass(frozen=True, slots=True)
class Migrated:
    """A migration, in or out, has come to its end."""

    completed: bool


Event = Shutdown | DeviceDeleted | GuestAnswer | Stopped | Resumed | Migrated

# The others are not asked for.
EVENT_NAMES = ("SHUTDOWN", "DEVICE_DELETED", "ACPI_DEVICE_OST", "STOP", "RESUME", "MIGRATION")


def parse_event_untrusted(message: Mapping[str, object]) -> Event | None:
    """Read an event; None if it is none of ours, or not what the manual says."""
    name = message.get("event")
    data = message.get("data")
    data = data if isinstance(data, Mapping) else {}
    if name == "SHUTDOWN":
        return Shutdown(data.get("guest") is True, str(data.get("reason", "unknown"))[:64])
    if name == "DEVICE_DELETED":
        device = data.get("device")
        return DeviceDeleted(device) if isinstance(device, str) else None
    if name == "ACPI_DEVICE_OST":
        return _guest_answer(data.get("info"))
    if name == "MIGRATION" and data.get("status") in _MIGRATION_ENDS:
        return Migrated(data.get("status") == "completed")
    if name == "STOP":
        return Stopped()
    if name == "RESUME":
        return Resumed()
    return None


def _guest_answer(info: object) -> GuestAnswer | None:
    """Read an ACPIOSTInfo of the manual; a device that is not ours has no name."""
    info = info if isinstance(info, Mapping) else {}
    device, status = info.get("device"), info.get("status")
    return GuestAnswer(device, status) if isinstance(device, str) and type(status) is int else None


def parse_free_processors_untrusted(answer: object) -> list[tuple[str, Mapping[str, object]]]:
    """Return driver and place of each processor that can be plugged: HotpluggableCPU of the manual."""
    found: list[tuple[str, Mapping[str, object]]] = []
    for slot in answer if isinstance(answer, list) else ():
        if isinstance(slot, Mapping) and "qom-path" not in slot:
            driver, place = slot.get("type"), slot.get("props")
            if isinstance(driver, str) and isinstance(place, Mapping):
                found.append((driver, place))
    return sorted(found, key=lambda slot: str(sorted(slot[1].items())))


_MIGRATION_ENDS = ("completed", "failed", "cancelled")  # MigrationStatus of the manual

# ShutdownCause of the manual, for what a guest can bring about itself
_GUEST_REASONS = {
    "guest-shutdown": "the guest powered itself off",
    "guest-reset": "the guest restarted itself, as its kernel does after a panic",
    "guest-panic": "the guest's kernel panicked",
}


def describe_shutdown(event: Shutdown) -> str:
    """Say why the machine ended."""
    return _GUEST_REASONS.get(event.reason, f"the machine was shut down ({event.reason})")
