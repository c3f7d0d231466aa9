"""Mount points in a container's root, made as the container itself would find them.

A runtime makes a mount point that is missing. In a root that is read-only for the whole guest it cannot, so
the host makes them before. The root is an image of somebody: its links lead back into it, never to the host.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from vc.oci.mounts import MountPoint

SYS_OPENAT2 = 437  # asm-generic/unistd.h
# linux/openat2.h
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_IN_ROOT = 0x10

_libc = ctypes.CDLL(None, use_errno=True)


def make_mount_points(root: Path, wanted: Iterable[MountPoint]) -> None:
    """Make what is missing below `root`. What cannot be made is left for the runtime to complain of."""
    base = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for point in wanted:
            try:
                _make(base, [name for name in point.path.split("/") if name], point.is_directory)
            except OSError:
                pass
    finally:
        os.close(base)


def _make(base: int, names: list[str], is_directory: bool) -> None:
    for count in range(1, len(names) + 1):
        try:
            os.close(_open(base, names[:count]))
        except FileNotFoundError:
            parent = _open(base, names[: count - 1])
            try:
                if is_directory or count < len(names):
                    os.mkdir(names[count - 1], 0o755, dir_fd=parent)
                else:
                    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
                    os.close(os.open(names[count - 1], flags, 0o644, dir_fd=parent))
            finally:
                os.close(parent)


def _open(base: int, names: list[str]) -> int:
    """Open a path as if `base` were "/", links and ".." included. Raises: OSError."""
    how = struct.pack("@QQQ", os.O_PATH | os.O_CLOEXEC, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    path = os.fsencode("/".join(names) or ".")
    size = ctypes.c_size_t(len(how))
    result: int = _libc.syscall(ctypes.c_long(SYS_OPENAT2), ctypes.c_long(base), path, how, size)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number or errno.EIO, os.strerror(number))
    return result
