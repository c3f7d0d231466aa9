"""The few system calls that Python 3.11 has no function for, and nothing above them."""

import ctypes
import os
import resource

CLONE_NEWNS = 0x00020000  # linux/sched.h
MS_REC, MS_SLAVE, MS_SHARED = 0x4000, 1 << 19, 1 << 20  # linux/mount.h
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8  # linux/fs.h

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def own_mount_namespace() -> None:
    """Leave the host's mount namespace: its mounts still arrive here, ours stay here and die with us.

    Raises:
        OSError: it is not allowed.
    """
    _check(_libc.unshare(CLONE_NEWNS), "unshare(CLONE_NEWNS)")
    _check(_libc.mount(b"none", b"/", None, MS_REC | MS_SLAVE, None), "mount(/, MS_REC|MS_SLAVE)")
    # Shared again, so that mounts still reach namespaces made from this one, such as virtiofsd's.
    _check(_libc.mount(b"none", b"/", None, MS_REC | MS_SHARED, None), "mount(/, MS_REC|MS_SHARED)")


def become_subreaper() -> None:
    """Inherit the orphans of our children, so that they can be reaped."""
    _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl(PR_SET_CHILD_SUBREAPER)")


def raise_file_limit() -> None:
    """Allow this process as many open files as it may have: each process of a pod costs some ten.

    Raises:
        OSError: it is not allowed.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except ValueError as exc:  # Python's word for EINVAL, and for EPERM
        raise OSError(f"limit of open files: {exc}") from exc


def unmount_all(path: str) -> None:
    """Unmount everything that is stacked on `path`, lazily; nothing mounted is fine."""
    while _libc.umount2(os.fsencode(path), MNT_DETACH | UMOUNT_NOFOLLOW) == 0:
        pass
