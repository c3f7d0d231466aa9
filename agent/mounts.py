"""Mounting: options as /etc/fstab and OCI specs write them, turned into flags, and mounts made and removed.

`parse_options` and `unescape` are pure; the rest asks the kernel.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from agent.errors import RuntimeFailed

if TYPE_CHECKING:
    from collections.abc import Iterable

# Bits of sys/mount.h by option: what it sets, and what it clears. agent.syscalls has their names.
_FLAGS: dict[str, tuple[int, int]] = {
    "defaults": (0, 0),
    "ro": (1, 0),
    "rw": (0, 1),
    "nosuid": (2, 0),
    "suid": (0, 2),
    "nodev": (4, 0),
    "dev": (0, 4),
    "noexec": (8, 0),
    "exec": (0, 8),
    "sync": (16, 0),
    "async": (0, 16),
    "remount": (32, 0),
    "mand": (64, 0),
    "nomand": (0, 64),
    "dirsync": (128, 0),
    "nosymfollow": (256, 0),
    "noatime": (1024, 0),
    "atime": (0, 1024),
    "nodiratime": (2048, 0),
    "diratime": (0, 2048),
    "bind": (4096, 0),
    "rbind": (4096 | 16384, 0),
    "silent": (32768, 0),
    "loud": (0, 32768),
    "relatime": (1 << 21, 0),
    "norelatime": (0, 1 << 21),
    "strictatime": (1 << 24, 0),
    "nostrictatime": (0, 1 << 24),
    "lazytime": (1 << 25, 0),
    "nolazytime": (0, 1 << 25),
}
_REC = 16384
_PROPAGATION = {"unbindable": 1 << 17, "private": 1 << 18, "slave": 1 << 19, "shared": 1 << 20}
_PROPAGATION.update({f"r{name}": flag | _REC for name, flag in list(_PROPAGATION.items())})
_BIND, _REMOUNT = 4096, 32


class Options:
    """Parsed options: flags for the kernel, a propagation to set afterwards, and the file system's own
    text.
    """

    __slots__ = ("data", "flags", "propagation")

    def __init__(self, flags: int, propagation: int, data: str) -> None:
        self.flags = flags
        self.propagation = propagation
        self.data = data


def parse_options(options: Iterable[str]) -> Options:
    """Parse options; later ones win. What is no flag is the file system's."""
    flags = propagation = 0
    data = []
    for option in options:
        if option in _FLAGS:
            set_bits, cleared = _FLAGS[option]
            flags = flags & ~cleared | set_bits
        elif option in _PROPAGATION:
            propagation = _PROPAGATION[option]
        elif option:
            data.append(option)
    return Options(flags, propagation, ",".join(data))


def mount(source: str, target: str, fstype: str, options: Iterable[str] = ()) -> None:
    """Mount; a type of "bind" is the option of that name.

    Raises:
        RuntimeFailed: it cannot be mounted.
    """
    from agent import syscalls

    listed = [*options, *(("bind",) if fstype == "bind" else ())]
    parsed = parse_options(listed)
    try:
        if parsed.flags & _BIND:
            # A bind ignores all other flags; they need a second step.
            syscalls.mount(source, target, "", parsed.flags & (_BIND | _REC))
            if rest := parsed.flags & ~(_BIND | _REC):
                syscalls.mount("", target, "", rest | _BIND | _REMOUNT)
        else:
            try:
                syscalls.mount(source or fstype, target, fstype, parsed.flags, parsed.data)
            except OSError as exc:
                if exc.errno != errno.ENODEV or not _load_module(fstype):
                    raise
                syscalls.mount(source or fstype, target, fstype, parsed.flags, parsed.data)
        if parsed.propagation:
            syscalls.mount("", target, "", parsed.propagation)
    except OSError as exc:
        raise RuntimeFailed(
            f"cannot mount {source} on {target} (type {fstype}, options {','.join(listed)}): {exc.strerror}"
        ) from exc


