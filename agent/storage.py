"""Storages: what the host asks to be mounted for a sandbox or a container, by driver.

A mount point has one mount however many containers ask for it; the last one that is removed takes it away.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from agent import mounts
from agent.errors import InvalidArgument

if TYPE_CHECKING:
    from agent.schema import agent as messages

DRIVERS = ("virtio-fs", "9p", "ephemeral", "local", "bind", "overlayfs", "blk", "scsi", "nvdimm", "mmioblk")


class Storages:
    """The mounts of the sandbox, counted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: dict[str, int] = {}

    def add(self, entry: messages.Storage) -> None:
        """Mount, or count one more user of what is mounted there."""
        with self._lock:
            if entry.mount_point not in self._users:
                self._mount(entry)
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
            for mount_point in reversed(list(self._users)):
                mounts.unmount(mount_point)
            self._users.clear()

    def _mount(self, entry: messages.Storage) -> None:
        if entry.driver not in DRIVERS:
            raise InvalidArgument(f'unknown storage driver "{entry.driver}"; known are {", ".join(DRIVERS)}')
        os.makedirs(entry.mount_point, exist_ok=True)
        mounts.mount(entry.source, entry.mount_point, entry.fstype, list(entry.options))
