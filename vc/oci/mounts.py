"""Decide for each mount of a spec how the guest gets it.

Rule: nothing here touches the host or the guest. What the host's files are is asked of a `Look`, so any
situation can be tested; the storage code carries the plan out, in its order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from posixpath import normpath
from typing import Any, Final

from vc.errors import InvalidArgument, Unsupported
from vc.oci.wire import describe, items, members, quoted, string

DEFAULT_SHM_BYTES: Final = 64 << 20  # what Docker, containerd and Kata give to /dev/shm
SHM: Final = "/dev/shm"  # noqa: S108 - a mount point in the container
EMPTY_DIR: Final = "kubernetes.io~empty-dir"  # kubelet: pods/UID/volumes/<plugin>/<name>, plugin escaped
SHM_FLAGS: Final = ("noexec", "nosuid", "nodev")
SHM_OPTIONS: Final = (*SHM_FLAGS, "mode=1777")

# File systems that the guest's kernel makes out of nothing: the guest's own is the right one.
GUEST_FILE_SYSTEMS: Final = frozenset(
    {"binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs", "efivarfs"}
    | {"fusectl", "hugetlbfs", "mqueue", "proc", "pstore", "ramfs", "securityfs", "sysfs", "tmpfs", "tracefs"}
)


class FileKind(Enum):
    """What a path on the host is, symbolic links followed."""

    DIRECTORY = "directory"
    FILE = "regular file"
    BLOCK = "block device"
    CHARACTER = "character device"
    FIFO = "fifo"
    SOCKET = "socket"


@dataclass(frozen=True, slots=True)
class HostFile:
    """What the plan needs to know about a path on the host."""

    kind: FileKind
    file_system: str = ""  # the type that /proc/self/mountinfo shows: tmpfs, hugetlbfs, ext4, …
    file_system_bytes: int = 0  # its size as statfs tells it
    page_bytes: int = 0  # of a hugetlbfs
    gid: int = 0


Look = Callable[[str], HostFile | None]  # None: there is no such path


@dataclass(frozen=True, slots=True)
class Mount:
    """An entry of the spec's `mounts`, complete."""

    destination: str
    source: str = ""
    type: str = ""
    options: tuple[str, ...] = ()

    @property
    def is_bind(self) -> bool:
        """Tell whether a directory or file of the host is meant."""
        return self.type == "bind" or "bind" in self.options or "rbind" in self.options

    @property
    def is_flat(self) -> bool:
        """Tell whether what is mounted below a bind's source is left out."""
        return "bind" in self.options and "rbind" not in self.options

    @property
    def readonly(self) -> bool:
        """Tell whether the last word about it is `ro`."""
        words = [word for word in self.options if word in ("ro", "rw", "rro")]
        return bool(words) and words[-1] != "rw"


class Plan(Enum):
    """What becomes of a mount."""

    SHARE = "share"  # bind the source into the shared directory; the guest binds it from there
    GUEST = "guest"  # the entry goes to the guest as it is
    SHM = "shm"  # bind of the sandbox's /dev/shm in the guest
    EPHEMERAL = "ephemeral"  # a tmpfs or hugetlbfs of the guest that the pod's containers share
    BLOCK = "block"  # plug the block device into the VM
    IGNORE = "ignore"  # dropped; `note` says why


@dataclass(frozen=True, slots=True)
class PlannedMount:
    """One mount and its plan; `host` is what its source is, when that was asked."""

    mount: Mount
    plan: Plan
    host: HostFile | None = None
    note: str = ""  # for the log, when something about it will surprise the user


def read_mounts(spec: Mapping[str, Any]) -> list[Mount]:
    """Return the spec's mounts. Raises: InvalidArgument."""
    return [
        read_mount(entry, f"mounts[{index}]")
        for index, entry in enumerate(items(spec.get("mounts") or (), "mounts"))
    ]


def read_mount(entry: object, path: str) -> Mount:
    """Return one entry, its destination made absolute. Raises: InvalidArgument."""
    fields = members(entry, path)
    destination = string(fields.get("destination") or "", f"{path}.destination")
    if not destination:
        raise InvalidArgument(f"{path}.destination is missing")
    options = items(fields.get("options") or (), f"{path}.options")
    return Mount(
        destination=clean("/" + destination),  # runc and crun take a relative one from the root, too
        source=string(fields.get("source") or "", f"{path}.source"),
        type=string(fields.get("type") or "", f"{path}.type"),
        options=tuple(string(option, f"{path}.options[{at}]") for at, option in enumerate(options)),
    )


def plan_mounts(spec: Mapping[str, Any], look: Look) -> list[PlannedMount]:
    """Decide for every mount, in the spec's order.

    Raises: InvalidArgument, Unsupported.
    """
    return [plan_mount(mount, look, f"mounts[{index}]") for index, mount in enumerate(read_mounts(spec))]


