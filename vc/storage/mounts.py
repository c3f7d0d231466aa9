"""Mounts on the host: containerd's mount words, mount(2), umount2(2) and the list of what is mounted.

Deciding and doing are apart: `parse_options` turns words into flags and is pure; `mount` and `unmount`
are the system calls. Unmounting never follows a symbolic link, since a container may have planted one, in the
last place of a path or above it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from vc.errors import Unsupported, VCError
from vc.storage.beneath import directory_below, directory_without_links

# linux/mount.h, MS_*
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_REMOUNT = 32
MS_MANDLOCK = 64
MS_DIRSYNC = 128
MS_NOSYMFOLLOW = 256
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_SILENT = 32768
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24
MS_LAZYTIME = 1 << 25

# asm-generic/unistd.h: the newer system calls have the same number on all architectures.
SYS_OPEN_TREE = 428
SYS_MOVE_MOUNT = 429
SYS_MOUNT_SETATTR = 442
# linux/mount.h, linux/fcntl.h
OPEN_TREE_CLONE = 1
MOVE_MOUNT_F_EMPTY_PATH = 4
MOUNT_ATTR_RDONLY = 1
AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

# linux/fs.h
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

MAX_DATA_BYTES = 4095  # mount(2) copies one page and wants its last byte for the NUL

SET_FLAGS = {
    "ro": MS_RDONLY,
    "nosuid": MS_NOSUID,
    "nodev": MS_NODEV,
    "noexec": MS_NOEXEC,
    "sync": MS_SYNCHRONOUS,
    "remount": MS_REMOUNT,
    "mand": MS_MANDLOCK,
    "dirsync": MS_DIRSYNC,
    "nosymfollow": MS_NOSYMFOLLOW,
    "noatime": MS_NOATIME,
    "nodiratime": MS_NODIRATIME,
    "bind": MS_BIND,
    "rbind": MS_BIND | MS_REC,
    "silent": MS_SILENT,
    "relatime": MS_RELATIME,
    "strictatime": MS_STRICTATIME,
    "lazytime": MS_LAZYTIME,
}
CLEAR_FLAGS = {
    "rw": MS_RDONLY,
    "suid": MS_NOSUID,
    "dev": MS_NODEV,
    "exec": MS_NOEXEC,
    "async": MS_SYNCHRONOUS,
    "nomand": MS_MANDLOCK,
    "symfollow": MS_NOSYMFOLLOW,
    "atime": MS_NOATIME,
    "diratime": MS_NODIRATIME,
    "norelatime": MS_RELATIME,
    "nostrictatime": MS_STRICTATIME,
    "nolazytime": MS_LAZYTIME,
    "loud": MS_SILENT,
    "defaults": 0,
}
PROPAGATION = {
    "unbindable": MS_UNBINDABLE,
    "runbindable": MS_UNBINDABLE | MS_REC,
    "private": MS_PRIVATE,
    "rprivate": MS_PRIVATE | MS_REC,
    "slave": MS_SLAVE,
    "rslave": MS_SLAVE | MS_REC,
    "shared": MS_SHARED,
    "rshared": MS_SHARED | MS_REC,
}
PRIVATE_PREFIX = "X-containerd."  # containerd's notes to itself, never for mount(2)


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount as containerd orders it: `target` is a directory below the mount point, usually empty."""

    type: str
    source: str
    target: str = ""
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Options:
    """Mount words, sorted by what the kernel makes of them."""

    flags: int
    propagation: int
    data: str
    loop: bool


def parse_options(words: Iterable[str]) -> Options:
    """Sort mount words into flags, propagation and file-system data. Later words win."""
    flags = propagation = 0
    data: list[str] = []
    loop = False
    for word in words:
        if word in SET_FLAGS:
            flags |= SET_FLAGS[word]
        elif word in CLEAR_FLAGS:
            flags &= ~CLEAR_FLAGS[word]
        elif word in PROPAGATION:
            propagation = PROPAGATION[word]
        elif word == "loop":
            loop = True
        elif not word.startswith(PRIVATE_PREFIX) and word:
            data.append(word)
    return Options(flags, propagation, ",".join(data), loop)


