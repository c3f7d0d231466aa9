"""Storages: what the host asks to be mounted for a sandbox or a container, by driver.

A mount point has one mount however many containers ask for it; the last one that is removed takes it away.
Drivers are in a table; each brings the source to where it can be mounted, and the rest is the same for all.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from typing import TYPE_CHECKING

from agent import mounts
from agent.errors import InvalidArgument, NotFound, RuntimeFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from agent.schema import agent as messages

SETGID = 0o2000
GROUP_RW, GROUP_RO, GROUP_SEARCH = 0o660, 0o440, 0o110  # what Kubernetes' fsGroup adds to modes
ON_ROOT_MISMATCH = 1  # types.FSGroupChangePolicy.OnRootMismatch
HUGE_PAGES = "/sys/kernel/mm/hugepages"
MAX_ID_DIGITS = 10  # of a group's number: they have 32 bits


class Storages:
    """The mounts of the sandbox, counted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: dict[str, int] = {}

    def add(self, entry: messages.Storage) -> None:
        """Mount, or count one more user of what is mounted there."""
        driver = _DRIVERS.get(entry.driver)
        if driver is None:
            raise InvalidArgument(f'unknown storage driver "{entry.driver}"; known are {", ".join(_DRIVERS)}')
        if not entry.mount_point.startswith("/") or ".." in entry.mount_point.split("/"):
            raise InvalidArgument(f'mount point "{entry.mount_point}" is not an absolute path without ".."')
        with self._lock:
            if entry.mount_point not in self._users:
                driver(entry)
                try:
                    _set_group(entry)
                except BaseException:
                    mounts.unmount(entry.mount_point)
                    raise
                self._users[entry.mount_point] = 0
            self._users[entry.mount_point] += 1

    def release(self, mount_point: str) -> None:
        """Count one user less; the last one unmounts."""
        with self._lock:
            left = self._users.get(mount_point, 0) - 1
            if left > 0:
                self._users[mount_point] = left
            elif left == 0:
                del self._users[mount_point]
                mounts.unmount(mount_point)

    def release_all(self) -> None:
        """Unmount everything, the newest first."""
        with self._lock:
            for mount_point in reversed(self._users):
                mounts.unmount(mount_point)
            self._users.clear()

    def remount(self, entry: messages.Storage) -> None:
        """Change the options of an ephemeral storage that is mounted."""
        _, options = split_group(entry.options)
        with self._lock:
            if entry.mount_point not in self._users:
                raise NotFound(f"no storage is mounted on {entry.mount_point}")
            mounts.mount("", entry.mount_point, entry.fstype, ["remount", *options])


def handlers() -> list[str]:
    """Return the names of all drivers."""
    return list(_DRIVERS)


def split_group(options: Iterable[str]) -> tuple[int | None, list[str]]:
    """Take the option fsgid=G, which is the agent's and not the file system's, out of the others."""
    group, rest = None, []
    for option in options:
        name, _, value = option.partition("=")
        if name != "fsgid":
            rest.append(option)
        elif value.isascii() and value.isdigit() and len(value) <= MAX_ID_DIGITS:
            group = int(value)
        else:
            raise InvalidArgument(f'storage option "{option}": the group is no number')
    return group, rest


def find_option(options: Iterable[str], wanted: str) -> str | None:
    """Return the value of an option name=value."""
    found = None
    for option in options:
        name, separator, value = option.partition("=")
        if name == wanted and separator:
            found = value
    return found


# Drivers


def _plain(entry: messages.Storage) -> None:
    """Mount as it says: shares, overlays, binds."""
    os.makedirs(entry.mount_point, exist_ok=True)
    mounts.mount(entry.source, entry.mount_point, entry.fstype, entry.options)


def _share(entry: messages.Storage) -> None:
    """Mount what a device of the VM shares, when the device has appeared."""
    from agent import uevents

    os.makedirs(entry.mount_point, exist_ok=True)

    def mounted() -> bool:
        try:
            mounts.mount(entry.source, entry.mount_point, entry.fstype, entry.options)
        except RuntimeFailed as exc:
            # The kernel's answer as long as no device has that tag: virtio_fs_get_tree, fs/fuse/virtio_fs.c
            if isinstance(exc.__cause__, OSError) and exc.__cause__.errno == errno.EINVAL:
                return False
            raise
        return True

    uevents.wait_for(mounted, f'the shared file system "{entry.source}"')


