"""Directories in a tree that others write to, opened so that nothing they plant leads out of it.

A container's root is in the hands of its guest, and of whoever made its image. A path into it that is looked
at first and used later may be another one by then. So it is resolved once, by the kernel, with the tree's top
as the root for symbolic links and for "..", and used by its descriptor.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from vc.errors import InvalidArgument
from vc.oci.mounts import MountPoint

SYS_OPENAT2 = 437  # asm-generic/unistd.h; the same on every architecture
# linux/openat2.h
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_IN_ROOT = 0x10

# openat2(2), EAGAIN: where ".." is on the way, any rename or mount on the host at that moment makes the
# kernel give up. A container that renames without end must not have us try without end.
TRIES = 1000
AT_FDCWD = -100  # linux/fcntl.h

_libc = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    """linux/openat2.h, struct open_how."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def _open(root: int, path: str, resolve: int = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS) -> int:
    how = _OpenHow(os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, 0, resolve)
    size = ctypes.c_size_t(ctypes.sizeof(how))
    for _ in range(TRIES):
        result: int = _libc.syscall(SYS_OPENAT2, root, os.fsencode(path), ctypes.byref(how), size)
        if result >= 0:
            return result
        number = ctypes.get_errno()
        if number != errno.EAGAIN:
            break
    raise OSError(number, os.strerror(number), path)


@contextmanager
def directory_below(root: Path, target: str) -> Iterator[Path]:
    """Give a path by which the directory `target` of the tree can be used; what is missing of it is made.

    The path is good inside the block, whatever happens to the names meanwhile.

    Raises:
        InvalidArgument: the target is written so that it leaves the tree.
        OSError: it cannot be opened.
    """
    parts = PurePosixPath(target.lstrip("/")).parts
    if ".." in parts:
        raise InvalidArgument(f"mount target {target!r} leaves the root file system {str(root)!r}")
    top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = _open_or_make(top, parts)
    finally:
        os.close(top)
    try:
        yield Path(f"/proc/self/fd/{found}")
    finally:
        os.close(found)


@contextmanager
def directory_without_links(path: Path) -> Iterator[Path]:
    """Give a path by which a directory can be used that no symbolic link leads to, good inside the block.

    Raises:
        OSError: it cannot be opened; ELOOP if a link is on the way by now, ENOSYS before Linux 5.6.
    """
    found = _open(AT_FDCWD, str(path), RESOLVE_NO_SYMLINKS)
    try:
        yield Path(f"/proc/self/fd/{found}")
    finally:
        os.close(found)


def _open_or_make(top: int, parts: tuple[str, ...]) -> int:
    here = os.dup(top)
    for index, part in enumerate(parts):
        try:
            path = "/".join(parts[: index + 1])
            try:
                deeper = _open(top, path)
            except FileNotFoundError:
                os.mkdir(part, 0o755, dir_fd=here)
                deeper = _open(top, path)
        finally:
            os.close(here)
        here = deeper
    return here


def make_mount_points(root: Path, wanted: Iterable[MountPoint]) -> None:
    """Make what is missing of the mount points in a container's root, where the container will find them.

    A runtime makes them itself, but not in a root that is read-only for its whole guest. What cannot be made
    is left for the runtime to complain of.
    """
    top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for point in wanted:
            with suppress(OSError):
                _make_mount_point(top, PurePosixPath(point.path.lstrip("/")).parts, point.is_directory)
    finally:
        os.close(top)


def _make_mount_point(top: int, parts: tuple[str, ...], is_directory: bool) -> None:
    directory = _open_or_make(top, parts if is_directory else parts[:-1])
    try:
        if not is_directory:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC  # O_EXCL follows no link
            os.close(os.open(parts[-1], flags, 0o644, dir_fd=directory))
    finally:
        os.close(directory)
