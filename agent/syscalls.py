"""System calls that the module `os` does not have: mount, umount2, reboot, prctl.

`_ctypes`, the part of ctypes that is written in C, is enough to call a function of the C library, and is
there in a tenth of the time that `ctypes` takes. Starting busybox for each mount would cost more than all
of this.
"""

from __future__ import annotations

import _ctypes
import os
import struct
from typing import Any

# sys/mount.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_SYNCHRONOUS, MS_REMOUNT, MS_MANDLOCK, MS_DIRSYNC = 16, 32, 64, 128
MS_NOSYMFOLLOW, MS_NOATIME, MS_NODIRATIME = 256, 1024, 2048
MS_BIND, MS_MOVE, MS_REC, MS_SILENT = 4096, 8192, 16384, 32768
MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20
MS_RELATIME, MS_STRICTATIME, MS_LAZYTIME = 1 << 21, 1 << 24, 1 << 25
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8

RB_POWER_OFF = 0x4321FEDC  # sys/reboot.h
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class _Int(_ctypes._SimpleCData):  # type: ignore[type-arg]  # generic only for type checkers
    _type_ = "i"


class _UnsignedLong(_ctypes._SimpleCData):  # type: ignore[type-arg]  # generic only for type checkers
    _type_ = "L"


class _Function(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = _Int


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the C library that returns 0 or sets errno. Strings are given as bytes."""
    address = _ctypes.dlsym(_LIBRARY, name)
    result = _Function(address)(*arguments)
    if getattr(result, "value", result):
        number = _ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


_LIBRARY = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]  # None is this program


def mount(source: str, target: str, fstype: str, flags: int = 0, data: str = "") -> None:
    """Mount a file system, or change a mount, as `flags` say."""
    arguments = (source, target, fstype, data)
    source_, target_, fstype_, data_ = (os.fsencode(text) if text else None for text in arguments)
    _call("mount", source_, target_, fstype_, _UnsignedLong(flags), data_)


def unmount(target: str, flags: int = MNT_DETACH | UMOUNT_NOFOLLOW) -> None:
    """Unmount; by default at the latest when nobody uses it any more."""
    _call("umount2", os.fsencode(target), _Int(flags))


def swap_on(path: str) -> None:
    """Use a device or file as swap."""
    _call("swapon", os.fsencode(path), _Int(0))


def power_off() -> None:
    """Turn the machine off. Returns only if it cannot."""
    _call("reboot", _Int(RB_POWER_OFF - (1 << 32) if RB_POWER_OFF >> 31 else RB_POWER_OFF))


def set_limit(resource: int, value: int) -> None:
    """Set both limits of a resource (RLIMIT_*), for this process and those that it starts."""
    _call("setrlimit", _Int(resource), struct.pack("LL", value, value))


def become_subreaper() -> None:
    """Inherit the orphans among our descendants."""
    one, zero = _UnsignedLong(1), _UnsignedLong(0)
    _call("prctl", _Int(PR_SET_CHILD_SUBREAPER), one, zero, zero, zero)