def _bind(entry: messages.Storage) -> None:
    """Bind a directory or file."""
    if os.path.isdir(entry.source):
        os.makedirs(entry.mount_point, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(entry.mount_point), exist_ok=True)
        os.close(os.open(entry.mount_point, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    mounts.mount(entry.source, entry.mount_point, "bind", entry.options)


def _block(entry: messages.Storage) -> None:
    """Mount the file system on a device, when the device has appeared."""
    from agent import devices

    kind = {"blk-ccw": "mmioblk"}.get(entry.driver, entry.driver)
    node = devices.block_device(kind, entry.source)
    os.makedirs(entry.mount_point, exist_ok=True)
    mounts.mount(node, entry.mount_point, entry.fstype, entry.options)


def _ephemeral(entry: messages.Storage) -> None:
    """Mount memory: tmpfs, or huge pages."""
    group, options = split_group(entry.options)
    fstype = entry.fstype or "tmpfs"
    if fstype == "hugetlbfs":
        _reserve_huge_pages(options)
    os.makedirs(entry.mount_point, exist_ok=True)
    mounts.mount(entry.source or fstype, entry.mount_point, fstype, options)
    if group is not None:
        _give_to_group(entry.mount_point, group)


def _local(entry: messages.Storage) -> None:
    """Make a directory, which containers share; there is nothing to mount."""
    group, options = split_group(entry.options)
    os.makedirs(entry.mount_point, exist_ok=True)
    mode = find_option(options, "mode")
    if mode:
        try:
            os.chmod(entry.mount_point, int(mode, 8))
        except ValueError:
            raise InvalidArgument(f'storage option "mode={mode}" is no octal number') from None
    if group is not None:
        _give_to_group(entry.mount_point, group)


_DRIVERS: dict[str, Callable[[messages.Storage], None]] = {
    "virtio-fs": _share,
    "9p": _plain,
    "overlayfs": _plain,
    "bind": _bind,
    "watchable-bind": _bind,  # a bind shows changes by itself, where the share does
    "blk": _block,
    "blk-ccw": _block,
    "mmioblk": _block,
    "scsi": _block,
    "nvdimm": _block,
    "ephemeral": _ephemeral,
    "local": _local,
}


def _give_to_group(path: str, group: int) -> None:
    os.chown(path, -1, group)
    os.chmod(path, stat.S_IMODE(os.stat(path).st_mode) | SETGID)


def _is_size(text: str | None) -> bool:
    """Tell whether it is a number of bytes that the kernel could take."""
    return text is not None and text.isascii() and text.isdigit() and len(text) < 20


def _reserve_huge_pages(options: Iterable[str]) -> None:
    """Have the kernel set pages aside: "pagesize" and "size" of a hugetlbfs are bytes."""
    page, size = find_option(options, "pagesize"), find_option(options, "size")
    if not _is_size(page) or not _is_size(size) or page is None or size is None or not int(page):
        raise InvalidArgument("huge pages need the options pagesize and size, in bytes")
    path = f"{HUGE_PAGES}/hugepages-{int(page) // 1024}kB/nr_hugepages"
    wanted = -(-int(size) // int(page))
    with open(path, "r+", encoding="utf-8") as file:
        reserved = int(file.read())
        file.seek(0)
        file.write(str(reserved + wanted))
    with open(path, encoding="utf-8") as file:
        got = int(file.read()) - reserved
    if got < wanted:
        raise RuntimeFailed(f"the guest has only {got} of {wanted} huge pages of {page} bytes")


# Kubernetes' fsGroup


def _set_group(entry: messages.Storage) -> None:
    if not entry.HasField("fs_group"):
        return
    group = entry.fs_group.group_id
    root = entry.mount_point
    if entry.fs_group.group_change_policy == ON_ROOT_MISMATCH and os.stat(root).st_gid == group:
        return
    read_only = "ro" in entry.options
    for directory, names, files in os.walk(root):
        _own(directory, group, (GROUP_RO if read_only else GROUP_RW) | GROUP_SEARCH | SETGID)
        for name in (*files, *(name for name in names if os.path.islink(f"{directory}/{name}"))):
            _own(f"{directory}/{name}", group, GROUP_RO if read_only else GROUP_RW)


def _own(path: str, group: int, mode: int) -> None:
    status = os.lstat(path)
    os.chown(path, -1, group, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(path, stat.S_IMODE(status.st_mode) | mode)
