"""Taps that outlive their VM: by what they are known, and how they are removed.

A tap's alias is the directory of the VM that it was made for, so that whoever finds it knows whose it is. The
rule: a tap that a process has open is in use, and the kernel itself refuses to give it to anybody else.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

INTERFACES = Path("/sys/class/net")  # of the network namespace in which sysfs was mounted: sysfs(5)
TUN = Path("/dev/net/tun")
# linux/if_tun.h
TUNSETIFF = 0x400454CA
TUNSETPERSIST = 0x400454CB
IFF_TAP = 0x0002
SETTABLE = 0x7102  # of the flags in sysfs: IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_ONE_QUEUE, IFF_MULTI_QUEUE
IFREQ = "16sH22x"  # linux/if.h, struct ifreq: a name and flags


def marked_taps(directory: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and mark of each tap of this network namespace whose mark lies in a directory."""
    for entry in sorted(INTERFACES.glob("*")):
        try:
            flags = int((entry / "tun_flags").read_text(), 16)
            alias = (entry / "ifalias").read_text().rstrip("\n")
        except (OSError, ValueError):
            continue  # no tap, or gone meanwhile
        mark = Path(alias or "/")
        if flags & IFF_TAP and mark.parent == directory:
            yield entry.name, mark


def remove_tap(name: str) -> None:
    """Remove a tap that nobody has open. Raises: OSError."""
    flags = int((INTERFACES / name / "tun_flags").read_text(), 16) & SETTABLE
    descriptor = os.open(TUN, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack(IFREQ, name.encode(), flags))
        fcntl.ioctl(descriptor, TUNSETPERSIST, 0)
    finally:
        os.close(descriptor)
