"""CopyFile: files that the host sends because it shares no file system with the guest.

The rule: nothing is written outside the shared directory, whatever links lie in it. Every step on the way
is opened without following links, and what is written appears under its name only when it is complete.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from agent.errors import InvalidArgument

if TYPE_CHECKING:
    from agent.schema import agent as messages

SHARE = "shared/containers"  # below the state root: Kata's guest path of the share
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def copy_file(root: str, request: messages.CopyFileRequest) -> None:
    """Take one piece of a file, or a directory or link.

    Raises:
        InvalidArgument: the path is outside the share.
    """
    base = f"{root}/{SHARE}"
    if not request.path.startswith(f"{base}/") or ".." in request.path.split("/"):
        raise InvalidArgument(f'path "{request.path}" is not below {base}')
    parts = [part for part in request.path[len(base) :].split("/") if part not in ("", ".")]
    if not parts:
        raise InvalidArgument(f'path "{request.path}" names nothing below {base}')
    *parents, name = parts
    os.makedirs(base, exist_ok=True)
    directory = _open_parents(base, parents, request.dir_mode or 0o750)
    try:
        if stat.S_ISDIR(request.file_mode):
            _make_directory(directory, name, request)
        elif stat.S_ISLNK(request.file_mode):
            _make_link(directory, name, request)
        else:
            _write(directory, name, request)
    finally:
        os.close(directory)


def _open_parents(base: str, names: list[str], mode: int) -> int:
    current = os.open(base, _DIRECTORY)
    for name in names:
        try:
            try:
                os.mkdir(name, mode & 0o7777, dir_fd=current)
            except FileExistsError:
                pass
            deeper = os.open(name, _DIRECTORY, dir_fd=current)
        except BaseException:
            os.close(current)
            raise
        os.close(current)
        current = deeper
    return current


def _make_directory(parent: int, name: str, request: messages.CopyFileRequest) -> None:
    try:
        os.mkdir(name, dir_fd=parent)
    except FileExistsError:
        pass
    fd = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        _set_owner(fd, request)
    finally:
        os.close(fd)


def _make_link(parent: int, name: str, request: messages.CopyFileRequest) -> None:
    """Make the link beside, and put it in place: there may be an older one."""
    temporary = f"{name}.tmp"
    _remove(parent, temporary)
    os.symlink(request.data, temporary.encode(), dir_fd=parent)
    os.chown(temporary, request.uid, request.gid, dir_fd=parent, follow_symlinks=False)
    os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)


def _write(parent: int, name: str, request: messages.CopyFileRequest) -> None:
    temporary = f"{name}.tmp"
    if request.offset == 0:
        _remove(parent, temporary)
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o600, dir_fd=parent)
    try:
        data, offset = memoryview(request.data), request.offset
        while data:
            written = os.pwrite(fd, data, offset)
            data, offset = data[written:], offset + written
        if offset >= request.file_size:
            _set_owner(fd, request)
            os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
    finally:
        os.close(fd)


def _set_owner(fd: int, request: messages.CopyFileRequest) -> None:
    os.fchown(fd, request.uid, request.gid)
    os.fchmod(fd, stat.S_IMODE(request.file_mode))  # after the owner, whose change clears set-id bits


def _remove(parent: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        pass
