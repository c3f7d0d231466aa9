"""What a VMM sees of the host: a user, a root directory and namespaces that nobody else has.

A guest that broke out into its VMM is then a user whom no file belongs to, in a file system where nothing can
be written and no socket can be reached: a read-only root with the programs of /usr, the files that the VMM
was told to open, a few device nodes, and a /proc that shows only itself.

The rule: all of it is made in a mount namespace that only the VMM enters. No path of the host changes, so
nothing has to be cleaned up, and no `rm -r` of ours can ever meet a bind mount of /usr. A thread of its own
makes the namespaces, because unshare(2) changes the thread that calls it, and ends.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from vc.storage.mounts import (
    MNT_DETACH,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    bind,
    mount,
)

log = logging.getLogger(__name__)

# linux/sched.h
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWNET = 0x40000000
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "s390x": 217, "ppc64le": 203}  # asm/unistd.h

# The highest range that nothing uses: no user of a distribution, no user namespace, and it fits into 31 bits.
# systemd, "Users, Groups, UIDs and GIDs on systemd Systems".
FIRST_UID, UIDS = 0x70000000, 0x10000000

PROGRAMS = Path("/usr")
# Where the new root is mounted before it becomes the root: what was there is hidden meanwhile, so it is a
# directory that every host has and that nothing is bound from.
MOUNT_POINT = Path("/proc")
# Links into /usr, or directories of programs where /usr is not merged.
TOP_LEVEL = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
LINKER_CACHE = Path("/etc/ld.so.cache")
ROOT_KIB = 256  # of the root itself: directories, links, and places to mount on
COPIES = "copies"  # of files that others may not read
READABLE = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH
# proc(5): only what is about processes, and of these only those of one's own user. Since Linux 5.8, which
# also made them properties of the mount instead of the PID namespace.
PROC_OPTIONS = "subset=pid,hidepid=invisible"

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Jail:
    """The namespaces of one VMM as paths for nsenter(1), and the user that it becomes."""

    namespaces: tuple[tuple[str, str], ...]  # nsenter's option and its value
    uid: int

    def prefix(self) -> list[str]:
        """Return the program that enters it."""
        return ["nsenter", *(f"--{option}={path}" for option, path in self.namespaces), "--"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a VMM opens by path. The paths lead through no symbolic link: `Path.resolve`."""

    program: Path
    files: tuple[Path, ...] = ()
    devices: tuple[Path, ...] = ()  # character devices, which it may read and write


def uid_of(vmid: str) -> int:
    """Return the user of a VM. That two on one host have the same is a rare accident and costs little."""
    return FIRST_UID + int(hashlib.sha256(vmid.encode()).hexdigest(), 16) % UIDS


@contextmanager
def jail(vmid: str, needs: Needs, *, netns: str | None) -> Iterator[Jail | None]:
    """Make the jail of a VMM that is started inside the block; None, and a warning, if this host cannot.

    `netns` as in `launch`.
    """
    with ExitStack() as stack:
        try:
            made = _make(stack, uid_of(vmid), needs, netns)
        except (OSError, KeyError) as exc:
            stack.close()
            _warn_once(str(exc))
            made = None
        yield made


def obstacle(needs: Needs) -> str:
    """Return why this host cannot make a jail; empty if it can."""
    with ExitStack() as stack:
        try:
            _make(stack, FIRST_UID, needs, "")
        except (OSError, KeyError) as exc:
            return str(exc)
    return ""


@lru_cache(maxsize=1)
def _warn_once(reason: str) -> None:
    log.warning(
        "the VMM runs as root, though without capabilities, and sees the host's files, since it cannot be "
        "given a user and a root directory of its own: %s; rootless = false ends this warning",
        reason,
    )


