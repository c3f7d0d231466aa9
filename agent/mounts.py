"""Mounting and unmounting in the guest, by busybox: a minimal Python has no way to mount(2)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from agent.errors import RuntimeFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agent.reaper import Reaper

BUSYBOX = "/bin/busybox"


def _command(name: str) -> list[str]:
    return [BUSYBOX, name] if os.path.exists(BUSYBOX) else [name]


def mount(reaper: Reaper, source: str, target: str, fstype: str, options: Sequence[str]) -> None:
    """Mount; a type of "bind" or "" leaves the type to the options.

    Raises:
        RuntimeFailed: it cannot be mounted.
    """
    argv = _command("mount")
    if fstype and fstype != "bind":
        argv += ["-t", fstype]
    if options:
        argv += ["-o", ",".join(options)]
    status, output = reaper.run([*argv, source or "none", target], check=False)
    if status:
        text = output.decode("utf-8", "replace").strip()
        raise RuntimeFailed(
            f"cannot mount {source} ({fstype or 'bind'}, {','.join(options)}) on {target}: {text}"
        )


def unmount(reaper: Reaper, target: str) -> None:
    """Unmount, at the latest when nobody uses it any more.

    Raises:
        RuntimeFailed: it cannot be unmounted.
    """
    status, output = reaper.run([*_command("umount"), "-l", target], check=False)
    if status and os.path.ismount(target):
        raise RuntimeFailed(f"cannot unmount {target}: {output.decode('utf-8', 'replace').strip()}")


def root_is_initramfs() -> bool:
    """Whether / is the initial file system, whose root no container can be moved away from
    (pivot_root(2)).
    """
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            return any(
                fields[4] == "/" and fields[fields.index("-") + 1] == "rootfs"
                for fields in map(str.split, file)
            )
    except OSError:
        return False