def refuse_mapped_owners(mounts: Iterable[Mount]) -> None:
    """Refuse roots whose owners are to be mapped, as for a user namespace. Raises: Unsupported."""
    for entry in mounts:
        for word in entry.options:
            if word.startswith(("uidmap=", "gidmap=")):
                raise Unsupported(
                    f"option {word!r} of the root file system is not supported: run the container without a "
                    "user namespace, for the VM has a kernel of its own"
                )


_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: Path, fstype: str, flags: int, data: str = "") -> None:
    """Make a mount by the system call.

    Raises:
        OSError: with source, target and type in its text.
    """
    what = f"mount {source!r} ({fstype or 'flags only'}) on {str(target)!r}"
    result = _libc.mount(
        source.encode(), os.fsencode(target), fstype.encode(), ctypes.c_ulong(flags), data.encode() or None
    )
    _check(result, what)


def set_propagation(target: Path, propagation: int) -> None:
    """Change how mounts travel to and from `target`."""
    mount("", target, "", propagation)


def bind(source: Path, target: Path, *, read_only: bool = False, recursive: bool = True) -> None:
    """Bind `source` on `target`, which exists and is of the same kind (directory or file).

    Wherever the mount travels by propagation, it is what it was when it appeared here. A remount does not
    travel, so a read-only bind must be read-only before it is anywhere: with all that is mounted below it.

    What is mounted below `source` later appears at `target`, too, and never the other way round: a copy of a
    shared mount is its peer, and unmounting it with all below would unmount what is below the source.

    Raises:
        OSError: with source and target in its text; needs Linux 5.12.
    """
    what = f"bind {str(source)!r} on {str(target)!r}"
    flags = OPEN_TREE_CLONE | os.O_CLOEXEC | (AT_RECURSIVE if recursive else 0)
    tree = _syscall(what, SYS_OPEN_TREE, AT_FDCWD, os.fsencode(source), flags)
    try:
        # linux/mount.h, struct mount_attr: set, clear, propagation, user namespace
        attributes = struct.pack("@QQQQ", MOUNT_ATTR_RDONLY if read_only else 0, 0, MS_SLAVE, 0)
        flags = AT_EMPTY_PATH | AT_RECURSIVE
        _syscall(what, SYS_MOUNT_SETATTR, tree, b"", flags, attributes, len(attributes))
        _syscall(what, SYS_MOVE_MOUNT, tree, b"", AT_FDCWD, os.fsencode(target), MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(tree)


def _syscall(what: str, number: int, *args: int | bytes) -> int:
    words = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result: int = _libc.syscall(ctypes.c_long(number), *words)
    _check(min(result, 0), what)
    return result


def _locked_flags(target: Path) -> int:
    """Flags that a remount must repeat, or the kernel refuses it in a user namespace."""
    st = os.statvfs(target)
    pairs = ((os.ST_NOSUID, MS_NOSUID), (os.ST_NODEV, MS_NODEV), (os.ST_NOEXEC, MS_NOEXEC))
    return sum(flag for bit, flag in pairs if st.f_flag & bit)


def mount_all(mounts: Sequence[Mount], root: Path) -> None:
    """Mount containerd's entries on `root`, in order; undo all of them if one fails.

    Raises:
        VCError: naming the entry and the kernel's reason.
        InvalidArgument: an entry's target leaves `root`.
    """
    done = False
    try:
        for entry in mounts:
            _mount_one(entry, root)
        done = True
    except OSError as exc:
        raise VCError(f"cannot mount the root file system: {exc.strerror or exc}") from exc
    finally:
        if not done:
            unmount_below(root)


def _mount_one(entry: Mount, root: Path) -> None:
    options = parse_options(entry.options)
    if options.loop or entry.type.startswith("fuse") or len(options.data) > MAX_DATA_BYTES:
        with _target(root, entry) as target:
            # mount(8) wants a name: that of the directory as it is now.
            _mount_by_tool(entry, target.readlink() if entry.target else target)
        return
    flags = options.flags
    with _target(root, entry) as target, _named(entry):
        if flags & MS_BIND:
            mount(entry.source, target, "", flags & (MS_BIND | MS_REC))
        else:
            mount(entry.source, target, entry.type, flags, options.data)
    # Opened anew: what was opened before lies under the mount.
    with _target(root, entry) as target, _named(entry):
        if flags & MS_BIND and flags & ~(MS_BIND | MS_REC):
            mount("", target, "", flags | MS_REMOUNT | _locked_flags(target))
        if options.propagation:
            set_propagation(target, options.propagation)


def _target(root: Path, entry: Mount) -> AbstractContextManager[Path]:
    """Give the directory to mount on, which no symbolic link of the tree can move out of it."""
    return directory_below(root, entry.target) if entry.target else nullcontext(root)


@contextmanager
def _named(entry: Mount) -> Iterator[None]:
    """Have errors tell the target as it was ordered, instead of the descriptor that it was opened as."""
    try:
        yield
    except OSError as exc:
        if not entry.target:
            raise
        what = f"mount {entry.source!r} ({entry.type}) on {entry.target!r}"
        raise OSError(exc.errno, f"{what}: {os.strerror(exc.errno or 0)}") from exc


def _mount_by_tool(entry: Mount, target: Path) -> None:
    """Let mount(8) do what needs more than one system call: loop devices, fuse helpers, long overlays."""
    words = [word for word in entry.options if not word.startswith(PRIVATE_PREFIX)]
    cwd, words = _shorten_overlay(words)
    argv = ["mount", "-t", entry.type, "-o", ",".join(words) or "defaults", "--", entry.source, str(target)]
    result = subprocess.run(
        argv, cwd=cwd, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if result.returncode != 0:
        raise OSError(0, f"mount {entry.source!r} ({entry.type}) on {str(target)!r}: {result.stderr.strip()}")


def _shorten_overlay(words: list[str]) -> tuple[str | None, list[str]]:
    """Name lower layers from their common parent, since mount(2) takes at most a page of data."""
    for index, word in enumerate(words):
        layers = word.removeprefix("lowerdir=").split(":") if word.startswith("lowerdir=") else []
        if len(layers) > 1:
            parent = os.path.commonpath(layers)
            short = ":".join(os.path.relpath(layer, parent) for layer in layers)
            return parent, [*words[:index], f"lowerdir={short}", *words[index + 1 :]]
    return None, words


def unmount(target: Path) -> bool:
    """Detach the topmost mount on `target`, to which no link may lead; tell whether there was one.

    Where a container can write, a directory above a mount may become a link while we look.
    """
    try:
        with directory_without_links(target.parent) as parent:
            return _unmount(parent / target.name)
    except OSError as exc:
        return exc.errno == errno.ENOSYS and _unmount(target)


def _unmount(target: Path) -> bool:
    result: int = _libc.umount2(os.fsencode(target), MNT_DETACH | UMOUNT_NOFOLLOW)
    return result == 0


def mounted_below(root: Path) -> list[Path]:
    """Return the mount points at and below `root`, deepest and newest first."""
    prefix = str(root)
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            point = _unescape(line.split(" ", 5)[4])  # proc(5): field 5 is the mount point
            if point == prefix or point.startswith(prefix + "/"):
                found.append(Path(point))
    return found[::-1]


def _unescape(field: str) -> str:
    """Undo the octal escapes of proc(5) for blank, tab, newline and backslash."""
    if "\\" not in field:
        return field
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, char)
    return field


def unmount_below(root: Path) -> int:
    """Detach every mount at and below `root`; return how many there were. Safe to run twice."""
    count = 0
    for point in mounted_below(root):
        count += unmount(point)
    return count