def _load_module(fstype: str) -> bool:
    """Ask for the module of a file system that the kernel does not know; whether there is something to
    ask.
    """
    from agent import modules

    return modules.load(f"fs-{fstype}") or modules.load(fstype)


def unmount(target: str) -> None:
    """Unmount, at the latest when nobody uses it any more. What is not mounted is fine.

    Raises:
        RuntimeFailed: it cannot be unmounted.
    """
    from agent import syscalls

    try:
        syscalls.unmount(target)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOENT):
            raise RuntimeFailed(f"cannot unmount {target}: {exc.strerror}") from exc


class MountEntry:
    """One line of /proc/PID/mountinfo."""

    __slots__ = ("fstype", "source", "target")

    def __init__(self, target: str, fstype: str, source: str) -> None:
        self.target = target
        self.fstype = fstype
        self.source = source


def parse_mountinfo(text: str) -> list[MountEntry]:
    """Parse mountinfo (proc(5)), in the order of mounting."""
    entries = []
    for line in text.splitlines():
        fields = line.split(" ")
        separator = fields.index("-", 6)
        entries.append(
            MountEntry(unescape(fields[4]), fields[separator + 1], unescape(fields[separator + 2]))
        )
    return entries


def unescape(text: str) -> str:
    """Undo the octal escapes of blanks and backslashes."""
    first, *rest = text.split("\\")
    return first + "".join(chr(int(part[:3], 8)) + part[3:] for part in rest)


def mounted() -> list[MountEntry]:
    """Return what is mounted, as we see it."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return parse_mountinfo(file.read())


def keep_submount(path: str) -> None:
    """Let the file system that the host has at a directory of the share be mounted here as well.

    virtiofs mounts it by itself, in the namespace of whoever walks there first. If that is a container's, the
    file system ends with the container's last process, and Linux does not wait for what that process was
    reading ahead when it was killed: "VFS: Busy inodes after unmount of virtiofs", and a process that has
    ended and can never be reaped. Kept here, it lives until `drop_submount`.
    """
    try:
        # Not stat(2), which mounts nothing.
        os.close(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError:
        pass  # a file, or nothing at all: whoever mounts it tells


def hold_namespace(pid: int) -> int:
    """Keep the mounts of a process beyond its end, until `drop_namespace`; returns what that takes.

    The reason is that of `keep_submount`: a container also walks into file systems that the host has below a
    volume, and nobody knows of those beforehand.
    """
    try:
        return os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1  # it has ended, and its mounts with it


def drop_namespace(fd: int, share: str) -> None:
    """Let the mounts of a process go that has ended, if nobody else has them."""
    if fd >= 0:
        _wait_answered(share)
        os.close(fd)


def drop_submount(path: str) -> None:
    """End what `keep_submount` kept, once nobody else uses it."""
    if is_mounted(path):
        _wait_answered(path)
        unmount(path)


def _wait_answered(path: str) -> None:
    """Wait until the host has answered what a process that has ended had still asked for.

    virtiofsd serves one request after the other. When it has answered the first of two, it has answered what
    was read ahead; when it has answered the second, the end of that file as well.
    """
    try:
        os.statvfs(path)
        os.statvfs(path)
    except OSError:
        pass  # the host was faster


def is_removed(path: str) -> bool:
    """Let the kernel ask the host for an entry of the share again; say whether the host has removed it.

    Then the kernel forgets what it knows of it and below, for each of which virtiofsd keeps a descriptor, and
    with it the file system that was mounted there. stat(2) believes what it heard within the time that the
    host allows, a second or a day; link(2) has to know. A directory cannot be linked, so nothing is made.
    """
    try:
        os.link("/", path)
    except FileExistsError:
        return False
    except OSError:
        pass  # EXDEV or EPERM, after it has asked
    return True


def root_is_initramfs() -> bool:
    """Whether / is the initial file system, from which no container's root can be pivoted: pivot_root(2)."""
    return all(entry.fstype == "rootfs" for entry in mounted() if entry.target == "/")


def is_mounted(target: str) -> bool:
    """Whether something is mounted exactly there."""
    return any(entry.target == target for entry in mounted())