def _make(stack: ExitStack, uid: int, needs: Needs, netns: str | None) -> Jail:
    _check_uid(uid)
    kinds = {"mount": CLONE_NEWNS, "ipc": CLONE_NEWIPC, "uts": CLONE_NEWUTS}
    if netns == "":
        kinds["net"] = CLONE_NEWNET
    names = {"mount": "mnt"}

    def make() -> list[tuple[str, str]]:
        _check(_libc.unshare(sum(kinds.values())), "unshare")
        found = []
        for kind in kinds:
            descriptor = os.open(f"/proc/thread-self/ns/{names.get(kind, kind)}", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            # By this process's id, so that it needs no descriptor that QEMU would inherit.
            found.append((kind, f"/proc/{os.getpid()}/fd/{descriptor}"))
        _build(MOUNT_POINT, needs)
        return found

    namespaces = _in_thread(make)
    if netns:
        namespaces.append(("net", netns))
    return Jail(namespaces=tuple(namespaces), uid=uid)


def _check_uid(uid: int) -> None:
    """Refuse a user that this user namespace does not have. Raises: OSError."""
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, _, count = map(int, line.split())
        if first <= uid < first + count:
            return
    raise OSError(f"this user namespace has no user {uid}")


@dataclass(slots=True)
class _Outcome:
    namespaces: list[tuple[str, str]] = field(default_factory=list)
    error: Exception | None = None


def _in_thread(make: Callable[[], list[tuple[str, str]]]) -> list[tuple[str, str]]:
    outcome = _Outcome()

    def run() -> None:
        try:
            outcome.namespaces = make()
        except Exception as exc:  # any of them is the caller's
            outcome.error = exc

    thread = threading.Thread(target=run, name="jail")
    thread.start()
    thread.join()
    if outcome.error is not None:
        raise outcome.error
    return outcome.namespaces


def _build(root: Path, needs: Needs) -> None:
    """Make the root directory, in this thread's own mount namespace, and move there. Raises: OSError."""
    os.umask(0o022)  # of this thread alone, as the mount namespace is: unshare(2), CLONE_FS
    mount("none", Path("/"), "", MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NOEXEC, f"mode=0755,size={_size(needs)}")
    _bind(root, PROGRAMS, PROGRAMS)
    for name in TOP_LEVEL:
        path = Path("/", name)
        if path.is_symlink():
            (root / name).symlink_to(str(path.readlink()).lstrip("/"))
        elif path.is_dir():
            _bind(root, path, path)
    for path in (*_outside(needs.program), LINKER_CACHE):
        _bind(root, path, path)
    _check_program(root, needs.program)
    for path in needs.files:
        _give(root, path)
    for path in needs.devices:
        _give_device(root, path)
    (root / "proc").mkdir()
    mount("proc", root / "proc", "proc", MS_NOSUID | MS_NOEXEC | MS_NODEV, PROC_OPTIONS)
    mount("", root, "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NOEXEC)
    os.chdir(root)
    # pivot_root(2), "pivot_root(".", ".")": the old root is stacked on the new one, and taken off.
    _check(_libc.syscall(SYS_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", MNT_DETACH), "umount of the old root")


def _size(needs: Needs) -> str:
    """Return the size of the root's file system: files that others may not read are copied into it."""
    copied = sum(path.stat().st_size for path in needs.files if path.exists() and not _is_readable(path))
    return f"{(copied >> 10) + ROOT_KIB}k"


def _outside(program: Path) -> Sequence[Path]:
    """Return the directories of a program that is not in /usr: its own, or the tree that has it in bin."""
    directory = program.parent
    if any(directory.is_relative_to(place) for place in (PROGRAMS, *(Path("/", name) for name in TOP_LEVEL))):
        return ()
    tree = directory.parent if directory.name == "bin" and directory.parent != Path("/") else directory
    return (tree,)


def _check_program(root: Path, program: Path) -> None:
    """Refuse a program that this user could not run. Raises: OSError."""
    place = root / program.relative_to("/")
    if place.exists() and (_closed(root, program) or not place.stat().st_mode & stat.S_IXOTH):
        raise PermissionError(f"others may not run {str(program)!r}")


def _closed(root: Path, path: Path) -> Path | None:
    """Return the topmost directory on the way to a path that others may not enter."""
    for parent in reversed([root / place.relative_to("/") for place in path.parents]):
        if parent.exists() and not parent.stat().st_mode & stat.S_IXOTH:
            return parent
    return None


def _is_readable(path: Path) -> bool:
    return bool(path.stat().st_mode & stat.S_IROTH)


def _give(root: Path, path: Path) -> None:
    """Show a file or directory at its own path. Of one that is not there the VMM will complain."""
    if not path.exists():
        return
    # It may be in a tree that is there already.
    while closed := _closed(root, path):
        mount("tmpfs", closed, "tmpfs", MS_NOSUID | MS_NOEXEC | MS_NODEV, f"mode=0755,size={ROOT_KIB}k")
    if path.is_dir() or _is_readable(path):
        if not (root / path.relative_to("/")).exists():
            _bind(root, path, path)
        return
    copies = root / COPIES
    copies.mkdir(exist_ok=True)
    copy = copies / str(len(list(copies.iterdir())))
    shutil.copyfile(path, copy)
    copy.chmod(READABLE)
    _bind(root, copy, path)


def _bind(root: Path, source: Path, path: Path) -> None:
    """Bind a file or directory, if it is there, at a path of the jail, read-only."""
    if not source.exists():
        return
    place = root / path.relative_to("/")
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            place.mkdir()
        else:
            place.touch()
    bind(source, place, read_only=True)


def _give_device(root: Path, path: Path) -> None:
    """Make a node of a character device that this user may use."""
    if not path.is_char_device():
        _give(root, path)  # a source of entropy may be a file
        return
    place = root / path.relative_to("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    os.mknod(place, stat.S_IFCHR | 0o600, path.stat().st_rdev)
    place.chmod(0o666)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
