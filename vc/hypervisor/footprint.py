"""How much memory a guest cannot boot without, as its files tell: less is refused before a boot.

A machine that is too small does not say so: its kernel dies before there is a console, and the host waits for
an agent until the dial timeout. What is counted here is a lower bound and not what a workload needs.

Source of the layout: the ELF specification, "ELF Header" and "Program Header", for 64 bits, little endian.
"""

from __future__ import annotations

import struct
from pathlib import Path

from vc.errors import InvalidArgument

MAGIC = b"\x7fELF\x02\x01"  # EI_CLASS: 64 bits; EI_DATA: little endian
HEADER = struct.Struct("<16s HHI QQQ I HHH")  # up to e_phnum
SEGMENT = struct.Struct("<II QQQQQ")  # up to p_memsz
LOAD = 1  # p_type: PT_LOAD
MAX_SEGMENTS = 64  # of a kernel there are five
MIB = 1 << 20


def check_memory(memory_mib: int, kernel: Path, initrd: Path | None) -> None:
    """Refuse a memory that does not even hold the kernel and the initrd.

    Files that cannot be read are not judged: who opens them has the better words.

    Raises:
        InvalidArgument: it is too small.
    """
    try:
        least = kernel_end(kernel) + (initrd.stat().st_size if initrd is not None else 0)
    except OSError:
        return
    if memory_mib * MIB < least:
        what = f"the kernel {str(kernel)!r}" + (f" and the initrd {str(initrd)!r}" if initrd else "")
        raise InvalidArgument(
            f"{memory_mib} MiB of memory cannot boot a guest: {what} alone take {-(-least // MIB)};"
            " raise default_memory in [hypervisor.qemu], or the annotation that replaced it"
        )


def kernel_end(kernel: Path) -> int:
    """Return the guest-physical address up to which an ELF kernel reaches; of another kernel, its size.

    A compressed kernel takes more than its size when it runs, but does not say how much. Raises: OSError.
    """
    with kernel.open("rb") as file:
        head = file.read(HEADER.size)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            return kernel.stat().st_size
        _, _, _, _, _, offset, _, _, _, size, count = HEADER.unpack(head)
        file.seek(offset)
        table = file.read(min(count, MAX_SEGMENTS) * size)
    end = 0
    for at in range(0, len(table) - SEGMENT.size + 1, max(size, SEGMENT.size)):
        kind, _, _, _, physical, _, memory = SEGMENT.unpack_from(table, at)
        if kind == LOAD:
            end = max(end, physical + memory)
    return end