def plan_mount(mount: Mount, look: Look, path: str) -> PlannedMount:
    """Decide for one mount; `path` names it in errors. Raises: InvalidArgument, Unsupported."""
    if not mount.is_bind:
        return _plan_file_system(mount, path)
    if not mount.source.startswith("/"):
        raise InvalidArgument(f"{path}.source: got {describe(mount.source)}, must be an absolute path")
    source = clean(mount.source)
    if is_below(source, "/proc") or is_below(source, "/sys"):
        return PlannedMount(mount, Plan.GUEST)  # the guest's kernel, not the host's, is the container's
    host = look(source)
    if is_ephemeral(source, host):
        return PlannedMount(mount, Plan.EPHEMERAL, host)
    if mount.destination == SHM:
        return PlannedMount(mount, Plan.SHM, host)
    if host is None:
        raise InvalidArgument(f"{path}.source: {quoted(mount.source)} does not exist on the host")
    if host.kind is FileKind.BLOCK:
        return PlannedMount(mount, Plan.BLOCK, host)
    if is_below(source, "/dev") and host.kind is not FileKind.FILE:
        return PlannedMount(mount, Plan.GUEST, host)
    return _plan_share(mount, host)


def refuse_unmade(planned: PlannedMount) -> None:
    """Refuse a mount whose plan nobody can carry out yet. Raises: Unsupported."""
    if planned.plan in (Plan.BLOCK, Plan.EPHEMERAL):
        raise Unsupported(
            f"the mount of {quoted(planned.mount.source)} on {quoted(planned.mount.destination)} needs a"
            f" {planned.plan.value} volume; there are none yet"
        )


def _plan_file_system(mount: Mount, path: str) -> PlannedMount:
    if mount.destination == SHM and mount.type == "tmpfs":
        return PlannedMount(mount, Plan.SHM)
    if mount.type not in GUEST_FILE_SYSTEMS and mount.source.startswith("/"):
        raise Unsupported(
            f"{path} ({mount.destination}): the {mount.type or 'nameless'} file system on the host's "
            f"{quoted(mount.source)} cannot be mounted in the guest; mount it on the host and bind it"
        )
    return PlannedMount(mount, Plan.GUEST)


def _plan_share(mount: Mount, host: HostFile) -> PlannedMount:
    if host.kind is FileKind.CHARACTER:
        note = f"{mount.destination}: the host's character device {mount.source} does not exist in the guest"
        return PlannedMount(mount, Plan.IGNORE, host, note)
    note = ""
    if host.kind in (FileKind.SOCKET, FileKind.FIFO):
        note = (
            f"{mount.destination}: the {host.kind.value} {mount.source} connects nothing across the VM's wall"
        )
    return PlannedMount(mount, Plan.SHARE, host, note)


@dataclass(frozen=True, slots=True)
class MountPoint:
    """A path that the container's root must have."""

    path: str
    is_directory: bool = True


def mount_points(spec: Mapping[str, Any], planned: Sequence[PlannedMount]) -> list[MountPoint]:
    """Return what the root must have for the mounts and for the working directory. Raises: InvalidArgument.

    What is in another mount is not in the root, and is left to the runtime in the guest.
    """
    process = members(spec.get("process") or {}, "process")
    found = [MountPoint(clean("/" + string(process.get("cwd") or "", "process.cwd")))]
    above: list[str] = []
    for entry in planned:
        path = entry.mount.destination
        known = entry.host is not None or not entry.mount.is_bind
        if entry.plan is not Plan.IGNORE and known and not any(is_below(path, place) for place in above):
            found.append(MountPoint(path, entry.host is None or entry.host.kind is FileKind.DIRECTORY))
        above.append(path)
    return found


def is_ephemeral(source: str, host: HostFile | None) -> bool:
    """Tell whether a source is a Kubernetes emptyDir in memory, which then lives in the guest's memory."""
    if host is None or host.kind is not FileKind.DIRECTORY:
        return False
    return source.split("/")[-2:-1] == [EMPTY_DIR] and host.file_system in ("tmpfs", "hugetlbfs")


def shm_flags(mount: Mount) -> tuple[str, ...]:
    """Return the flags with which a container sees the sandbox's /dev/shm.

    A tmpfs says which it wants. A bind would have those of the host's mount, which every manager makes alike.
    """
    wanted = SHM_FLAGS if mount.is_bind else tuple(flag for flag in SHM_FLAGS if flag in mount.options)
    return (*wanted, "ro") if mount.readonly else wanted


def shm_bytes(spec: Mapping[str, Any], look: Look) -> int:
    """Return the size of the sandbox's /dev/shm: its bind source's, or its tmpfs option, or the default.

    Raises: InvalidArgument.
    """
    for mount in read_mounts(spec):
        if mount.destination != SHM:
            continue
        if mount.is_bind:
            host = look(clean(mount.source))
            return (host.file_system_bytes if host else 0) or DEFAULT_SHM_BYTES
        return tmpfs_bytes(mount.options) or DEFAULT_SHM_BYTES
    return DEFAULT_SHM_BYTES


def tmpfs_bytes(options: Sequence[str]) -> int:
    """Return the size that tmpfs options ask for; 0 if they do not say, or say it in per cent."""
    found = 0
    for option in options:
        if match := re.fullmatch(r"size=([0-9]{1,18})([kKmMgG]?)", option):
            found = int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[match[2].lower()]
    return found


def source_of(spec: Mapping[str, Any], destination: str) -> str | None:
    """Return the host path that is bound at a destination, such as /etc/resolv.conf."""
    bound = [
        mount.source for mount in read_mounts(spec) if mount.is_bind and mount.destination == destination
    ]
    return bound[-1] if bound else None


def clean(path: str) -> str:
    """Return the path without `.`, `..`, and doubled slashes."""
    return "/" + normpath(path).lstrip("/")


def is_below(path: str, directory: str) -> bool:
    """Tell whether a clean path is the directory or in it."""
    return path == directory or path.startswith(directory + "/")
